from __future__ import annotations

from cs336_registry.pipeline.metrics import MetricsLog, of_kind, read_metrics


def test_rows_come_back_in_order(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.append("step", step, loss=1 / 3)
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 1 / 3
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_a_resumed_run_replaces_the_rows_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.append("step", step, loss=step)
    log.append("resume", 2)
    log.append("step", 3, loss=30)
    log.close()
    assert [row["loss"] for row in of_kind(read_metrics(path), "step")] == [1, 2, 30]


def test_a_line_cut_short_is_dropped_and_nothing_is_glued_to_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1, "loss": 1}\n{"kind": "step", "step": 2, "lo')
    log = MetricsLog(path)
    log.append("resume", 1)
    log.append("step", 2, loss=2)
    log.close()
    assert [row["step"] for row in of_kind(read_metrics(path), "step")] == [1, 2]
