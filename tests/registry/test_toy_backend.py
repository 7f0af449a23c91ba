"""A backend from outside the repository: one file, its own distribution, no change to the core."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).parents[1] / "fixtures" / "toy_backend"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The toy distribution, built as a wheel and installed by uv into a folder of its own."""
    folder = tmp_path_factory.mktemp("toy")
    source = shutil.copytree(TOY, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    command = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--python", sys.executable, "--target", folder / "site", source], check=True)
    return folder / "site"


def run(code: str, installed: Path, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(installed), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    ).stdout


def test_it_appears_in_the_grid(installed):
    out = run("from cs336_registry.cli import main; main(['backends', '--json'])", installed)
    toy = json.loads(out)["toy"]
    assert toy == {
        "state": "ok",
        "reason": "",
        "distribution": "toy-backend",
        "version": "0.1.0",
        "components": ["rmsnorm"],
    }


def test_installing_it_changes_no_choice(installed):
    code = "import cs336_registry as r; print(r.resolve('rmsnorm').backend)"
    assert run(code, installed).strip() == "reference"


def test_it_is_used_when_asked_for(installed):
    code = (
        "import cs336_registry as r, torch; f = r.get('rmsnorm'); print(f.__module__, f(torch.ones(4), torch.ones(4)))"
    )
    assert run(code, installed, CS336_BACKEND="toy").split()[0] == "toy_backend"


def test_it_passes_the_contract(installed, tmp_path):
    code = (
        "import cs336_registry as r\n"
        "from cs336_registry.arguments import ArgumentMaker\n"
        "from cs336_registry.compare import assert_within\n"
        "contract, rmsnorm = r.contract('rmsnorm'), r.get('rmsnorm', backend='toy!')\n"
        "for case in contract.cases:\n"
        "    a, t = (contract.arguments(case, ArgumentMaker(3, dtype=d)) for d in ('float32', 'float64'))\n"
        "    assert_within(rmsnorm(**a), contract.oracle(**t), contract.oracle(**a), contract.tolerance)\n"
        "for law in contract.laws: law.check(rmsnorm, ArgumentMaker(3))\n"
        "print(len(contract.cases))"
    )
    assert int(run(code, installed)) >= 5
