"""Options and marks of this repository's tests; the fixtures come from the package's own pytest plugin."""

from __future__ import annotations

import pytest

from cs336_registry.conformance.subject import spare_worker

# Before any test module imports torch, which reads the number of threads once.
spare_worker()


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
