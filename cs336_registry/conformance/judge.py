"""From a check to a pytest outcome: claimed checks must pass, the others are skipped, audited or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .. import registry
from ..machine import detect
from .checks import Check, checks
from .plugin import Settings, settings_of
from .subject import find, gpu_lock
from .trial import Trial


def parameters(metafunc: pytest.Metafunc) -> None:
    """Parametrise `test_<group>(backend, check, ...)` over the settings' backends and components, ids sorted."""
    settings = settings_of(metafunc.config)
    group = metafunc.function.__name__.removeprefix("test_")
    several = len(settings.backends) > 1
    found: dict[str, tuple[str, Check]] = {}
    for backend in settings.backends:
        for component in settings.components:
            for check in checks(registry.contract(component)):
                if check.group == group and _wanted(check, settings):
                    found[f"{backend}-{check.id}" if several else check.id] = (backend, check)
    ids = sorted(found)
    metafunc.parametrize(("backend", "check"), [found[name] for name in ids], ids=ids)


def _wanted(check: Check, settings: Settings) -> bool:
    return settings.dtypes is None or check.dtype is None or check.dtype in settings.dtypes


def judge(request: pytest.FixtureRequest, backend: str, check: Check, folder: Path) -> None:
    """Run `check` on `backend` as its claims and the session's settings say; the outcome is recorded on the test."""
    settings = settings_of(request.config)
    subject = find(backend, check.contract.name)
    properties: dict[str, Any] = {"backend": backend, "component": check.contract.name, "group": check.group}
    properties |= {"subject": check.subject.id if check.subject else "", "dtype": check.dtype or "", "unclaimed": []}
    request.node.user_properties.append(("cs336", properties))
    if subject.claims is None:
        properties["unclaimed"] = [subject.reason]
        _refuse(subject.reason, settings)
    assert subject.claims is not None
    properties["device"] = subject.device
    unclaimed = check.unclaimed(subject.claims, detect(), subject.device)
    unjudged = _marks(backend, check)
    if unjudged:
        properties["unclaimed"] = unjudged
        _refuse("; ".join(unjudged), settings)
    if unclaimed:
        properties["unclaimed"] = unclaimed
        if not settings.audit:
            _refuse("; ".join(unclaimed), settings)
        reason = f"not claimed ({'; '.join(unclaimed)}): if it passes, you support this, claim it"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=settings.strict))
    properties["decision"] = subject.decision().fingerprint
    with gpu_lock(subject.device):
        check.run(subject.load(), subject.claims, Trial(folder=folder, seed=settings.seed, device=subject.device))


def _marks(backend: str, check: Check) -> list[str]:
    """Why the backend's own plugin says that a claimed check can't be judged on this machine."""
    from ..plugin import call

    subject = check.subject.id if check.subject else ""
    arguments = {"component": check.contract.name, "case": subject, "dtype": check.dtype or ""}
    return call(registry._discover().manager, backend, "cs336_conformance_mark", **arguments)


def _refuse(reason: str, settings: Settings) -> None:
    """Skip an unclaimed check, or fail it where the session is strict."""
    if settings.strict:
        pytest.fail(f"skipped checks are failures under --cs336-strict: {reason}", pytrace=False)
    pytest.skip(reason)
