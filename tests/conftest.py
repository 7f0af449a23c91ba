"""Options and marks of this repository's tests; the fixtures come from the package's own pytest plugin."""

from __future__ import annotations

import os

import pytest

from cs336_registry.conformance.subject import spare_worker
from cs336_registry.errors import UnavailableError
from cs336_registry.machine import detect

# Both are read once, when torch and Triton are imported, so they must be set before any test module does that: one
# thread in each worker, and without a GPU Triton's interpreter, so that the kernels' tests run in any order.
spare_worker()
if not detect().cuda_devices:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cs336")
    group.addoption(
        "--backend",
        action="append",
        dest="cs336_backend",
        metavar="NAME",
        help="the same as --cs336-backend: the backend that the tests run against (default: reference)",
    )
    group.addoption(
        "--update-snapshots", action="store_true", help="write tests/_snapshots anew with the reference, in float64"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cs336_backend" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.backend)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """A test that demands the backend under test is skipped where that backend does not claim the component."""
    try:
        return (yield)
    except UnavailableError as error:
        if "cs336_backend" in pyfuncitem.fixturenames and "it does not provide" in str(error):
            pytest.skip(str(error))
        raise
