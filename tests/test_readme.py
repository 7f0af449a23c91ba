"""The README's script runs as printed (with fewer steps), and its tables and commands are real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cs336_registry import cli

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_script_of_thirty_lines_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    script = max(blocks, key=len)
    assert len(script.splitlines()) <= 30
    shorter, replaced = re.subn(r"steps := \d+", "steps := 12", script)
    assert replaced == 1
    (tmp_path / "script.py").write_text(shorter)
    result = subprocess.run(
        [sys.executable, "-W", "error", "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5, "twelve steps learn the commonest tokens"
    assert "def " in result.stdout


def test_every_command_named_exists():
    for line in re.findall(
        r"^    (?:.*&& uv run )?cs336 ([a-z][a-z -]+)", README.read_text(encoding="utf-8"), re.MULTILINE
    ):
        words = line.split()
        assert " ".join(words[:2]) in cli.commands() or words[0] in cli.commands(), f"cs336 {line}"
