"""Every op, forward and backward, inside a CUDA graph: nothing waits for the device or reads from it on the host.

Without a GPU the same is shown in part by `production_calls`: they run the host functions on tensors without memory.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from .kernel_checks import maker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def attention(make):
    return {name: make.normal(2, 2, 65, 64) for name in ("q", "k", "v")} | {"is_causal": True}


def documents(make):
    ids = torch.arange(65, device="cuda") // 20
    # Not expanded: the test writes other ids into it.
    return attention(make) | {"document_ids": ids.expand(2, 65).contiguous()}


def rope(make):
    angles = torch.arange(70 * 16, device="cuda").reshape(70, 16) / 50
    return {name: make.normal(2, 3, 65, 32) for name in ("q", "k")} | {"cos": angles.cos(), "sin": angles.sin()}


CASES = {
    "embedding": lambda make: {"token_ids": make.integers(3, 20, high=50), "weight": make.normal(50, 64)},
    "rmsnorm": lambda make: {"x": make.normal(40, 200), "weight": make.normal(200)},
    "add_rmsnorm": lambda make: {
        "x": make.normal(40, 200),
        "residual": make.normal(40, 200),
        "weight": make.normal(200),
    },
    "silu": lambda make: {"x": make.normal(40, 200)},
    "swiglu": lambda make: {"gate": make.normal(40, 200), "up": make.normal(40, 200)},
    "rope": rope,
    "softmax": lambda make: {"x": make.normal(40, 200)},
    "attention": attention,
    "attention-documents": documents,
    "cross_entropy": lambda make: {"logits": make.normal(40, 200), "targets": make.integers(40, high=200)},
    "linear_cross_entropy": lambda make: {
        "x": make.normal(300, 64),
        "weight": make.normal(200, 64),
        "targets": make.integers(300, high=200),
    },
}
CONSTANT = ("cos", "sin")


def captured(call):
    """(the graph of one call, its results), after two calls that warm up."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
        call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("case", CASES)
def test_the_graph_computes_what_the_call_does(case):
    name = case.partition("-")[0]
    implementation = getattr(importlib.import_module(f"cs336_triton.{name}"), name)
    given, others = (CASES[case](maker("bfloat16", seed=seed)) for seed in (0, 1))
    wanted = [
        value.requires_grad_()
        for key, value in given.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key not in CONSTANT
    ]

    def step() -> list[torch.Tensor]:
        results = implementation(**given)
        results = list(results) if isinstance(results, tuple) else [results]
        return [*results, *torch.autograd.grad(results, wanted, [torch.ones_like(result) for result in results])]

    graph, found = captured(step)
    with torch.no_grad():
        for key, value in given.items():
            if isinstance(value, torch.Tensor):
                value.copy_(others[key])
    graph.replay()
    for one, other in zip(found, step(), strict=True):
        assert torch.equal(one, other)


def test_clipping_and_the_optimizer_step():
    """Tables of addresses made during a capture serve the graph, and no call outside it."""
    from cs336_triton.adamw import AdamW
    from cs336_triton.gradient_clipping import gradient_clipping

    make = maker()
    parameters = [make.normal(*shape).requires_grad_() for shape in ((300, 100), (7,), (33, 1))]
    gradients = [make.normal(*parameter.shape) for parameter in parameters]
    optimizer = AdamW(parameters, lr=0.1, max_l2_norm=1.0)

    def step() -> list[torch.Tensor]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = gradient_clipping(parameters, 1.0)
        optimizer.step()
        return [norm, *(parameter.grad for parameter in parameters)]

    graph, (norm, *clipped) = captured(step)
    # An eager call over the very tensors that the graph writes to, before the graph ever ran.
    before = [parameter.detach().clone() for parameter in parameters]
    for tensor in clipped:
        tensor.zero_()
    assert float(gradient_clipping(parameters, 1.0)) == 0.0
    graph.replay()
    expected = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
    torch.testing.assert_close(norm, expected)
    for tensor, gradient in zip(clipped, gradients, strict=True):
        torch.testing.assert_close(tensor, gradient / (expected + 1e-6))
    assert all(not torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
