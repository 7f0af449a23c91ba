"""Choosing is a pure function: every rule of it is tested without importing a backend."""

from __future__ import annotations

import itertools
import json

import pytest

from cs336_registry.decision import COMPOSED, Candidates, Composite, Request, rejections, resolve
from cs336_registry.errors import UnavailableError, UnknownNameError
from cs336_registry.plugin import Backend, Implementation, PluginStatus
from cs336_registry.selection import Layer, parse

from .conftest import GPU, PLAIN


def status(name: str, *components: str, state: str = "ok", reason: str = "", **claims) -> PluginStatus:
    implementations = tuple(Implementation(component=c, target=f"{name}:{c}", **claims) for c in components)
    return PluginStatus(
        name, state, reason, backend=Backend(name=name, summary="", implementations=implementations), version="1"
    )


def candidates(*plugins: PluginStatus, order=None) -> Candidates:
    return Candidates({p.name: p for p in plugins}, ("rmsnorm", "attention", "transformer_lm"), order or {})


REFERENCE = status("reference", "rmsnorm", "attention", dtypes=("float32",), devices=("cpu", "cuda"), gradient=True)
TORCH = status("torch", "rmsnorm", "attention", devices=("cpu", "cuda"))
TRITON = status(
    "triton",
    "attention",
    dtypes=("float32", "bfloat16"),
    devices=("cuda", "interpreter"),
    limits={"head_dim": (16, 256)},
)
ALL = candidates(REFERENCE, TORCH, TRITON)


def layers(**selectors: str) -> list[Layer]:
    return [Layer(name, parse(selector)) for name, selector in (selectors | {"default": "reference"}).items()]


def choose(
    component: str = "rmsnorm", found: Candidates = ALL, machine=PLAIN, composite=None, request=None, **selectors
):
    wanted = Request(component=component, **(request or {}))
    return resolve(wanted, machine, found, layers(**selectors), composite)


def test_the_default_serves_when_nobody_speaks():
    decision = choose()
    assert (decision.backend, decision.layer, decision.demanded, decision.preferred) == (
        "reference",
        "default",
        False,
        "",
    )


NAMES = ("argument", "use", "command_line", "variable", "project")


@pytest.mark.parametrize("speaking", [c for n in range(1, 6) for c in itertools.combinations(NAMES, n)], ids="-".join)
def test_the_highest_layer_that_speaks_decides(speaking):
    """Every combination of layers: the highest says torch, all below say triton, which would also be refused."""
    selectors = {name: "torch" if name == speaking[0] else "attention=triton" for name in speaking}
    decision = choose("attention", **selectors)
    assert (decision.backend, decision.layer) == ("torch", speaking[0])


def test_a_layer_without_an_opinion_leaves_it_to_the_next():
    decision = choose("rmsnorm", use="attention=torch", variable="torch")
    assert (decision.backend, decision.layer) == ("torch", "variable")


def test_a_preference_falls_back_and_says_so():
    decision = choose("rmsnorm", variable="triton")
    assert (decision.backend, decision.preferred, decision.layer) == ("reference", "triton", "default")
    assert [str(r.reason) for r in decision.rejected] == ["it does not provide rmsnorm"]


def test_a_preference_falls_back_to_the_next_in_the_list():
    assert choose("rmsnorm", variable="triton,torch").backend == "torch"


@pytest.mark.parametrize("selector", ["triton!", "rmsnorm=triton", "rmsnorm=triton!"])
def test_a_demand_is_met_or_refused(selector):
    with pytest.raises(
        UnavailableError, match=r"'triton' was demanded for 'rmsnorm' by variable .*does not provide rmsnorm"
    ):
        choose("rmsnorm", variable=selector)


def test_a_refusal_says_how_to_soften():
    with pytest.raises(UnavailableError, match=r"To prefer it without demanding it, write 'rmsnorm=triton\?'"):
        choose("rmsnorm", variable="rmsnorm=triton")
    assert choose("rmsnorm", variable="rmsnorm=triton?").backend == "reference"


@pytest.mark.parametrize("state", ["unavailable", "broken", "blocked"])
def test_a_backend_that_is_not_ok_is_never_taken(state):
    found = candidates(REFERENCE, status("torch", "rmsnorm", state=state, reason="because"))
    assert choose(found=found, variable="torch").rejected[0].reason == f"{state}: because"
    with pytest.raises(UnavailableError, match=f"{state}: because"):
        choose(found=found, variable="torch!")


def test_nobody_can_serve():
    found = candidates(status("reference", "rmsnorm", state="unavailable", reason="torch is not installed"))
    with pytest.raises(
        UnavailableError, match=r"no backend can serve 'rmsnorm' \(reference: unavailable: torch is not"
    ):
        choose(found=found)


def test_unknown_names_are_refused_even_where_they_would_not_matter():
    with pytest.raises(UnknownNameError, match="unknown component 'rmsnrom': did you mean 'rmsnorm'"):
        choose("rmsnrom")
    with pytest.raises(UnknownNameError, match=r"unknown backend \(from variable\) 'trition': did you mean 'triton'"):
        choose("rmsnorm", variable="attention=trition")
    with pytest.raises(
        UnknownNameError, match=r"unknown component \(from variable\) 'atention': did you mean 'attention'"
    ):
        choose("rmsnorm", variable="atention=triton")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"dtype": "float64"}, "dtype float64 is not among float32, bfloat16"),
        ({"device": "cpu"}, "device cpu is not among cuda, interpreter; set TRITON_INTERPRET=1"),
        ({"device": "mps:0"}, "device mps:0 is not among cuda, interpreter"),
        ({"gradient": True}, "it computes no gradient"),
        ({"compile": True}, "it does not trace under torch.compile"),
        ({"features": ("mask", "documents")}, "it does not claim mask, documents"),
        ({"sizes": {"head_dim": 512}}, "head_dim 512 is outside 16 to 256"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_every_capability_has_its_sentence(request_, reason):
    implementation = TRITON.backend.implementation("attention")
    assert len(found := rejections(implementation, Request(component="attention", **request_), PLAIN)) == 1
    assert found[0].startswith(reason)


def test_what_is_not_asked_for_is_not_checked():
    implementation = TRITON.backend.implementation("attention")
    assert (
        rejections(
            implementation,
            Request(component="attention", device="cuda:1", dtype="bfloat16", sizes={"head_dim": 64}),
            GPU,
        )
        == []
    )


def test_auto_is_the_order_of_the_device():
    order = {"cpu": {"*": ["torch", "reference"]}, "cuda": {"attention": ["triton", "torch"], "*": ["torch"]}}
    found = candidates(REFERENCE, TORCH, TRITON, order=order)
    assert choose("attention", found, variable="auto").backend == "torch"
    assert choose("attention", found, machine=GPU, variable="auto").backend == "triton"
    assert choose("rmsnorm", found, machine=GPU, variable="auto").backend == "torch"
    fallen = choose("attention", found, machine=GPU, variable="auto", request={"gradient": True})
    assert (fallen.backend, fallen.preferred) == ("reference", ""), "auto promises no backend, so nothing was missed"


LM = Composite("core:TransformerLM", ("rmsnorm", "attention"))


def test_a_composite_is_built_from_resolved_parts():
    decision = choose("transformer_lm", composite=LM, variable="triton")
    assert (decision.backend, decision.target) == (COMPOSED, "core:TransformerLM")
    assert [(part.component, part.backend) for part in decision.parts] == [
        ("rmsnorm", "reference"),
        ("attention", "triton"),
    ]


def test_demanding_a_composite_demands_its_parts():
    with pytest.raises(UnavailableError, match="'triton' was demanded for 'rmsnorm'"):
        choose("transformer_lm", composite=LM, variable="transformer_lm=triton")
    with pytest.raises(UnavailableError, match="'triton' was demanded for 'rmsnorm'"):
        choose("transformer_lm", composite=LM, variable="triton!")


def test_a_backend_may_replace_a_composite_whole():
    found = candidates(REFERENCE, status("torch", "transformer_lm"))
    assert choose("transformer_lm", found, composite=LM, variable="torch").target == "torch:transformer_lm"


def test_a_decision_is_plain_data_with_a_fingerprint():
    decision = choose("transformer_lm", composite=LM, variable="triton")
    record = json.loads(json.dumps(decision.to_dict()))
    assert record["fingerprint"] == decision.fingerprint
    assert record["parts"][1]["backend"] == "triton"
    assert decision.fingerprint != choose("transformer_lm", composite=LM).fingerprint
    assert decision.fingerprint == choose("transformer_lm", composite=LM, use="triton").fingerprint
