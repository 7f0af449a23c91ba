"""`torchrun -m cs336_registry.cli train` as a user starts it, and as a cluster kills it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cs336_registry.pipeline.errors import RunError
from cs336_registry.pipeline.metrics import of_kind, read_metrics
from cs336_registry.pipeline.process_group import ProcessGroup
from cs336_registry.pipeline.stopping import stop_between_steps

from .conftest import TINY
from .test_parallel import assert_same_weights, losses, together

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SETTINGS = ["training.steps=150", "checkpoint.every=9", "evaluation.every=50", "parallel.strategy=fsdp"]
PATIENCE = 300.0  # seconds: a busy machine may take one to import torch in three processes


@pytest.fixture
def launch(corpus_path, tmp_path):
    """launch(out, settings) starts two processes and gives torchrun's and the file of what all print."""
    started = []

    def start(out, settings):
        settings = [*TINY, f'data.train="{corpus_path}"', "data.validation_fraction=0.2", *settings]
        command = [*LAUNCH, "-m", "cs336_registry.cli", "train", "quickstart", "--out", str(out)]
        command += [word for setting in settings for word in ("--set", setting)]
        printed = tmp_path / f"printed-{len(started)}.txt"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(printed, "w") as file:
            started.append(psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
        return started[-1], printed

    yield start
    for process in started:
        kill_all(process)


def kill_all(process):
    """At once, as a power cut does it; the processes that torchrun started are no group with it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in (process, *process.children()):
            each.kill()
    process.wait()


def wait_for_step(process, printed, out, wanted):
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        rows = of_kind(read_metrics(out / "metrics.jsonl"), "step")
        if rows and rows[-1]["step"] >= wanted:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {wanted} was not reached: {printed.read_text()}")


@pytest.mark.slow
def test_killed_in_every_way_the_run_is_the_same(tiny, launch, tmp_path):
    """The job without warning, one process without warning, and a cluster's SIGTERM."""
    out = tmp_path / "killed"
    process, printed = launch(out, SETTINGS)
    wait_for_step(process, printed, out, 15)
    kill_all(process)

    process, printed = launch(out, SETTINGS)
    wait_for_step(process, printed, out, 45)
    process.children()[1].kill()
    assert process.wait(timeout=PATIENCE) != 0
    assert (
        len(
            re.findall(
                r"^error: rank \d of 2 lost the other processes .*; the checkpoint of step \d+ is kept\. Run the",
                printed.read_text(),
                re.M,
            )
        )
        == 1
    )

    process, printed = launch(out, SETTINGS)
    wait_for_step(process, printed, out, 80)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=PATIENCE)
    step = int(re.search(r"^stopped at step (\d+); the same command continues", printed.read_text(), re.M)[1])
    assert (out / "checkpoints" / f"step-{step:08d}" / "shards").is_dir() and step < 150

    together(tiny(*SETTINGS), out)
    together(tiny(*SETTINGS), tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")
    assert_same_weights(out, tmp_path / "whole")


@pytest.mark.slow
def test_what_all_processes_refuse_is_said_once(launch, tmp_path):
    process, printed = launch(tmp_path / "run", ["parallel.strategie=fsdp"])
    assert process.wait(timeout=PATIENCE) != 0
    words = r"^error: .*unknown key 'parallel.strategie': did you mean 'strategy'"
    assert len(re.findall(words, printed.read_text(), re.M)) == 1, printed.read_text()


def test_a_process_that_is_left_alone_says_so_before_sigterm_ends_it():
    """torchrun sends SIGTERM as soon as it sees that another process is gone."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            pytest.raises(RunError, match=r"rank 0 of 2 lost the other processes .*; step 5 is kept\. Run the same"),
            ProcessGroup(0, 2).in_contact(lambda: "step 5 is kept"),
            stop_between_steps(),
        ):
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
