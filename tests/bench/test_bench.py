"""A speed is printed for a right result only, and says what ran, where and how it was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import cs336_registry as registry
from cs336_registry.bench import report, roofline, rows, runner, tables
from cs336_registry.cli import main
from cs336_registry.conformance import answering

WRONG = """
from cs336_registry.plugin import Backend, Implementation, hookimpl

def rmsnorm(x, weight, eps=1e-5):
    return x            # as fast as can be, and wrong

@hookimpl
def cs336_backend():
    claim = Implementation(component="rmsnorm", target="wrong_backend:rmsnorm", dtypes=("float32",), gradient=True)
    return Backend(name="wrong", summary="wrong but fast", implementations=(claim,))
"""
RMSNORM = {"component": "rmsnorm", "workload": "256x512", "dtype": "float32", "rounds": 2}


@pytest.fixture
def wrong_backend(tmp_path, monkeypatch):
    """A distribution on the path of this process and of the workers it starts."""
    (tmp_path / "wrong_backend.py").write_text(WRONG)
    info = tmp_path / "wrong_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cs336_registry]\nwrong = wrong_backend\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    registry.refresh()
    yield
    monkeypatch.undo()
    registry.refresh()


def test_a_wrong_but_fast_backend_gets_no_speed(wrong_backend):
    said: list[str] = []
    found = runner.run(runner.Plan(backends=("reference", "wrong"), **RMSNORM), say=said.append)
    refused = [row for row in found if row["backend"] == "wrong"]
    assert len(refused) == 1
    assert "seconds" not in refused[0]
    assert refused[0]["refused"].startswith("case[rmsnorm-")
    assert re.match("rmsnorm wrong: no speed, the result is not right: case", said[0])
    assert {row["direction"] for row in found if row["backend"] == "reference"} == {"forward", "backward", "both"}


def test_the_command_fails_where_a_result_is_wrong(wrong_backend, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "rmsnorm", "--backends", "wrong", "--workload", "256x512", "--rounds", "1"])
    assert stopped.value.code == 1
    assert "no speed" in capsys.readouterr().out


def test_a_row_says_what_ran(tmp_path):
    limits = roofline.Roofline(1e10, 1e10)
    found = runner.run(runner.Plan(backends=("torch",), **RMSNORM), limits)
    for row in found:
        assert row["decision"]["backend"] == "torch"
        assert row["decision"]["demanded"]
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
        assert row["share_of_limit"] == pytest.approx(row["bytes_per_second"] / 1e10)
        assert row["peak_memory"] > 0
        assert row["versions"]["torch"]
        assert row["machine"]
        assert row["date"]
    rows.append(found, tmp_path / "rows.jsonl")
    rows.append(found, tmp_path / "rows.jsonl")
    assert list(rows.read(tmp_path)) == json.loads(json.dumps([*found, *found]))


def test_what_cannot_run_here_is_named_and_has_no_row(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    said: list[str] = []
    assert runner.run(runner.Plan(backends=("triton",), **RMSNORM), say=said.append) == []
    assert "an interpreter's timings mean nothing" in said[0]


def test_a_dead_worker_is_a_refusal(monkeypatch):
    monkeypatch.setattr(answering, "sys", type("Python", (), {"executable": "/bin/false"}))
    found = runner.run(runner.Plan(backends=("reference",), **RMSNORM), say=lambda line: None)
    assert "ended with code 1" in found[0]["refused"]


def test_text_components_are_timed_too():
    component = "tokenizer"
    workload = runner.workloads(component, "cpu")[0].id
    plan = runner.Plan(component=component, workload=workload, backends=("reference",), rounds=1)
    (row,) = runner.run(plan)
    assert row["seconds"] > 0


def test_a_broken_row_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{oops\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2 is not JSON"):
        list(rows.read(tmp_path))


def made_up(backend: str, seconds: float, **more) -> dict:
    return {
        "benchmark": "component",
        "component": "rmsnorm",
        "workload": "256x512",
        "dtype": "float32",
        "device": "cpu",
        "direction": "both",
        "backend": backend,
        "seconds": seconds,
        "machine": "a machine",
    } | more


def test_tables_are_rendered_between_markers_and_staleness_is_seen(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- rows: component_speeds -->\nold\n<!-- end rows -->\nafter\n")
    found = [made_up("reference", 2e-3), made_up("torch", 1e-3)]
    assert tables.stale(page, found)
    page.write_text(tables.rendered(page.read_text(), found))
    assert not tables.stale(page, found)
    assert "| rmsnorm | 256x512 | cpu, float32 | 2 ms | 1 ms (2.00x) |" in page.read_text()
    assert page.read_text().startswith("before\n")
    with pytest.raises(ValueError, match="unknown table 'nonesuch'"):
        tables.rendered("<!-- rows: nonesuch -->\n<!-- end rows -->", found)


def test_what_has_no_tables_is_not_fresh(tmp_path):
    page, found = tmp_path / "README.md", [made_up("reference", 2e-3)]
    with pytest.raises(FileNotFoundError, match=r"there is no file .*README\.md: go to a clone of the repository, or"):
        tables.stale(page, found)
    page.write_text("another project's\n")
    with pytest.raises(ValueError, match=r"README\.md has no table: go to .*<!-- rows: NAME -->.* of bpe_training,"):
        tables.stale(page, found)


def test_tables_of_a_gpu_compare_within_a_run_and_show_losers():
    place = {"benchmark": "triton_ops", "workload": "8x9", "direction": "both", "dtype": "bfloat16", "machine": "card"}
    place |= {"component": "softmax", "limit": "copy", "share_of_limit": 0.5, "commit": "new", "timing": "graph"}
    found = [
        {**place, "backend": "triton", "seconds": 9.0, "commit": "old"},
        {**place, "backend": "torch", "seconds": 9.0, "commit": "old"},
        {**place, "backend": "triton", "seconds": 2e-3},
        {**place, "backend": "liger", "seconds": 1e-3},
        {**place, "backend": "quack", "absent": "ModuleNotFoundError"},
        {**place, "backend": "triton", "seconds": 1e-3, "workload": "9x9", "timing": "calls"},
    ]
    lines = tables.gpu_ops(found).splitlines()
    assert lines[2:] == [
        "| softmax | 8x9 | both | 2 ms | 50% of copy |  |  | 0.50x |  |  |  |  |  |",
        "| softmax | 9x9, called | both | 1 ms | 50% of copy |  |  |  |  |  |  |  |  |",
    ]
    place = {"benchmark": "training_step", "workload": "tinyx2", "dtype": "bfloat16", "device": "cuda"}
    place |= {"flops_per_second": 1e12, "matmul_flops_per_second": 4e12, "peak_memory": 2e9, "commit": "new"}
    found = [
        {**place, "backend": "liger", "seconds": 2.0, "tokens_per_second": 1000.0, "commit": "old"},
        {**place, "backend": "triton", "seconds": 2.0, "tokens_per_second": 1000.0},
        {**place, "backend": "torch", "seconds": 1.0, "tokens_per_second": 2000.0},
        {**place, "backend": "torch", "device": "cpu", "seconds": 0.1, "tokens_per_second": 20000.0},
    ]
    assert tables.gpu_steps(found).splitlines()[2:] == [
        "| tinyx2 | `torch` | 2,000 | 25.0% | 2.0 GB | new |",
        "| tinyx2 | `triton` | 1,000 | 25.0% | 2.0 GB | new |",
    ]


def test_growth_has_a_picture_for_each_text_of_several_sizes_and_leaves_out_what_failed():
    def row(text, megabytes, backend, **more):
        place = {"benchmark": "bpe_training", "text": text, "corpus": f"{text} {megabytes} MB", "backend": backend}
        return place | {"bytes": megabytes * 1_000_000, "vocab_size": 1000, "machine": "a machine"} | more

    found = [row("novels", size, "numba_bpe", seconds=size / 30, peak_memory=10**8) for size in (1, 10, 100)]
    found += [row("mixed", 10, "rustbpe", seconds=2.0, peak_memory=10**8), row("mixed", 20, "bpeasy", error="killed")]
    page = report.page(found)
    assert page.count("<svg") == 1
    assert "BPE training: novels, vocabulary of 1,000" in page
    assert "text in MB" in page
    assert "unique pretokens" not in page
    assert "no speed: killed" in page
    found = [one | {"unique_pretokens": one["bytes"] // 100} for one in found]
    assert "unique pretokens in thousands" in report.page(found)


def test_encoding_shows_the_fastest_entry_point_of_each_library():
    def row(backend, seconds):
        speeds = {"seconds": seconds, "megabytes_per_second": 20 / seconds, "peak_memory": 10**8}
        return {"benchmark": "encoding", "corpus": "novels 32k", "mode": "1 thread, warm", "backend": backend} | speeds

    found = [row("numba_bpe", 0.1), row("gigatoken", 0.4), row("gigatoken_files", 0.2)]
    assert tables.fastest_encoders(found)["novels 32k", "1 thread, warm"]["gigatoken"]["seconds"] == 0.2
    page = report.page(found)
    assert page.count("<svg") == 1
    assert "novels 32k 1 thread, warm" in page


def test_the_readmes_tables_are_fresh():
    root = Path(__file__).parents[2]
    assert not tables.stale(root / "README.md", list(rows.read(root / "benchmarks" / "results")))


def test_the_report_loads_nothing_and_shows_losers(tmp_path):
    limits = {"share_of_limit": 0.5, "limit": "copy", "peak_memory": 10**6, "seconds_low": 1e-3, "seconds_high": 3e-3}
    page = report.page(
        [made_up("reference", 2e-3, **limits), made_up("torch", 1e-3), made_up("bad", 0.0, refused="case[x] <b>")]
    )
    assert page.count("<svg") == 3
    assert "no speed: case[x] &lt;b&gt;" in page
    assert not re.search(r'(src|href)\s*=\s*"?https?:', page)
