"""What a plugin is: an entry point in group "cs336_registry" that names a module with pluggy hooks.

The manifest (`cs336_backend`) is data: importing it must import no framework. Each plugin is loaded by itself, so one
that fails becomes one row of `cs336 backends` and nothing else changes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import traceback as traceback_module
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from .components import BUILTIN
from .errors import ContractError, suggestion

if TYPE_CHECKING:
    from .decision import Decision
    from .machine import Machine

GROUP = "cs336_registry"
API_VERSION = 1
OWN_DISTRIBUTION = "cs336-registry"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128"),
)
DEVICES = ("cpu", "cuda", "interpreter")


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One component of a backend: where it is, and what it claims. A claim not made is a case not run."""

    component: str
    target: str
    """"module:name" of the callable; imported when it is first chosen."""
    dtypes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    """"cpu", "cuda", or "interpreter" (CPU tensors while Triton's interpreter is on)."""
    gradient: bool = False
    compile: bool = False
    """Traces under torch.compile(fullgraph=True)."""
    deterministic: bool = False
    """The same input gives the same bits."""
    thread_safe: bool = False
    """Several threads of a process may call it at once."""
    process_safe: bool = False
    """Several processes of a machine may call it at once: what it keeps on disk is theirs together."""
    features: tuple[str, ...] = ()
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Inclusive ranges of named sizes, such as {"head_dim": (16, 256)}."""
    requires: tuple[str, ...] = ()
    """Importable packages this component needs beyond the backend's."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A backend's manifest."""

    name: str
    summary: str
    implementations: tuple[Implementation, ...]
    requires: tuple[str, ...] = ()
    """Importable packages that every component needs."""
    cure: str = ""
    """What to type when a required package is missing."""
    environment: tuple[str, ...] = ()
    """CS336_* variables that this backend reads."""
    api_version: int = API_VERSION

    def implementation(self, component: str) -> Implementation | None:
        return next((one for one in self.implementations if one.component == component), None)


class HookSpecs:
    """The hooks a plugin may implement. They run while plugins are found and choices made, never in a forward pass."""

    @hookspec
    def cs336_backend(self) -> Backend:  # type: ignore[empty-body]
        """The manifest of the plugin's backend."""

    @hookspec
    def cs336_components(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Extra components: name -> "module:contract"."""

    @hookspec
    def cs336_probe(self, machine: Machine) -> str | None:
        """Why the backend can't run on `machine`, with the cure, in a sentence; None when it can."""

    @hookspec
    def cs336_conformance_mark(self, component: str, case: str, dtype: str) -> str | None:
        """Why a conformance case that is claimed can't be judged here; None to run it."""

    @hookspec
    def cs336_decision(self, decision: Decision) -> None:
        """Called once for every new decision."""


State = Literal["ok", "unavailable", "broken", "blocked"]


@dataclass(frozen=True)
class PluginStatus:
    """A row of `cs336 backends`."""

    name: str
    state: State
    reason: str = ""
    traceback: str = ""
    backend: Backend | None = None
    distribution: str = ""
    version: str = ""


@dataclass(frozen=True)
class Discovery:
    """Everything found, immutable."""

    plugins: Mapping[str, PluginStatus]
    components: Mapping[str, str]
    """Component name -> "module:contract", in data-flow order, extra ones last."""
    manager: pluggy.PluginManager

    @property
    def environment(self) -> frozenset[str]:
        """The CS336_* variables that the backends declare."""
        return frozenset(name for p in self.plugins.values() if p.backend for name in p.backend.environment)


def discover(
    machine: Machine,
    blocked: Collection[str] = (),
    entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
) -> Discovery:
    """Find every plugin, each guarded by itself; `blocked` names are not imported."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(HookSpecs)
    found = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    plugins: dict[str, PluginStatus] = {
        name: PluginStatus(name, "blocked", "blocked by name; not installed") for name in blocked
    }
    components = dict(BUILTIN)
    loaded: list[str] = []
    for name, entries in _grouped(found).items():
        entry, *others = entries
        distribution, version = _origin(entry)
        if name in blocked:
            plugins[name] = PluginStatus(name, "blocked", "blocked by name", "", None, distribution, version)
            continue
        if others and distribution != OWN_DISTRIBUTION:
            plugins[name] = PluginStatus(name, "broken", _clash(name, entries), "", None, distribution, version)
            continue
        for other in others:
            row = f"{name} ({_origin(other)[0]})"
            plugins[row] = PluginStatus(row, "broken", _clash(name, entries), "", None, *_origin(other))
        try:
            _register(manager, name, entry.load())
            components.update(_extra_components(manager, name, components))
            loaded.append(name)
        except Exception as error:
            # Any exception at all: a stranger's plugin must not take the others with it. The row keeps its traceback.
            _unregister(manager, name)
            reason = str(error) if isinstance(error, ContractError) else f"{type(error).__name__}: {error}"
            plugins[name] = PluginStatus(
                name, "broken", reason, traceback_module.format_exc(), None, distribution, version
            )
            continue
        plugins[name] = PluginStatus(name, "ok", distribution=distribution, version=version)
    for name in loaded:
        plugins[name] = _status(manager, plugins[name], machine, components)
        if plugins[name].state == "broken":
            _unregister(manager, name)
    return Discovery(MappingProxyType(plugins), MappingProxyType(components), manager)


def call(manager: pluggy.PluginManager, plugin_name: str, hook: str, **arguments: Any) -> list[Any]:
    """The results of one plugin's `hook`; empty where it does not implement it."""
    others = [plugin for name, plugin in manager.list_name_plugin() if name != plugin_name]
    return manager.subset_hook_caller(hook, remove_plugins=others)(**arguments)


def load(target: str) -> Any:
    """The object at "module:name"."""
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def missing_package(packages: Iterable[str]) -> str | None:
    """The first of `packages` that can't be imported, found without importing it."""
    return next((package for package in packages if importlib.util.find_spec(package) is None), None)


def _grouped(found: Iterable[importlib.metadata.EntryPoint]) -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Entry points by name, our own distribution first; the same (name, value) found twice counts once."""
    groups: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
    for entry in sorted(found, key=lambda e: (e.name, _origin(e)[0] != OWN_DISTRIBUTION, _origin(e)[0], e.value)):
        groups.setdefault(entry.name, {}).setdefault(entry.value, entry)
    return {name: list(values.values()) for name, values in groups.items()}


def _origin(entry: importlib.metadata.EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist is not None else ("", "")


def _clash(name: str, entries: list[importlib.metadata.EntryPoint]) -> str:
    origins = " and ".join(f"{_origin(entry)[0] or 'unknown'} ({entry.value})" for entry in entries)
    return f"{len(entries)} distributions provide backend {name!r}: {origins}; uninstall one or rename its entry point"


def _register(manager: pluggy.PluginManager, name: str, plugin: Any) -> None:
    manager.register(plugin, name=name)
    known = {hook for hook in vars(HookSpecs) if hook.startswith("cs336_")}
    for caller in manager.get_hookcallers(plugin) or []:
        if caller.name not in known:
            raise ContractError(
                f"implements hook {caller.name!r}, which does not exist: {suggestion(caller.name, known)}"
            )
    # A function that looks like a hook and lacks the marker would be ignored without a word.
    marked = {caller.name for caller in manager.get_hookcallers(plugin) or []}
    for attribute in sorted(set(vars(plugin)) - marked):
        if attribute.startswith("cs336_") and isinstance(getattr(plugin, attribute), Callable):
            raise ContractError(f"defines {attribute!r} without @hookimpl: add the marker, or rename it")


def _unregister(manager: pluggy.PluginManager, name: str) -> None:
    if manager.get_plugin(name) is not None:
        manager.unregister(name=name)


def _extra_components(manager: pluggy.PluginManager, name: str, known: Mapping[str, str]) -> dict[str, str]:
    extra: dict[str, str] = {}
    for mapping in call(manager, name, "cs336_components"):
        for component, target in dict(mapping).items():
            _check_name("component", component)
            if component in known:
                raise ContractError(
                    f"adds component {component!r}, which exists already ({known[component]}): choose another name"
                )
            extra[component] = _check_target(component, target)
    return extra


def _status(
    manager: pluggy.PluginManager, status: PluginStatus, machine: Machine, components: Mapping[str, str]
) -> PluginStatus:
    """`status` completed with the manifest, or with why there is none."""
    try:
        manifests = call(manager, status.name, "cs336_backend")
        if not manifests:
            return replace(status, reason="hooks only, no backend")
        backend = _checked(manifests[0], status.name, components)
        package = missing_package(backend.requires)
        if package is not None:
            reason = f"{package} is not installed" + (
                f"; {backend.cure}" if backend.cure else f"; pip install {package}"
            )
            return replace(status, state="unavailable", reason=reason, backend=backend)
        reasons = call(manager, status.name, "cs336_probe", machine=machine)
    except Exception as error:
        reason = str(error) if isinstance(error, ContractError) else f"{type(error).__name__}: {error}"
        return replace(status, state="broken", reason=reason, traceback=traceback_module.format_exc())
    if reasons:
        return replace(status, state="unavailable", reason=reasons[0], backend=backend)
    return replace(status, backend=backend)


def _checked(backend: Any, name: str, components: Mapping[str, str]) -> Backend:
    if not isinstance(backend, Backend):
        raise ContractError(
            f"cs336_backend returned a {type(backend).__name__}: return a cs336_registry.plugin.Backend"
        )
    if backend.api_version != API_VERSION:
        raise ContractError(
            f"was written for plugin API {backend.api_version}, this is {API_VERSION}: install a matching version"
        )
    if backend.name != name:
        raise ContractError(f"calls itself {backend.name!r} but its entry point is named {name!r}: give both one name")
    _check_name("backend", name)
    seen: set[str] = set()
    for implementation in backend.implementations:
        if implementation.component not in components:
            raise ContractError(
                f"claims unknown component {implementation.component!r}: "
                f"{suggestion(implementation.component, components)}"
            )
        if implementation.component in seen:
            raise ContractError(f"claims component {implementation.component!r} twice: keep one")
        seen.add(implementation.component)
        _check_claims(implementation)
        _check_target(implementation.component, implementation.target)
    return backend


def _check_name(kind: str, name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "auto":
        raise ContractError(
            f"{kind} name {name!r} is not allowed: lower-case letters, digits and _, a letter first, and not 'auto'"
        )


def _check_claims(implementation: Implementation) -> None:
    """A misspelt claim is never judged, and looks as if it had been."""
    for kind, claimed, known in (("dtype", implementation.dtypes, DTYPES), ("device", implementation.devices, DEVICES)):
        for name in claimed:
            if name not in known:
                raise ContractError(
                    f"claims unknown {kind} {name!r} for {implementation.component!r}: {suggestion(name, known)}"
                )


def _check_target(component: str, target: str) -> str:
    if not isinstance(target, str) or not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise ContractError(f'gives {target!r} for {component!r}: write "module:name"')
    return target
