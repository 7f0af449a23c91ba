"""A run that is killed without warning, several times, ends with the losses and weights of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cs336_registry.pipeline import training
from cs336_registry.pipeline.metrics import of_kind, read_metrics
from cs336_registry.pipeline.progress import Progress

from .test_training import assert_same_run

TRAIN = """
import json, sys
from pathlib import Path
from cs336_registry.pipeline import configuration, training
from cs336_registry.pipeline.progress import Progress
content = json.loads(Path(sys.argv[1]).read_text())
training.train(configuration.from_dict(content), Path(sys.argv[2]), progress=Progress(quiet=True))
"""


def steps_written(out: Path) -> int:
    rows = of_kind(read_metrics(out / "metrics.jsonl"), "step")
    return rows[-1]["step"] if rows else 0


@pytest.mark.slow
def test_killing_at_random_steps_changes_nothing(tiny, tmp_path):
    configuration = tiny("training.steps=400", "checkpoint.every=9", "evaluation.every=100")
    (tmp_path / "configuration.json").write_text(json.dumps(configuration.to_dict()))
    training.train(configuration, tmp_path / "whole", progress=Progress(quiet=True))

    generator, out = random.Random(0), tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed_at = []
    for target in (generator.randint(10, 120), generator.randint(150, 300)):
        process = subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(tmp_path / "configuration.json"), str(out)], env=environment
        )
        while process.poll() is None and steps_written(out) < target:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        killed_at.append(steps_written(out))
    assert all(step < 400 for step in killed_at), killed_at
    training.train(configuration, out, progress=Progress(quiet=True))
    assert_same_run(out, tmp_path / "whole")
