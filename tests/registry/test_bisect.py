"""Finding the component that breaks a command."""

from __future__ import annotations

import sys

import pytest

from cs336_registry.cli import main
from cs336_registry.cli.bisect import first_breaking

NAMES = list("abcdefgh")


@pytest.mark.parametrize("culprit", NAMES)
def test_finds_the_one(culprit):
    runs = []

    def breaks(swapped):
        runs.append(swapped)
        return culprit in swapped

    assert first_breaking(NAMES, breaks) == [culprit]
    assert len(runs) <= 6


@pytest.mark.parametrize("pair", [("a", "b"), ("a", "h"), ("c", "f")])
def test_finds_two_that_break_only_together(pair):
    assert first_breaking(NAMES, lambda swapped: set(pair) <= set(swapped)) == list(pair)


def test_refuses_what_cannot_be_bisected():
    with pytest.raises(ValueError, match="breaks with the good backend already"):
        first_breaking(NAMES, lambda swapped: True)
    with pytest.raises(ValueError, match="works with all of a, b"):
        first_breaking(["a", "b"], lambda swapped: False)


def test_the_command(capfd, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, cs336_registry as r\n"
        "sys.exit(r.resolve('rmsnorm').backend == 'torch')  # stands for a run that rmsnorm=torch breaks\n"
    )
    names = [word for name in ("silu", "rmsnorm", "softmax") for word in ("--components", name)]
    with pytest.raises(SystemExit) as stopped:
        main(["bisect", "--good", "reference", "--bad", "torch", *names, "--", sys.executable, str(script)])
    assert not stopped.value.code
    out = capfd.readouterr().out
    assert "rmsnorm: swapping it from reference to torch breaks the command" in out
    assert "breaks  reference,silu=torch,rmsnorm=torch,softmax=torch" in out


def test_unknown_backends_and_empty_commands(capfd):
    for words in (["--bad", "nonesuch", "--", "true"], ["--bad", "torch"]):
        with pytest.raises(SystemExit) as stopped:
            main(["bisect", *words])
        assert stopped.value.code == 1
    err = capfd.readouterr().err
    assert "unknown backend" in err
    assert "no command to run" in err
