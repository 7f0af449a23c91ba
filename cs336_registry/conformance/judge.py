"""From a check to a pytest outcome: claimed checks must pass, the others are skipped, audited or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .. import registry
from ..machine import detect
from .checks import Check, best_dtype, checks
from .plugin import Settings, settings_of
from .subject import Subject, find, gpu_lock


def parameters(metafunc: pytest.Metafunc) -> None:
    """Parametrise `test_<group>(backend, check, ...)` over the settings' backends and components, ids sorted."""
    settings = settings_of(metafunc.config)
    group = metafunc.function.__name__.removeprefix("test_")
    several = len(settings.backends) > 1
    found: dict[str, tuple[str, Check]] = {}
    for backend in settings.backends:
        for component in settings.components:
            for check in checks(registry.contract(component)):
                if check.group == group and _wanted(check, settings) and not _repeats_parts(check, backend):
                    found[f"{backend}-{check.id}" if several else check.id] = (backend, check)
    ids = sorted(found)
    metafunc.parametrize(("backend", "check"), [found[name] for name in ids], ids=ids)


def _wanted(check: Check, settings: Settings) -> bool:
    return settings.dtypes is None or check.dtype is None or check.dtype in settings.dtypes


def _repeats_parts(check: Check, backend: str) -> bool:
    """Whether a check of what the core composes would ask again what was asked of the parts.

    The core's own composition is judged in full over the reference's parts, and every part of this backend by itself,
    in every dtype and layout. What is left is how they fit together: every case in one dtype, the first case in all.
    """
    claims, contract = find(backend, check.contract.name).claims, check.contract
    if claims is None or claims.target != contract.composite or backend == registry.DEFAULT_BACKEND:
        return False
    if check.subject not in contract.cases[1:]:
        return False
    return check.group not in ("case", "gradient") or check.dtype != best_dtype(contract, claims)


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
    properties["device"] = subject.place
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
        properties["seeds"] = _run(check, subject, folder, settings)


def _run(check: Check, subject: Subject, folder: Path, settings: Settings) -> int:
    """Run `check` with every seed of the session that could matter to it; how many those were."""
    assert subject.claims is not None
    implementation, first = subject.load(), subject.trial(folder, settings.seed)
    seeds = settings.seeds if settings.seeds > 1 and check.depends_on(first, subject.claims) else 1
    for seed in range(settings.seed, settings.seed + seeds):
        try:
            check.run(implementation, subject.claims, subject.trial(folder, seed))
        except BaseException as error:
            error.add_note(f"again with: --cs336-seed={seed}")
            raise
    return seeds


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
