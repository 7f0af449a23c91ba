"""The parts that checks are made of: widened arguments, unusual layouts, poison, differences, remembered answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cs336_registry import registry
from cs336_registry.component import Case, Component, ErrorCase
from cs336_registry.conformance.checks import Check, checks
from cs336_registry.conformance.poison import nan_in_uninitialised_memory
from cs336_registry.conformance.trial import Trial, Upstream, gradients_of
from cs336_registry.conformance.values import LAYOUTS, copied, first_difference, leaves, rebuilt, relaid, widened
from cs336_registry.machine import detect
from cs336_registry.plugin import Implementation


def test_widened_keeps_ties_gradients_and_other_types():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 0.1)
    wide = widened({"one": [weight], "two": weight, "ids": torch.tensor([1]), "dtype": torch.bfloat16, "eps": 1e-5})
    assert wide["one"][0] is wide["two"] and isinstance(wide["two"], torch.nn.Parameter)
    assert wide["two"].dtype == torch.float64 and wide["two"].grad.dtype == torch.float64
    assert wide["two"].grad[0].item() == weight.grad[0].double().item()
    assert wide["ids"].dtype == torch.int64 and wide["dtype"] == torch.float64 and wide["eps"] == 1e-5
    assert widened(np.ones(2, np.float32)).dtype == np.float64 and widened(np.ones(2, np.uint16)).dtype == np.uint16


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5), (7,)])
def test_relaid_changes_strides_and_no_value(layout, shape):
    for tensor in (torch.randn(shape), torch.randint(0, 9, shape)):
        strange = relaid(tensor, layout)
        assert torch.equal(strange, tensor)
        if tensor.ndim > 1 or layout == "every_second":
            assert not strange.is_contiguous()


def test_the_space_between_entries_is_nan():
    strange = relaid(torch.ones(2, 3), "padded_rows")
    assert torch.isnan(torch.as_strided(strange, (2, 6), (6, 1))[:, 3:]).all()


def test_poison_reaches_every_way_to_ask_for_memory_and_the_backward_pass():
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, upstream):
            seen.append(torch.empty(3))
            return upstream

    x = torch.ones(3, requires_grad=True)
    with nan_in_uninitialised_memory():
        seen += [torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,))]
        Identity.apply(x).sum().backward()
        assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
    assert len(seen) == 5 and all(bool(torch.isnan(tensor).all()) for tensor in seen)


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        ([1, 2, 3], [1, 2, 4], r"result\[2\] is 3, expected 4"),
        ([1, 2], [1, 2, 4], "result has 2 entries, expected 3"),
        ((1,), [1], "result is a tuple, expected a list"),
        ({b"a": 1}, {b"a": 1, b"b": 2}, "result lacks b'b'"),
        ({"a": 1, "b": 1}, {"a": 1}, "result has 'b' that was not expected"),
        (True, 1, r"result is True \(bool\), expected 1 \(int\)"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), r"result\[1\] is 2, expected 3 \(1 entries differ\)"),
        (torch.tensor([1.0]), torch.tensor([1.0]).double(), "result has dtype torch.float32, expected torch.float64"),
        (np.array([1, 2]), np.array([1, 3]), "result: values differ"),
    ],
)
def test_the_first_difference_is_named(found, expected, message):
    difference = first_difference(found, expected)
    assert difference is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(difference)


def test_equal_values_have_no_difference():
    value = {"a": [torch.tensor([1.0, float("nan")]), (b"x", float("nan"), None)], "b": np.array([np.nan])}
    assert first_difference(value, copied(value) | {"a": value["a"]}) is None
    assert [path for path, _ in leaves(value)] == ["a[0]", "a[1][0]", "a[1][1]", "a[1][2]", "b"]
    assert rebuilt(value, lambda leaf: leaf)["a"][0] is value["a"][0]


def test_upstream_gradients_are_uneven_rounded_and_new_at_every_call():
    upstream = Upstream(seed=3, dtype="bfloat16")
    (one,), (other,) = upstream.gradients([torch.zeros(50)]), upstream.gradients([torch.zeros(50).double()])
    assert one is not other and torch.equal(one.double(), other) and one.unique().numel() > 10
    assert torch.equal(one, one.bfloat16().float())
    assert Upstream(0, "float32", "expanded").gradients([torch.zeros(2, 3)])[0].stride() == (0, 0)


def test_an_unused_argument_has_a_zero_gradient_and_a_cut_result_is_noticed():
    contract = registry.contract("rmsnorm")
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(4), "eps": 0.0}
    found = gradients_of(contract, lambda x, weight, eps: x * 1, arguments, Upstream(0, "float32"))
    assert found.connected == {"result"} and (found.of["weight"] == 0).all()
    assert not gradients_of(contract, lambda x, weight, eps: x.detach(), arguments, Upstream(0, "float32")).connected


def add(x, y):
    raise NotImplementedError


def toy_contract(**changes):
    described = {
        "signature": add,
        "kind": "algorithm",
        "summary": "",
        "formula": "",
        "paper": "",
        "arguments": lambda case, make: {"x": case.sizes["x"], "y": 2},
        "oracle": lambda x, y: x + y,
        "exact": True,
        "cases": (Case(id="one", sizes={"x": 1}), Case(id="big", sizes={"x": 100}, features=("big",))),
        "error_cases": (ErrorCase(id="none", arguments=lambda make: {"x": None, "y": 1}, match="x is None"),),
        "laws": (),
        "workloads": (),
    }
    return Component(**described | changes)


def claims(**changes):
    return Implementation(**{"component": "add", "target": "a:b"} | changes)


def run(group, implementation, tmp_path, contract=None):
    for check in checks(contract or toy_contract()):
        if check.group == group:
            check.run(implementation, claims(), Trial(folder=tmp_path))


def right(x, y):
    if x is None:
        raise ValueError("x is None: pass a number")
    return x + y


def test_a_right_implementation_passes_everything(tmp_path):
    for check in checks(toy_contract()):
        if check.group != "processes":  # which the toy is not installed for
            check.run(right, claims(features=("big",)), Trial(folder=tmp_path))


def test_ids_are_unique_and_name_component_subject_and_dtype():
    for name in registry.components():
        names = [str(check) for check in checks(registry.contract(name))]
        assert len(names) == len(set(names))
    assert "case[rmsnorm-course-float32]" in map(str, checks(registry.contract("rmsnorm")))


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        (lambda x, y: 0, "bad arguments were accepted: got a int"),
        (lambda x, y: x + y, "raised TypeError: .*, expected ValueError matching 'x is None'"),
    ],
)
def test_errors_are_held_against_the_contract(implementation, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        run("error", implementation, tmp_path)


def test_an_error_of_two_lines_or_other_words_is_refused(tmp_path):
    def raising(text):
        def add(x, y):
            raise ValueError(text)

        return add

    with pytest.raises(AssertionError, match="more than one line"):
        run("error", raising("x is None\nsorry"), tmp_path)
    with pytest.raises(AssertionError, match="does not match 'x is None'"):
        run("error", raising("no"), tmp_path)


def test_a_wrong_signature_is_named(tmp_path):
    with pytest.raises(AssertionError, match="add: parameter 'y' is missing"):
        run("signature", lambda x: x, tmp_path)


def test_claims_decide_what_is_asked():
    contract = registry.contract("rmsnorm")
    some = claims(component="rmsnorm", dtypes=("float32",))
    case = contract.cases[0]
    machine = detect()
    assert not Check("case", contract, case, "float32").unclaimed(some, machine)
    assert "bfloat16" in Check("case", contract, case, "bfloat16").unclaimed(some, machine)[0]
    assert "no gradient" in Check("gradient", contract, case, "float32").unclaimed(some, machine)[0]
    assert "deterministic" in Check("repeat", contract, case).unclaimed(some, machine)[0]
    assert "thread_safe" in Check("threads", contract).unclaimed(some, machine)[0]
    assert "process_safe" in Check("processes", contract).unclaimed(some, machine)[0]
    assert "big" in Check("case", toy_contract(), toy_contract().cases[1]).unclaimed(claims(), machine)[0]
    assert "device cuda" in Check("case", contract, case, "float32").unclaimed(some, machine, "cuda")[0]
