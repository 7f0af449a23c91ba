"""What every kernel is held to: values and gradients against float64, nothing mutated, everything repeatable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cs336_registry as registry
from cs336_registry.arguments import ArgumentMaker
from cs336_registry.compare import assert_within
from cs336_registry.conformance.values import relaid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = ("float16", "float32")
"""The interpreter is right about these, and about float64, which one size of each op is run in."""

BFLOAT16 = (
    pytest.param("bfloat16", id="bfloat16") if DEVICE == "cuda" else pytest.param("bfloat16", id="bfloat16-interpreted")
)
"""In the interpreter this shows that a kernel computes in float32 between its loads and stores. It does not show how a
GPU loads, rounds and stores bfloat16: the interpreter keeps it as integers, and the rounding there is written by us."""


class PaddedArgumentMaker(ArgumentMaker):
    """The same values, every floating tensor a view into rows that end in NaN."""

    def tensor(self, values) -> torch.Tensor:
        return relaid(super().tensor(values), "padded_rows")


def maker(dtype: str = "float32", *, seed: int = 0, strided: bool = False) -> ArgumentMaker:
    return (PaddedArgumentMaker if strided else ArgumentMaker)(seed, dtype=dtype, device=DEVICE)


def check_against_float64(name: str, implementation, arguments: dict, *, gradients: bool = True) -> None:
    """Values and gradients by the contract's rule; inputs and gradients of outputs untouched; twice the same bits."""
    contract = registry.contract(name)
    wanted = [key for key in contract.differentiable if gradients and arguments.get(key) is not None]
    results, found = _run(implementation, arguments, wanted)
    again, found_again = _run(implementation, arguments, wanted)
    for one, other in zip([*results, *found], [*again, *found_again], strict=True):
        assert torch.equal(one, other), f"{name}: two runs differ"
    truth, true_gradients = _run(contract.oracle, _converted(arguments, torch.float64), wanted)
    plain, plain_gradients = _run(contract.oracle, arguments, wanted)
    assert_within(results, truth, plain, contract.tolerance, what=name)
    for key, *parts in zip(wanted, found, true_gradients, plain_gradients, strict=True):
        assert_within(*parts, contract.gradient_tolerance, what=f"{name}: the gradient of {key}")


def _run(implementation, arguments: dict, wanted: list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    leaves = {key: arguments[key].detach().requires_grad_() for key in wanted}
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    results = implementation(**{**arguments, **leaves})
    results = [part for part in (results if isinstance(results, tuple) else (results,)) if part is not None]
    found: list[torch.Tensor] = []
    if wanted:
        generator = np.random.Generator(np.random.PCG64(99))
        grads = [
            torch.from_numpy(np.asarray(generator.standard_normal(tuple(part.shape)))).to(part.device, part.dtype)
            for part in results
        ]
        kept = [grad.clone() for grad in grads]
        found = list(torch.autograd.grad(results, list(leaves.values()), grads))
        for grad, copy in zip(grads, kept, strict=True):
            assert torch.equal(grad, copy), "a gradient of an output was written to"
    for key, value in before.items():
        assert torch.equal(arguments[key], value), f"{key} was written to"
    return [part.detach() for part in results], found


def _converted(arguments: dict, dtype: torch.dtype) -> dict:
    return {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }


def check_operator(operator, arguments: tuple, **keywords) -> None:
    """The operator is registered soundly: schema, fake implementation, gradient, and the same result when traced."""
    torch.library.opcheck(operator.overload, arguments, keywords)


def check_full_graph(function, *arguments: torch.Tensor) -> None:
    """torch.compile takes the function and its gradient whole, and the results have the same bits."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def values_and_gradients(call):
        leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in arguments]
        result = call(*leaves)
        parts = [part for part in (result if isinstance(result, tuple) else (result,)) if part is not None]
        sum((part * part).sum() for part in parts).backward()
        return [*parts, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    for plain, traced in zip(values_and_gradients(function), values_and_gradients(compiled), strict=True):
        assert torch.equal(plain, traced)


def check_gradients_numerically(function, *arguments: torch.Tensor) -> None:
    """The kernels' own gradients against finite differences, in float64."""
    leaves = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in arguments]
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0)


class _Zeros(TorchDispatchMode):
    """Remembers the sizes of all tensors that are filled with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "zero" in func.overloadpacket.__name__ and isinstance(result, torch.Tensor):
            self.sizes.append(result.numel())
        return result


def check_backward_makes_no_zeros(loss: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """Results that only the backward pass reads get no gradient of zeros, which would cost memory and time."""
    grad = torch.ones_like(loss)
    with _Zeros() as seen:
        torch.autograd.grad(loss, leaves, grad)
    assert not seen.sizes, f"tensors of these sizes were filled with zeros: {seen.sizes}"
