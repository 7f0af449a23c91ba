"""What is judged: one component of one backend, with its claims, or the reason why there is nothing to judge."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import registry
from ..component import Component
from ..decision import COMPOSED, Decision
from ..machine import Machine, detect
from ..plugin import Backend, Implementation
from .trial import Trial


@dataclass(frozen=True, kw_only=True)
class Subject:
    """`claims` is None where the backend has nothing to say about the component; `reason` tells why."""

    backend: str
    component: str
    claims: Implementation | None = None
    reason: str = ""

    @property
    def device(self) -> str:
        """Where its tensors live: a GPU where there is one and it is claimed, the CPU otherwise."""
        assert self.claims is not None
        tensors = bool(registry.contract(self.component).dtypes)
        return "cuda" if tensors and detect().cuda_devices and "cuda" in self.claims.devices else "cpu"

    @property
    def place(self) -> str:
        """The device as a claim names it: "interpreter" where a GPU's kernels are interpreted on CPU tensors."""
        assert self.claims is not None
        interpreted = bool(registry.contract(self.component).dtypes) and "cpu" not in self.claims.devices
        return "interpreter" if self.device == "cpu" and interpreted else self.device

    def decision(self) -> Decision:
        """The Decision that serves it; AssertionError where anything else than this backend would run."""
        decision = registry.resolve(self.component, backend=f"{self.backend}!")
        ran = {part.backend for part in decision.parts} if decision.backend == COMPOSED else {decision.backend}
        assert ran == {self.backend}, f"{self.component}: asked for {self.backend}, would run {', '.join(sorted(ran))}"
        return decision

    def trial(self, folder: Path, seed: int) -> Trial:
        """Where and with which numbers it is judged."""
        return Trial(folder=folder, seed=seed, device=self.device, origin=("backend", self.backend))

    def load(self) -> Callable[..., Any]:
        """The callable that the registry hands out for this backend, and for no other."""
        self.decision()
        return registry.get(self.component, backend=f"{self.backend}!", device=self.device)


@functools.cache
def find(backend: str, component: str) -> Subject:
    """The subject that `backend` and `component` name. Raises UnknownNameError where either does not exist."""
    status = registry.backends().get(backend)
    contract = registry.contract(component)
    if status is None:
        registry.resolve(component, backend=f"{backend}!")
        raise AssertionError(f"the registry serves {component} from {backend!r}, which it does not list")
    if status.state != "ok" or status.backend is None:
        return Subject(backend=backend, component=component, reason=f"{backend} is {status.state}: {status.reason}")
    claims = status.backend.implementation(component)
    if claims is not None:
        return Subject(backend=backend, component=component, claims=claims)
    if not contract.composed_of:
        return Subject(backend=backend, component=component, reason=f"{backend} does not provide {component}")
    missing = [part for part in contract.composed_of if status.backend.implementation(part) is None]
    if missing:
        reason = f"{backend} does not provide {component}, nor {', '.join(missing)} to compose it from"
        return Subject(backend=backend, component=component, reason=reason)
    return Subject(backend=backend, component=component, claims=_composed_claims(contract, status.backend))


def provides(backend: str, component: str) -> bool:
    """Whether `backend` brings the component, or every part that the core composes it from; available or not."""
    manifest = registry.backends()[backend].backend
    if manifest is None:
        return False
    parts = registry.contract(component).composed_of or (component,)
    return manifest.implementation(component) is not None or all(map(manifest.implementation, parts))


def _composed_claims(contract: Component, backend: Backend) -> Implementation:
    """What the core's own composition can do over this backend's parts: what all of them can."""
    parts = [part for name in contract.composed_of if (part := backend.implementation(name)) is not None]

    def common(names: Sequence[str], attribute: str) -> tuple[str, ...]:
        return tuple(name for name in names if all(name in getattr(part, attribute) for part in parts))

    return Implementation(
        component=contract.name,
        target=contract.composite,
        dtypes=common(contract.dtypes, "dtypes"),
        devices=common(("cpu", "cuda", "interpreter"), "devices"),
        gradient=all(part.gradient for part in parts),
        deterministic=all(part.deterministic for part in parts),
        thread_safe=all(part.thread_safe for part in parts),
        process_safe=all(part.process_safe for part in parts),
        features=contract.features,
    )


def names_of(wanted: Sequence[str], known: Sequence[str], kind: str) -> tuple[str, ...]:
    """Names from options that may repeat and hold comma lists; "all" stands for every known name."""
    from ..errors import UnknownNameError

    names: list[str] = []
    for name in (part.strip() for item in wanted for part in item.split(",")):
        if name == "all":
            names += known
        elif name in known:
            names.append(name)
        else:
            raise UnknownNameError(kind, name, [*known, "all"])
    return tuple(dict.fromkeys(names))


def prepare_interpreter(backends: Sequence[str], machine: Machine | None = None) -> bool:
    """Switch Triton's interpreter on where a backend under test claims it and no GPU is there; True where it was done.

    Triton reads the variable when it is imported, so this must come first.
    """
    machine = machine or detect()
    if machine.cuda_devices or machine.triton_interpreter or "triton" in sys.modules:
        return False
    manifests = [registry.backends()[name].backend for name in backends if name in registry.backends()]
    claimed = any(
        "interpreter" in one.devices for manifest in manifests if manifest for one in manifest.implementations
    )
    if claimed and "TRITON_INTERPRET" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"
        registry.refresh()
        find.cache_clear()
        return True
    return False


def spare_worker() -> None:
    """In a pytest-xdist worker, one thread a process: the workers share the cores. Call it before importing torch."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@contextmanager
def gpu_lock(device: str) -> Iterator[None]:
    """Workers of one machine take turns on its GPU, and leave it empty: `-n auto` must not run out of its memory."""
    if device != "cuda" or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    import torch
    from filelock import FileLock

    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    with FileLock(Path(tempfile.gettempdir()) / f"cs336-gpu-{user}.lock"):
        yield
        torch.cuda.empty_cache()
