"""Tables of configurations, and the tuning that is done only on request."""

from __future__ import annotations

import json

import pytest
import torch

CUDA = torch.device("cuda", 0)


@pytest.fixture
def configurations():
    from cs336_triton import configurations

    return configurations


@pytest.fixture
def tuning(configurations, monkeypatch, tmp_path):
    """CS336_TRITON_TUNE=1 on a pretended card whose candidates take as many milliseconds as they have warps."""
    timed = []

    def time_candidates(candidates, run):
        for candidate in candidates:
            run(candidate)
            timed.append(candidate.num_warps)
        return sorted(((candidate.num_warps, candidate) for candidate in candidates), key=lambda row: row[0])

    monkeypatch.setenv("CS336_TRITON_TUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configurations, "_tuned_rows", {})
    monkeypatch.setattr(configurations, "_can_time", lambda device: True)
    monkeypatch.setattr(configurations, "card", lambda device: None)
    monkeypatch.setattr(configurations, "time_candidates", time_candidates)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (test)")
    return timed


def choose(configurations, *, warps=(8, 2, 4), bucket="d128", **changes):
    of = configurations.Configuration.of
    options = {
        "default": lambda card: of(1, BLOCK=16),
        "candidates": lambda card: [of(count, BLOCK=64) for count in warps],
        "run": lambda chosen: None,
    }
    return configurations.configuration("attention_forward", CUDA, torch.bfloat16, bucket, **{**options, **changes})


def test_without_the_variable_nothing_is_timed(configurations, tuning, monkeypatch, tmp_path):
    monkeypatch.setattr(configurations, "card", lambda device: configurations.Card((8, 9), 100, 100_000))
    for value in ("", "0"):
        monkeypatch.setenv("CS336_TRITON_TUNE", value)
        assert choose(configurations).num_warps == 1
    monkeypatch.delenv("CS336_TRITON_TUNE")
    assert choose(configurations).num_warps == 1
    assert not tuning and not list(tmp_path.iterdir())


def test_any_other_value_is_an_error(configurations, monkeypatch):
    monkeypatch.setenv("CS336_TRITON_TUNE", "yes")
    with pytest.raises(ValueError, match="CS336_TRITON_TUNE is 'yes': set it to 1"):
        configurations.tuning_requested()


def test_the_winner_is_timed_once_and_kept_on_disk(configurations, tuning, monkeypatch, tmp_path):
    assert choose(configurations).num_warps == 2 and tuning == [8, 2, 4]
    assert choose(configurations).num_warps == 2 and len(tuning) == 3
    (path,) = (tmp_path / "cs336_registry" / "triton").iterdir()
    assert path.name.startswith("NVIDIA_H200__test_-") and path.suffix == ".json"
    # A new process reads the file.
    monkeypatch.setattr(configurations, "_tuned_rows", {})
    assert choose(configurations).num_warps == 2 and len(tuning) == 3
    assert choose(configurations, bucket="d64").num_warps == 2 and len(tuning) == 6
    assert {row["bucket"] for row in json.loads(path.read_text())} == {"d128", "d64"}


def test_a_winner_that_is_no_candidate_any_more_is_replaced(configurations, tuning):
    choose(configurations)
    assert choose(configurations, warps=(8, 4)).num_warps == 4


def test_winners_of_other_processes_stay(configurations, tuning, monkeypatch, tmp_path):
    choose(configurations)
    other = configurations._tuned_rows
    monkeypatch.setattr(configurations, "_tuned_rows", {next(iter(other)): {}})
    choose(configurations, bucket="d64")
    (path,) = (tmp_path / "cs336_registry" / "triton").iterdir()
    assert {row["bucket"] for row in json.loads(path.read_text())} == {"d128", "d64"}


@pytest.mark.parametrize("content", ["{", '[{"kernel": "attention_forward"}]', "[1]"])
def test_a_spoilt_cache_is_named(configurations, tuning, tmp_path, content):
    choose(configurations)
    (path,) = (tmp_path / "cs336_registry" / "triton").iterdir()
    path.write_text(content)
    configurations._tuned_rows.clear()
    with pytest.raises(ValueError, match=r"NVIDIA_H200.*is not a table of configurations.*delete it"):
        choose(configurations)


@pytest.mark.parametrize("failure", ["shared memory", "pass", "other"])
def test_candidates_that_do_not_fit_are_left_out(configurations, monkeypatch, failure):
    import triton.testing
    from triton.runtime.errors import OutOfResources

    error = {
        "shared memory": OutOfResources(300_000, 232_448, "shared memory"),
        "pass": RuntimeError("PassManager::run failed"),
        "other": RuntimeError("CUDA error: an illegal memory access was encountered"),
    }[failure]

    def run(chosen):
        if chosen.num_warps == 8:
            raise error

    def do_bench(call, return_mode):
        call()
        return next(milliseconds)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    candidates = [configurations.Configuration.of(count) for count in (4, 8, 2)]
    milliseconds = iter((3.0, 1.0))
    if failure == "other":
        with pytest.raises(RuntimeError, match="illegal memory access"):
            configurations.time_candidates(candidates, run)
        return
    timed = configurations.time_candidates(candidates, run)
    assert [(time, chosen.num_warps) for time, chosen in timed] == [(1.0, 2), (3.0, 4)]
    with pytest.raises(RuntimeError, match="none of the candidate configurations runs"):
        configurations.time_candidates(candidates[1:2], run)


def test_the_interpreter_has_nothing_to_time(configurations, monkeypatch):
    monkeypatch.setenv("CS336_TRITON_TUNE", "1")
    assert not configurations._can_time(torch.device("cpu"))


def test_a_card_without_a_table_uses_the_defaults(configurations, monkeypatch, tmp_path):
    monkeypatch.setattr(configurations, "TABLES", tmp_path / "absent")
    configurations.table.cache_clear()
    assert configurations.table((9, 0)) == {}
    configurations.table.cache_clear()


def test_tables_survive_writing_and_reading(configurations, monkeypatch, tmp_path):
    chosen = {("rope", "float16", "d64"): configurations.Configuration.of(8, 3, HEADS=2, PERSISTENT=True)}
    configurations.write_json(tmp_path / "sm_90.json", {"rows": configurations.write_rows(chosen)})
    assert [path.name for path in tmp_path.iterdir()] == ["sm_90.json"]
    monkeypatch.setattr(configurations, "TABLES", tmp_path)
    configurations.table.cache_clear()
    assert configurations.table((9, 0)) == chosen
    configurations.table.cache_clear()
