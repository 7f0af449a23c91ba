"""The command as a person types it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import warnings

import pytest

import cs336_registry as registry
from cs336_registry import cli

from .conftest import FakeEntryPoint


def run(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_overview_lists_every_command(capsys, words):
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert all(name in out and line in out for name, (_, line) in cli.commands().items())


@pytest.mark.parametrize("name", sorted(cli.commands()))
def test_the_overviews_line_is_the_functions_own(name):
    function = cli.load(name)
    assert inspect.getdoc(function).splitlines()[0] == cli.commands()[name][1]


@pytest.mark.parametrize("name", sorted(cli.commands()))
def test_every_command_teaches_its_options(capsys, name):
    code, out, _ = run(capsys, *name.split(), "--help")
    assert code == 0
    for parameter in inspect.signature(cli.load(name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert f"--{parameter.name.replace('_', '-')}" in out


def test_version(capsys):
    assert run(capsys, "--version")[1].startswith("cs336-registry ")


def test_an_unknown_command(capsys):
    code, _, err = run(capsys, "bakends")
    assert (code, err.count("\n")) == (2, 1)
    assert "unknown command 'bakends': did you mean 'backends'" in err


def test_errors_are_one_line(capsys):
    code, _, err = run(capsys, "explain", "rmsnrom")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: unknown component 'rmsnrom': did you mean 'rmsnorm'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("matrix", "--results", "nowhere"), "nowhere holds no rows: name the folder with --results"),
        (("bench", "report", "--results", "nowhere"), "nowhere holds no rows: name the folder with --results"),
        (("bench", "tables", "--check"), "benchmarks/results holds no rows: name the folder with --results"),
        (("mutants", "--components", "rmsnrom"), "unknown component 'rmsnrom': did you mean 'rmsnorm'"),
        (("bench", "silu", "--backends", "tourch"), "no backend 'tourch': did you mean 'torch'"),
        (("bench", "silu", "--dtype", "float8"), "silu has no dtype 'float8'"),
        (("bench", "silu", "--rounds", "0"), "--rounds is 0: it must be at least 1"),
        (("bench", "silu", "--device", "tpu"), "--device is 'tpu', and there is"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_is_not_there_is_told(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words)
    assert code == 1 and message in err.splitlines()[-1]


def test_a_closed_pipe_is_no_error(capfd):
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from cs336_registry.cli import main; main(sys.argv[1:])"
    finished = subprocess.run([sys.executable, "-c", code, "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (141, b"")


def test_judging_nothing_is_no_success(capfd):
    code, _, err = run(capfd, "conformance", "heap_bpe", "--components", "softmax")
    assert code == 1 and "nothing was judged" in err


def test_other_warnings_are_printed_as_python_does(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_answer", lambda _: warnings.warn("something else", stacklevel=1))
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *one: sys.stderr.write(warnings.formatwarning(*one[:4])))
        _, _, err = run(capsys, "backends")
    assert "test_cli.py:" in err and "UserWarning: something else" in err
    assert warnings.formatwarning is before


def test_debug_shows_the_traceback():
    with pytest.raises(registry.registry.UnknownNameError):
        cli.main(["--debug", "explain", "rmsnrom"])


def test_backends_shows_the_grid_and_every_reason(capsys, install):
    install(FakeEntryPoint("bad", RuntimeError("the sky fell")))
    code, out, _ = run(capsys, "backends")
    assert code == 0
    assert all(component in out for component in registry.components())
    grid = out.split("\n\n")[0].splitlines()
    assert [line.split()[-1] for line in grid[: -len(registry.components())]] == [
        name for name, status in registry.backends().items() if status.backend
    ]
    assert max(map(len, grid)) <= 80, "the grid does not fit a terminal of 80 columns"
    assert "broken" in out
    assert "the sky fell" in out
    assert "RuntimeError" in run(capsys, "backends", "--traceback")[1]


def test_backends_as_data(capsys):
    record = json.loads(run(capsys, "backends", "--json")[1])
    assert record["reference"]["state"] == "ok"
    assert "attention" in record["reference"]["components"]


def test_components_shows_contracts(capsys):
    assert "attention" in run(capsys, "components")[1]
    text = run(capsys, "components", "rmsnorm")[1]
    assert "rmsnorm(x" in text
    assert "https://arxiv.org/abs/1910.07467" in text
    assert "law rows" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dtype", "bflot16"), "unknown dtype 'bflot16': did you mean 'bfloat16'? known: bfloat16,"),
        (("--device", "cdua"), "unknown device 'cdua': did you mean 'cuda'? known: cpu, cuda"),
    ],
)
def test_explain_suggests_what_was_meant(capsys, words, message):
    code, _, err = run(capsys, "explain", "attention", *words)
    assert code == 1 and err.startswith(f"error: {message}")


def test_explaining_a_refusal_is_no_success(capsys):
    code, out, _ = run(capsys, "explain", "attention", "--backend", "attention=heap_bpe")
    assert code == 1 and "attention: an error would be raised" in out


def test_explain_on_a_machine_without_cuda(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, out, _ = run(capsys, "explain", "attention", "--device", "cuda")
    assert code == 0
    assert "attention: reference" in out
    assert "This machine has no CUDA device" in out
