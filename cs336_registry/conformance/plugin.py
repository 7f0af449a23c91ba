"""The pytest plugin: the options and fixtures of the conformance kit.

pytest loads this in every session of an environment where the package is installed, so it imports nothing beyond pytest
until one of its options, fixtures or tests is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

DEFAULT_BACKEND = "reference"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cs336", "conformance of cs336_registry backends")
    group.addoption(
        "--cs336-backend",
        action="append",
        metavar="NAME",
        help="backend to judge; may be repeated or a comma list, 'all' for every one that is available",
    )
    group.addoption(
        "--cs336-audit", action="store_true", help="run unclaimed cases too and say which claims could be made"
    )
    group.addoption("--cs336-strict", action="store_true", help="fail where a case is skipped as unclaimed")
    group.addoption(
        "--cs336-components",
        metavar="NAMES",
        help="comma list of components, 'all' for every one (default: what the backend provides)",
    )
    group.addoption("--cs336-dtypes", metavar="NAMES", help="comma list of dtypes (default: all)")
    group.addoption("--cs336-seed", type=int, default=0, metavar="N", help="seed of every drawn argument (default: 0)")
    group.addoption(
        "--cs336-seeds",
        type=int,
        default=1,
        metavar="N",
        help="repeat what depends on the numbers with N seeds, from --cs336-seed on: the search for false alarms",
    )
    group.addoption("--cs336-json", metavar="PATH", help="write a JSON record of every check")


@dataclass(frozen=True)
class Settings:
    """The options, read and checked."""

    backends: tuple[str, ...]
    components: tuple[str, ...]
    dtypes: tuple[str, ...] | None
    audit: bool
    strict: bool
    seed: int
    seeds: int


_settings_key = pytest.StashKey[Settings]()


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.cs336_backend or option.cs336_json or option.cs336_audit:
        settings = settings_of(config)
        if not hasattr(config, "workerinput"):
            from .record import Record

            config.pluginmanager.register(Record(settings, option.cs336_json), "cs336_record")


def settings_of(config: pytest.Config) -> Settings:
    """The session's settings; the first use loads the registry and prepares this process for the backends."""
    if _settings_key not in config.stash:
        config.stash[_settings_key] = _read(config)
    return config.stash[_settings_key]


def _read(config: pytest.Config) -> Settings:
    from .. import registry
    from ..errors import RegistryError
    from .subject import names_of, prepare_interpreter, provides, spare_worker

    spare_worker()
    option = config.option
    if option.cs336_seeds < 1:
        raise pytest.UsageError(f"--cs336-seeds is {option.cs336_seeds}: give the number of seeds to try, 1 or more")
    try:
        wanted = [name.strip() for item in option.cs336_backend or [DEFAULT_BACKEND] for name in item.split(",")]
        backends = names_of(wanted, tuple(registry.backends()), "backend")
        prepare_interpreter(backends)
        known_components = registry.components()
        components = tuple(name for name in known_components if any(provides(backend, name) for backend in backends))
        if option.cs336_components:
            components = names_of(option.cs336_components.split(","), known_components, "component")
        known = sorted({dtype for name in components for dtype in registry.contract(name).dtypes})
        dtypes = names_of(option.cs336_dtypes.split(","), known, "dtype") if option.cs336_dtypes else None
    except RegistryError as error:
        raise pytest.UsageError(str(error)) from error
    for name in backends:
        status = registry.backends()[name]
        if name in wanted and (status.state != "ok" or status.backend is None):
            raise pytest.UsageError(f"backend {name!r} can't be judged: {status.state}: {status.reason}")
    judged = tuple(name for name in backends if (status := registry.backends()[name]).state == "ok" and status.backend)
    return Settings(
        judged, components, dtypes, option.cs336_audit, option.cs336_strict, option.cs336_seed, option.cs336_seeds
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    settings = config.stash.get(_settings_key, None)
    if settings is None:
        return None
    last = settings.seed + settings.seeds - 1
    seeds = f"seed {settings.seed}" if settings.seeds == 1 else f"seeds {settings.seed} to {last}"
    return f"cs336: backends {', '.join(settings.backends)}; {seeds}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With several backends, every test that depends on the backend runs once for each."""
    if "cs336_backend" in metafunc.fixturenames:
        backends = settings_of(metafunc.config).backends
        if len(backends) > 1:
            metafunc.parametrize("cs336_backend", sorted(backends), indirect=True, scope="session")


@pytest.fixture(scope="session")
def cs336_backend(request: pytest.FixtureRequest) -> str:
    """The name of the backend under test."""
    return getattr(request, "param", settings_of(request.config).backends[0])


@pytest.fixture
def implementation_of(cs336_backend: str, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """`implementation_of("attention")` is the backend's own callable; the test is skipped where there is none."""
    from contextlib import ExitStack

    from .subject import find, gpu_lock

    refuse = pytest.fail if settings_of(request.config).strict else pytest.skip
    with ExitStack() as locks:

        def load(component: str) -> Any:
            subject = find(cs336_backend, component)
            if subject.claims is None:
                refuse(subject.reason)
            locks.enter_context(gpu_lock(subject.device))
            return subject.load()

        yield load
