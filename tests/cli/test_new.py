"""A stranger's backend: written by `cs336 new`, built as a wheel, installed elsewhere, judged, uninstalled."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from cs336_registry.cli import main
from cs336_registry.cli.new import distribution


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return stopped.value.code or 0


@pytest.mark.parametrize("name", ["auto", "reference", "My", "1st", "a-b"])
def test_a_name_that_cannot_be_is_refused(name, capsys):
    assert run("new", name) == 1
    assert f"{name!r} can't name a new backend" in capsys.readouterr().err


def test_a_component_without_a_plain_oracle_is_refused(capsys):
    assert run("new", "mine", "--component", "tokenizer") == 1
    assert "start from one of embedding, linear" in capsys.readouterr().err


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    assert run("new", "mine", "--out", str(tmp_path)) == 1
    assert "exists already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("component", ["embedding", "rmsnorm", "rope", "attention", "linear_cross_entropy"])
def test_what_is_written_is_python(component):
    for path, content in distribution("mine", component).items():
        if path.endswith(".py"):
            compile(content, path, "exec")


@pytest.mark.slow
def test_built_installed_judged_and_uninstalled(tmp_path):
    """In an environment of its own, which sees this one's libraries, so that torch is not downloaded again."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert run("new", "mine", "--component", "silu", "--out", str(tmp_path / "source")) == 0
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=tmp_path / "source", check=True)
    (wheel,) = (tmp_path / "source" / "dist").glob("*.whl")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    found = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    pth = Path(found.stdout.strip()) / "libraries.pth"
    pth.write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages()))

    def backends() -> dict:
        code = "from cs336_registry.cli import main; main(['backends', '--json'])"
        return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert "mine" not in backends()
    install = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python, wheel]
    subprocess.run(install, check=True)
    assert backends()["mine"]["components"] == ["silu"]
    tests = subprocess.run(
        [python, "-m", "pytest", "-q", tmp_path / "source" / "tests"], capture_output=True, text=True
    )
    assert "1 passed" in tests.stdout, tests.stdout + tests.stderr
    subprocess.run([uv, "pip", "uninstall", "--quiet", "--python", python, "cs336-mine"], check=True)
    assert "mine" not in backends()
