"""The process-wide registry: discovery once, choices by layer, the callable handed out.

State is three things: what discovery found (immutable, replaced whole by `refresh`), the `--backend` layer, and the
`use()` layers (a context variable, so threads and tasks do not see each other's).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .errors import (
    ConfigurationError,
    ContractError,
    FallbackWarning,
    UnavailableError,
    UnknownNameError,
    suggestion,
)
from .selection import Layer, parse

if TYPE_CHECKING:
    from .component import Component
    from .decision import Candidates, Composite, Decision
    from .plugin import Discovery, PluginStatus

DEFAULT_BACKEND = "reference"
VARIABLES = ("CS336_BACKEND", "CS336_BLOCK")
"""The environment variables of the core; backends may declare more in their manifests."""

_lock = threading.RLock()
_used: ContextVar[tuple[str, ...]] = ContextVar("cs336_registry_use", default=())
_command_line: str | None = None
_discovery: Discovery | None = None
_candidates: Candidates | None = None
_project: Mapping[str, Any] | None = None
_chosen: dict[tuple[Any, ...], Any] = {}
_loaded: dict[tuple[str, str], Callable[..., Any]] = {}
_broken: dict[tuple[str, str], str] = {}
"""(component, backend) -> how the implementation failed to load: what `get` could not load, `resolve` passes over."""
_announced: set[tuple[str, str, str]] = set()


def get(component: str, *, backend: str | None = None, device: Any = None, dtype: Any = None) -> Any:
    """The callable that serves `component`: the function or class itself, chosen now, with no cost per call.

    backend: a selector such as "triton" or "attention=triton" that goes before every other layer. device, dtype: what
    the callable will be used with, as text or as torch objects; a backend that does not claim them is passed over. A
    composite component (`transformer_lm`) comes with its parts already chosen. Raises UnknownNameError, SelectorError,
    UnavailableError, and TracingError inside torch.compile.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        from .tracing import refuse

        refuse(component)
    key = (component, backend, device, dtype, _used.get(), _command_line, *map(os.environ.get, VARIABLES))
    found = _chosen.get(key)
    return found if found is not None else _choose(key, component, backend, device, dtype)


def resolve(
    component: str,
    *,
    backend: str | None = None,
    device: Any = None,
    dtype: Any = None,
    gradient: bool | None = None,
    compile: bool | None = None,
    features: Iterable[str] = (),
    sizes: Mapping[str, int] | None = None,
) -> Decision:
    """The Decision that `get` would act on, without importing the backend's code."""
    from .decision import Request, resolve
    from .machine import detect

    request = Request(
        component=component,
        device=_text(device, "torch.device"),
        dtype=_text(dtype, "torch."),
        gradient=gradient,
        compile=compile,
        features=tuple(features),
        sizes=dict(sizes or {}),
    )
    candidates = _find_candidates()
    _check_environment()
    return resolve(request, detect(), candidates, layers(backend), _composite(component))


def explain(component: str, **request: Any) -> str:
    """What would happen and why, as text: the decision or the refusal, every rejected candidate, and this machine's
    limits.
    """
    from .machine import detect

    try:
        lines = [str(resolve(component, **request))]
    except UnavailableError as error:
        lines = [f"{component}: an error would be raised", f"  {error}"]
    machine = detect()
    if str(request.get("device") or "").startswith("cuda") and not machine.cuda_devices:
        lines.append(f"This machine has no CUDA device ({machine.cuda_problem}): tensors can't be made on cuda here.")
    lines.append("Layers, highest first:")
    lines += [f"  {layer.name}: {layer.selection}" for layer in layers(request.get("backend"))]
    return "\n".join(lines)


@contextlib.contextmanager
def use(selector: str) -> Iterator[None]:
    """Within the block, choose by `selector` (such as "triton,adamw=torch") before the command line and the
    environment.
    """
    _check_names("use()", selector)
    token = _used.set((selector, *_used.get()))
    try:
        yield
    finally:
        _used.reset(token)


def set_command_line(selector: str | None) -> None:
    """Set the `--backend` layer of this process; None removes it."""
    global _command_line
    if selector is not None:
        _check_names("--backend", selector)
    _command_line = selector


def operations(names: Iterable[str], *, backend: str | None = None) -> Mapping[str, Callable[..., Any]]:
    """The callables of several components at once, as an immutable mapping: what modules bind when they are built."""
    return MappingProxyType({name: get(name, backend=backend) for name in names})


def components() -> tuple[str, ...]:
    """The names of all components, in data-flow order, third parties' last."""
    return tuple(_discover().components)


def backends() -> Mapping[str, PluginStatus]:
    """Every plugin found, by name: ok, unavailable (and why), broken (and why) or blocked."""
    return _discover().plugins


def contract(component: str) -> Component:
    """The contract of `component`."""
    from .plugin import load

    targets = _discover().components
    if component not in targets:
        raise UnknownNameError("component", component, targets)
    return load(targets[component])


def layers(backend: str | None = None) -> tuple[Layer, ...]:
    """The layers that decide now, highest first."""
    found = [("argument", backend), *(("use()", selector) for selector in _used.get())]
    found += [("--backend", _command_line), ("CS336_BACKEND", os.environ.get("CS336_BACKEND"))]
    found += [("pyproject.toml", _project_table().get("backend")), ("default", DEFAULT_BACKEND)]
    return tuple(Layer(name, parse(selector)) for name, selector in found if selector)


def refresh() -> None:
    """Forget what was found and chosen: after installing a plugin, or after editing pyproject.toml."""
    global _discovery, _candidates, _project
    with _lock:
        _discovery = _candidates = _project = None
        _chosen.clear()
        _loaded.clear()
        _broken.clear()
        _announced.clear()


def _choose(key: tuple[Any, ...], component: str, backend: str | None, device: Any, dtype: Any) -> Any:
    """The slow path of `get`: resolve, load, check the signature; a preferred backend that fails to load is passed
    over.
    """
    from .decision import Request, resolve
    from .machine import detect

    with _lock:
        candidates = _find_candidates()
        _check_environment()
        request = Request(component=component, device=_text(device, "torch.device"), dtype=_text(dtype, "torch."))
        composite = _composite(component)
        while True:
            decision = resolve(request, detect(), candidates, layers(backend), composite)
            chosen = (decision, *decision.parts)
            if all(_loads(one) for one in chosen):
                break
        for one in chosen:
            _announce(one)
        found = _load(decision)
        if decision.parts:
            parts = {part.component: _load(part) for part in decision.parts}
            found = functools.partial(found, ops=MappingProxyType(parts))
        _chosen[key] = found
        return found


def _loads(decision: Decision) -> bool:
    """Whether what a decision names can be loaded; where nothing else may serve, the error is raised instead."""
    try:
        _load(decision)
    except Exception as error:
        if decision.demanded or decision.parts or decision.backend == DEFAULT_BACKEND:
            raise
        _broken[decision.component, decision.backend] = f"broken: {type(error).__name__}: {error}"
        return False
    return True


def _load(decision: Decision) -> Callable[..., Any]:
    """The callable of a decision, its signature held against the contract."""
    from .plugin import load

    key = (decision.backend, decision.component)
    if key not in _loaded:
        found = load(decision.target)
        described = contract(decision.component)
        mismatch = described.signature_mismatch(found)
        if mismatch is not None:
            raise ContractError(
                f"{decision.target} does not keep the contract of {decision.component!r}: {mismatch}. "
                f"Wanted: {decision.component}({', '.join(map(str, described.parameters.values()))})"
            )
        _loaded[key] = found
    return _loaded[key]


def _announce(decision: Decision) -> None:
    """Tell the watchers of every new decision, and the user, once, of a preference that was not met."""
    mark = (decision.component, decision.backend, decision.preferred)
    if mark in _announced:
        return
    _announced.add(mark)
    _discover().manager.hook.cs336_decision(decision=decision)
    if decision.preferred:
        reasons = "; ".join(r.reason for r in decision.rejected if r.backend == decision.preferred)
        warnings.warn(
            f"{decision.component}: {decision.preferred} was preferred ({reasons}), {decision.backend} serves instead. "
            f"To raise an error instead, write '{decision.component}={decision.preferred}'; to silence this, choose "
            f"'{decision.component}={decision.backend}'",
            FallbackWarning,
            stacklevel=4,
        )


def _discover() -> Discovery:
    global _discovery
    found = _discovery
    if found is None:
        from .machine import detect
        from .plugin import discover

        with _lock:
            found = _discovery
            if found is None:
                blocked = [name.strip() for name in os.environ.get("CS336_BLOCK", "").split(",") if name.strip()]
                found = _discovery = discover(detect(), (*_project_table().get("block", ()), *blocked))
    return found


def _find_candidates() -> Candidates:
    global _candidates
    if _candidates is None:
        from .decision import Candidates

        with _lock:
            found = _discover()
            _candidates = Candidates(found.plugins, tuple(found.components), _auto_order(), _broken)
    return _candidates


def _composite(component: str) -> Composite | None:
    """How the core builds `component` from others; None where it doesn't."""
    from .decision import Composite

    described = contract(component)
    return Composite(described.composite, described.composed_of) if described.composed_of else None


def _auto_order() -> Mapping[str, Mapping[str, list[str]]]:
    import tomllib

    return tomllib.loads(Path(__file__).with_name("auto_order.toml").read_text())


def _check_names(layer: str, selector: str) -> None:
    from .decision import check_names

    check_names(Layer(layer, parse(selector)), _find_candidates())


def _check_environment() -> None:
    known = {*VARIABLES, *_discover().environment}
    for name in os.environ:
        if name.startswith("CS336_") and name not in known:
            raise ConfigurationError(f"unknown environment variable {name}: {suggestion(name, known)}")


def _project_table() -> Mapping[str, Any]:
    """[tool.cs336] of the nearest pyproject.toml at or above the working directory; empty where there is none."""
    global _project
    if _project is None:
        folder = Path.cwd()
        _project = {}
        for path in (parent / "pyproject.toml" for parent in (folder, *folder.parents)):
            if path.is_file():
                _project = _read_project(path)
                break
    return _project


def _read_project(path: Path) -> Mapping[str, Any]:
    import tomllib

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("cs336", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} can't be read: {error}") from error
    known = {"backend": str, "block": list}
    for key, value in table.items():
        if key not in known:
            raise ConfigurationError(f"unknown key {key!r} in [tool.cs336] of {path}: {suggestion(key, known)}")
        if not isinstance(value, known[key]):
            raise ConfigurationError(f"[tool.cs336] {key} = {value!r} in {path}: expected a {known[key].__name__}")
    return table


def _text(value: Any, prefix: str) -> str | None:
    """A torch dtype or device, or text, as plain text: torch.float32 -> "float32"."""
    return None if value is None else str(value).removeprefix(prefix)
