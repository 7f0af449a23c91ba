"""The two ways into an operator: straight to the host function, and through PyTorch's dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .kernel_checks import DEVICE, maker


class Recorded(TorchDispatchMode):
    """Remembers the operators of this backend that pass the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "cs336_triton":
            self.names.append(function._schema.name)
        return function(*arguments, **(keywords or {}))


class Wrapped(torch.Tensor):
    """A subclass that lets everything through."""


@pytest.fixture
def silu():
    from cs336_triton.silu import silu

    return silu


@pytest.fixture
def overload(monkeypatch):
    """Counts calls that go by way of torch.ops."""
    from cs336_triton.silu import _operator

    calls = []
    monkeypatch.setattr(_operator, "overload", lambda *given, kept=_operator.overload: calls.append(1) or kept(*given))
    return calls


@pytest.mark.parametrize("requires_grad", [False, True])
def test_ordinary_tensors_skip_the_dispatcher_and_get_the_same_bits(silu, overload, requires_grad):
    x = maker().normal(5, 33).requires_grad_(requires_grad)
    direct = silu(x)
    assert not overload
    from cs336_triton.silu import _operator

    registered = _operator.overload(x)
    assert torch.equal(direct, registered)
    if requires_grad:
        grad = torch.randn_like(direct)
        assert torch.equal(*(torch.autograd.grad(result, x, grad)[0] for result in (direct, registered)))


def test_parameters_and_views_are_ordinary(silu, overload):
    parameter = torch.nn.Parameter(maker().normal(6, 8))
    silu(parameter[:, ::2]).sum().backward()
    assert parameter.grad is not None and not overload


def test_dispatch_modes_see_the_operator(silu):
    with Recorded() as recorded:
        silu(maker().normal(3, 4).requires_grad_()).sum().backward()
    assert recorded.names == ["cs336_triton::silu", "cs336_triton::silu_backward"]


def test_other_tensors_take_the_registered_way(silu, overload):
    silu(maker().normal(3, 4).as_subclass(Wrapped))
    assert silu(torch.empty(3, 4, device="meta")).shape == (3, 4)
    with FakeTensorMode() as mode:
        silu(mode.from_tensor(torch.ones(3, 4, device=DEVICE)))
    assert len(overload) == 3


def test_a_second_derivative_is_refused(silu):
    x = maker().normal(3).requires_grad_()
    output_grad = torch.ones(3, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(silu(x), x, output_grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_functional_transforms_take_the_registered_way(silu, overload):
    x = maker().normal(2, 3)
    assert torch.equal(torch.func.vmap(silu)(x), silu(x)) and overload
