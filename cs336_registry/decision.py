"""Choosing: a pure function from what is wanted and what there is to a Decision that can be stored and explained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .errors import UnavailableError, UnknownNameError
from .machine import Machine
from .plugin import Implementation, PluginStatus
from .selection import AUTO, Choice, Layer, Selection

COMPOSED = "composed"
"""The backend named in the decision of a composite component that the core builds from resolved parts."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a component is wanted for. None means "don't care": no claim is asked for."""

    component: str
    device: str | None = None
    dtype: str | None = None
    gradient: bool | None = None
    compile: bool | None = None
    features: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """A backend that was considered and why it was not taken."""

    backend: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which backend serves a component, which layer decided, and why the others did not."""

    component: str
    backend: str
    target: str
    layer: str
    demanded: bool
    version: str = ""
    preferred: str = ""
    """The backend that was preferred and could not serve, where that happened."""
    rejected: tuple[Rejection, ...] = ()
    parts: tuple[Decision, ...] = ()
    """The decisions of the parts, for a composite component."""

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change when other code would run."""
        identity = "|".join(
            (self.component, self.backend, self.target, self.version, *(p.fingerprint for p in self.parts))
        )
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for checkpoints, tokenizers and benchmark rows."""
        record = asdict(self) | {"fingerprint": self.fingerprint}
        return record | {"parts": [part.to_dict() for part in self.parts]}

    def __str__(self) -> str:
        return "\n".join(self._lines(""))

    def _lines(self, indent: str) -> list[str]:
        verb = "demanded" if self.demanded else "preferred" if not self.preferred else "serves instead"
        lines = [f"{indent}{self.component}: {self.backend} ({verb}, decided by {self.layer}) -> {self.target}"]
        lines += [f"{indent}  not {rejection.backend}: {rejection.reason}" for rejection in self.rejected]
        for part in self.parts:
            lines += part._lines(indent + "  ")
        return lines


@dataclass(frozen=True)
class Candidates:
    """What there is to choose from."""

    plugins: Mapping[str, PluginStatus]
    components: tuple[str, ...]
    order: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """device -> component (or "*") -> backends, fastest first: what `auto` stands for."""
    broken: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """(component, backend) -> how the implementation failed to load: what could not be loaded is not chosen again."""


@dataclass(frozen=True)
class Composite:
    """The core's own implementation of a composite component, and the components it is built from."""

    target: str
    parts: tuple[str, ...]


def resolve(
    request: Request,
    machine: Machine,
    candidates: Candidates,
    layers: Sequence[Layer],
    composite: Composite | None = None,
) -> Decision:
    """The decision for `request`.

    Raises UnknownNameError for a component or backend that does not exist and UnavailableError where a demand can't be
    met.
    """
    if request.component not in candidates.components:
        raise UnknownNameError("component", request.component, candidates.components)
    rejected: list[Rejection] = []
    preferred = ""
    for layer in layers:
        check_names(layer, candidates)
        for choice in layer.selection.for_component(request.component):
            for name in _backends(choice, request, machine, candidates):
                reasons = _reasons(name, request, machine, candidates)
                if not reasons:
                    return _decision(name, request, candidates, layer, choice, preferred, rejected)
                if composite is not None and _lacks(name, request, candidates):
                    return _composed(composite, choice, request, machine, candidates, layer, layers, rejected)
                rejected += [Rejection(name, reason) for reason in reasons]
                if choice.demand:
                    raise UnavailableError(_refusal(choice, request, layer, rejected))
                preferred = preferred or (name if choice.backend != AUTO else "")
    raise UnavailableError(_refusal(None, request, layers[-1], rejected))


def rejections(implementation: Implementation, request: Request, machine: Machine) -> list[str]:
    """Every reason why `implementation` can't serve `request`; empty where it can."""
    reasons = []
    if request.dtype is not None and implementation.dtypes and request.dtype not in implementation.dtypes:
        reasons.append(
            f"dtype {request.dtype} is not among {', '.join(implementation.dtypes)}: convert, or choose another backend"
        )
    if request.device is not None and not _device_served(implementation, request.device, machine):
        cure = "; set TRITON_INTERPRET=1 to run it on the CPU" if "interpreter" in implementation.devices else ""
        reasons.append(f"device {request.device} is not among {', '.join(implementation.devices)}{cure}")
    if request.gradient and not implementation.gradient:
        reasons.append("it computes no gradient: use it under torch.no_grad(), or choose another backend for training")
    if request.compile and not implementation.compile:
        reasons.append("it does not trace under torch.compile(fullgraph=True): leave this component uncompiled")
    lacking = [feature for feature in request.features if feature not in implementation.features]
    if lacking:
        reasons.append(f"it does not claim {', '.join(lacking)}")
    for size, (low, high) in implementation.limits.items():
        if size in request.sizes and not low <= request.sizes[size] <= high:
            reasons.append(f"{size} {request.sizes[size]} is outside {low} to {high}")
    return reasons


def check_names(layer: Layer, candidates: Candidates) -> None:
    """Refuse a layer that names a backend or component that does not exist."""
    for choice in layer.selection.choices:
        if choice.backend != AUTO and choice.backend not in candidates.plugins:
            known = [*candidates.plugins, AUTO]
            raise UnknownNameError(f"backend (from {layer.name})", choice.backend, known)
        if choice.component is not None and choice.component not in candidates.components:
            raise UnknownNameError(f"component (from {layer.name})", choice.component, candidates.components)


def _device_served(implementation: Implementation, device: str, machine: Machine) -> bool:
    kind = device.partition(":")[0]
    return kind in implementation.devices or (
        kind == "cpu" and machine.triton_interpreter and "interpreter" in implementation.devices
    )


def _backends(choice: Choice, request: Request, machine: Machine, candidates: Candidates) -> Sequence[str]:
    if choice.backend != AUTO:
        return (choice.backend,)
    order = candidates.order.get((request.device or machine.device).partition(":")[0], {})
    ranked = order.get(request.component, order.get("*", ()))
    return [name for name in ranked if name in candidates.plugins]


def _reasons(name: str, request: Request, machine: Machine, candidates: Candidates) -> list[str]:
    if (request.component, name) in candidates.broken:
        return [candidates.broken[request.component, name]]
    status = candidates.plugins[name]
    if status.state != "ok":
        return [f"{status.state}: {status.reason}"]
    implementation = status.backend.implementation(request.component) if status.backend else None
    if implementation is None:
        return [f"it does not provide {request.component}"]
    return rejections(implementation, request, machine)


def _lacks(name: str, request: Request, candidates: Candidates) -> bool:
    backend = candidates.plugins[name].backend
    return candidates.plugins[name].state == "ok" and (
        backend is None or backend.implementation(request.component) is None
    )


def _decision(
    name: str,
    request: Request,
    candidates: Candidates,
    layer: Layer,
    choice: Choice,
    preferred: str,
    rejected: Sequence[Rejection],
) -> Decision:
    status = candidates.plugins[name]
    implementation = status.backend.implementation(request.component) if status.backend else None
    assert implementation is not None, "a candidate without reasons against it provides the component"
    return Decision(
        component=request.component,
        backend=name,
        target=implementation.target,
        layer=layer.name,
        demanded=choice.demand,
        version=status.version,
        preferred=preferred,
        rejected=tuple(rejected),
    )


def _composed(
    composite: Composite,
    choice: Choice,
    request: Request,
    machine: Machine,
    candidates: Candidates,
    layer: Layer,
    layers: Sequence[Layer],
    rejected: Sequence[Rejection],
) -> Decision:
    """The core's own implementation, its parts chosen as the composite was: `transformer_lm=triton` demands triton's
    parts.
    """
    if choice.component is not None:
        spread = Layer(layer.name, Selection((Choice(choice.backend, demand=choice.demand),)))
        layers = (spread, *layers)
    chosen = tuple(
        resolve(replace(request, component=part, features=(), sizes={}), machine, candidates, layers)
        for part in composite.parts
    )
    return Decision(
        component=request.component,
        backend=COMPOSED,
        target=composite.target,
        layer=layer.name,
        demanded=choice.demand,
        rejected=tuple(rejected),
        parts=chosen,
    )


def _refusal(choice: Choice | None, request: Request, layer: Layer, rejected: Sequence[Rejection]) -> str:
    details = {key: value for key, value in asdict(request).items() if value and key != "component"}
    wanted = f" for {details}" if details else ""
    reasons = "; ".join(f"{rejection.backend}: {rejection.reason}" for rejection in rejected)
    if choice is None:
        return (
            f"no backend can serve {request.component!r}{wanted} ({reasons or 'none is selected'}). See: cs336 backends"
        )
    soft = f"{request.component}={choice.backend}?" if choice.component else choice.backend
    return (
        f"{choice.backend!r} was demanded for {request.component!r}{wanted} by {layer.name} ({choice}) "
        f"and can't serve it: {reasons}. To prefer it without demanding it, write {soft!r}"
    )
