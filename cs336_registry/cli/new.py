"""`cs336 new`: a working plugin distribution to start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..component import Component

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "{component} for cs336_registry"
requires-python = ">=3.11"
dependencies = ["cs336-registry"]

[project.entry-points.cs336_registry]
{name} = "{package}"

[tool.hatch.build.targets.wheel]
packages = ["{package}"]
"""

MANIFEST = '''\
"""The backend `{name}`. Importing this imports no framework: it only says what there is and what it claims."""

from cs336_registry.plugin import Backend, Implementation, hookimpl


@hookimpl
def cs336_backend() -> Backend:
    return Backend(
        name="{name}",
        summary="what is special about it, in a line",
        requires=("torch",),
        implementations=(
            Implementation(
                component="{component}",
                target="{package}.{component}:{component}",
                # Claim what you mean to keep, and no more: unclaimed cases are skipped, claimed ones must pass.
                dtypes=("float32",),
                devices=("cpu",),
                gradient={gradient},
            ),
        ),
    )
'''

IMPLEMENTATION = '''\
"""{summary}: {formula}."""

from __future__ import annotations

from cs336_registry.components.{component} import check, contract


def {component}({signature}):
    check({checked})
    # Plain PyTorch, so that everything passes before you begin. Put your own implementation here.
    return contract.oracle({passed})
'''

TEST = '''\
"""The contract's own checks, against this backend: cases, gradients, laws, error cases, layouts, determinism."""

import subprocess
import sys


def test_{name}_keeps_the_contract():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "cs336_registry.conformance"]
    subprocess.run([*command, "--cs336-backend={name}"], check=True)
'''

BENCHMARK = '''\
"""{component} against the reference: judged first, timed afterwards, in interleaved rounds."""

import sys

from cs336_registry.cli import main

main(["bench", "{component}", "--backends", "reference", "--backends", "{name}", *sys.argv[1:]])
'''

README = """\
# {distribution}

A backend of cs336_registry that provides `{component}`.

    uv pip install -e .
    cs336 backends                                  # a column `{name}`
    cs336 conformance {name}                        # or: pytest
    python benchmarks/{component}.py
    CS336_BACKEND={name} python your_training_script.py
"""


def new(name: str, /, *, component: str = "rmsnorm", out: Path | None = None) -> int:
    """Write a working plugin distribution: one component, its conformance test and its benchmark.

    Example: `cs336 new mine --component softmax`, then `uv pip install -e cs336-mine` and `cs336 conformance mine`.

    Parameters
    ----------
    name
        The backend's name: lower-case letters, digits and underscores, such as mine.
    component
        The component to begin with, one that has gradients.
    out
        The folder to write, which must not exist; ./cs336-NAME by default.
    """
    files = distribution(name, component)
    folder = out or Path(f"cs336-{name.replace('_', '-')}")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: choose another folder with --out")
    from ..text.files import write_text

    for path, content in files.items():
        write_text(folder / path, content)
    print(f"wrote {folder}: {', '.join(files)}\nnext: uv pip install -e {folder} && cs336 conformance {name}")
    return 0


def distribution(name: str, component: str) -> dict[str, str]:
    """Relative path -> content of every file. Raises ValueError for a name or component that can't be one."""
    import re

    import cs336_registry as registry

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "auto" or name in registry.backends():
        raise ValueError(
            f"{name!r} can't name a new backend: lower-case letters, digits and _, a letter first, not taken"
        )
    contract = registry.contract(component)
    # What has gradients has an oracle that is called as the component is: plain PyTorch to begin with.
    usable = [one for one in registry.components() if _is_differentiable_op(registry.contract(one))]
    if component not in usable:
        raise ValueError(f"{component!r} is no differentiable op; start from one of {', '.join(usable)}")
    facts = {
        "name": name,
        "distribution": f"cs336-{name.replace('_', '-')}",
        "package": f"cs336_{name}",
        "component": component,
        "summary": contract.summary[:1].upper() + contract.summary[1:],
        "formula": contract.formula,
        "gradient": True,
        **_calls(component),
    }
    package = facts["package"]
    return {
        "pyproject.toml": PYPROJECT.format(**facts),
        "README.md": README.format(**facts),
        f"{package}/__init__.py": MANIFEST.format(**facts),
        f"{package}/{component}.py": IMPLEMENTATION.format(**facts),
        "tests/test_conformance.py": TEST.format(**facts),
        f"benchmarks/{component}.py": BENCHMARK.format(**facts),
    }


def _is_differentiable_op(contract: Component) -> bool:
    return contract.kind == "op" and bool(contract.differentiable) and contract.observe is None


def _calls(component: str) -> dict[str, str]:
    """The component's signature without annotations, and how its check and its oracle are called."""
    import inspect

    import cs336_registry as registry

    from ..plugin import load

    contract = registry.contract(component)
    check = load(f"{contract.signature.__module__}:check")
    bare = inspect.Signature([p.replace(annotation=p.empty) for p in contract.parameters.values()])
    keyword = {p.name for p in contract.parameters.values() if p.kind is p.KEYWORD_ONLY}

    def call(names) -> str:
        return ", ".join(f"{name}={name}" if name in keyword else name for name in names)

    checks = inspect.signature(check).parameters
    passed = ", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in checks.values())
    return {"signature": str(bare)[1:-1], "checked": passed, "passed": call(contract.parameters)}
