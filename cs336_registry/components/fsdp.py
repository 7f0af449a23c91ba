"""Fully sharded data parallelism: every rank keeps a part of each large weight and borrows the rest to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..arguments import ArgumentMaker
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload
from ..ranks import run_on_ranks
from . import ddp

if TYPE_CHECKING:
    import torch

WORLD_SIZE = 2


def fsdp(module: torch.nn.Module, compute_dtype: torch.dtype | None = None) -> Any:
    """A module that computes what `module` computes while each rank stores only a part of its large weights.

    The weights of layers named Linear and Embedding are cut along their first dimension, one part a rank:
    `parameters()` gives the parts, which is what the optimizer steps. A weight is gathered before its layer runs,
    forward and backward, and dropped after; its gradient is averaged over the ranks and cut the same way. Other
    parameters are kept whole and their gradients averaged. At construction, parameters and buffers become rank 0's.
    compute_dtype: the dtype in which those layers compute and weights and gradients travel; parts stay in their own
    dtype. None computes in that.
    Call `finish_gradient_synchronization()` after backward and before the optimizer's step. `gather_full_parameters()`
    gives every rank the state dict of the whole model, under the names it had. `module` is the wrapped module. Every
    rank must run the same layers, and a layer's weight must be used by that layer's own forward.
    Raises TypeError where `module` is no nn.Module or compute_dtype is not floating, RuntimeError without a process
    group. Source: Zhao et al. 2023, "PyTorch FSDP", https://arxiv.org/abs/2304.11277.
    """
    raise NotImplementedError


def check(module: Any, compute_dtype: Any) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    import torch

    if compute_dtype is not None and not (isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point):
        raise TypeError(f"fsdp: compute_dtype is {compute_dtype!r}: pass a floating dtype, or None")
    ddp.check_module("fsdp", module)


def is_sharded(layer: Any) -> bool:
    """Whether this layer's weight is cut: PyTorch's Linear and Embedding, and any other layer of that name."""
    weight = getattr(layer, "_parameters", {}).get("weight")
    return type(layer).__name__ in ("Linear", "Embedding") and weight is not None and weight.ndim > 0


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    import torch

    found = ddp.arguments(case, make)
    if "compute_dtype" in case.sizes:
        found["compute_dtype"] = getattr(torch, case.sizes["compute_dtype"])
    return found


def observe(implementation: Callable[..., Any], arguments: Arguments) -> Any:
    """The gathered weights on every rank after training on halves of the batches; the oracle trains on whole ones."""
    if implementation is oracle:
        return [train(0, 1, oracle, arguments)] * WORLD_SIZE
    return run_on_ranks(_train, implementation, arguments)


def _train(rank: int, implementation: Callable[..., Any], arguments: Arguments) -> Any:
    return train(rank, WORLD_SIZE, implementation, arguments)


def train(rank: int, world_size: int, implementation: Callable[..., Any], arguments: Arguments) -> dict[str, Any]:
    """As ddp's, then everything gathered; an evaluation without gradients comes in between."""
    import torch

    wanted = dict(arguments)
    compute_dtype = wanted.pop("compute_dtype", None)
    wrapped: list[Any] = []

    def build(module: torch.nn.Module) -> Any:
        wrapped.append(implementation(module, compute_dtype))
        with torch.no_grad():
            wrapped[0](wanted["token_ids"][0])
        return wrapped[0]

    ddp.train(rank, world_size, build, wanted)
    return {name: tensor.detach().clone() for name, tensor in wrapped[0].gather_full_parameters().items()}


def oracle(module: torch.nn.Module, compute_dtype: torch.dtype | None = None) -> Any:
    """One process and whole weights, cast for each forward pass."""
    import torch

    class Alone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.layers = {name: layer for name, layer in module.named_modules() if is_sharded(layer)}
            for layer in self.layers.values():
                layer.register_forward_pre_hook(_cast_input)

        def forward(self, *inputs: Any) -> Any:
            cast = {
                f"{name}.{part}": parameter.to(compute_dtype)
                for name, layer in self.layers.items()
                for part, parameter in layer.named_parameters()
            }
            return (
                torch.func.functional_call(self.module, cast, inputs, tie_weights=False)
                if compute_dtype
                else self.module(*inputs)
            )

        def finish_gradient_synchronization(self) -> None:
            return None

        def gather_full_parameters(self) -> dict[str, torch.Tensor]:
            return self.module.state_dict()

    return Alone()


def _cast_input(layer: Any, inputs: Any) -> Any:
    return tuple(value.to(layer.weight.dtype) if value.is_floating_point() else value for value in inputs)


def weights_are_cut(fsdp, make: ArgumentMaker) -> None:
    """Each rank stores about half of the large weights, also where the rows don't divide evenly."""
    model: Any = ddp.example(make, "plain")
    large = sum(layer.weight.numel() for layer in model.modules() if is_sharded(layer))
    small = sum(parameter.numel() for parameter in model.parameters()) - large
    stored = run_on_ranks(_stored, fsdp, make.seed)
    assert max(stored) <= 0.6 * large + small, f"the ranks store {stored} entries of {large + small}"
    assert sum(stored) >= large + small, f"the ranks store {stored} entries, together less than {large + small}"


def _stored(rank: int, fsdp: Callable[..., Any], seed: int) -> int:
    wrapped = fsdp(ddp.example(ArgumentMaker(seed), "plain"))
    parts: list[Any] = list(wrapped.parameters())
    local: list[Any] = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
    return sum(part.numel() for part in local)


def names_stay(fsdp, make: ArgumentMaker) -> None:
    expected = ddp.example(make, "plain").state_dict()
    for names in run_on_ranks(_gathered, fsdp, make.seed):
        assert names == {name: tuple(tensor.shape) for name, tensor in expected.items()}, f"gathered: {names}"


def _gathered(rank: int, fsdp: Callable[..., Any], seed: int) -> dict[str, tuple[int, ...]]:
    wrapped = fsdp(ddp.example(ArgumentMaker(seed), "plain"))
    return {name: tuple(tensor.shape) for name, tensor in wrapped.gather_full_parameters().items()}


def layers_compute_in_the_compute_dtype(fsdp, make: ArgumentMaker) -> None:
    for dtypes in run_on_ranks(_result_dtypes, fsdp, make.seed):
        assert dtypes == {"torch.bfloat16"}, f"compute_dtype is bfloat16, the layers' results are {sorted(dtypes)}"


def _result_dtypes(rank: int, fsdp: Callable[..., Any], seed: int) -> set[str]:
    given = arguments(Case(id="law", sizes={"compute_dtype": "bfloat16", "kind": "mixed"}), ArgumentMaker(seed))
    # Listed before wrapping, which may give the layers' classes other names.
    layers = [layer for layer in given["module"].modules() if is_sharded(layer)]
    wrapped = fsdp(given["module"], given["compute_dtype"])
    found: set[str] = set()
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, result: found.add(str(result.dtype)))
    wrapped(given["token_ids"][0])
    return found


contract = Component(
    signature=fsdp,
    kind="module",
    summary="data-parallel training with weights, gradients and optimizer states cut over the ranks",
    formula="W = gather(W₀ … Wₙ₋₁);  ∇Wᵣ = part r of (1 / n) · Σ over ranks of ∇W",
    paper="https://arxiv.org/abs/2304.11277",
    arguments=arguments,
    oracle=oracle,
    observe=observe,
    dtypes=("float32",),
    mutates=("module",),
    features=("tied_weights", "unused_parameters", "frozen_weights", "compute_dtype"),
    tolerance=Tolerance(
        factor=4.0, floor=16.0, reason="the batch is summed in two parts, and steps carry the rounding on"
    ),
    cases=(
        Case(id="plain"),
        Case(id="tied", sizes={"kind": "tied"}, features=("tied_weights",)),
        Case(id="frozen", sizes={"kind": "frozen"}, features=("frozen_weights",)),
        Case(id="unused", sizes={"kind": "unused"}, features=("unused_parameters",)),
        Case(id="bfloat16", sizes={"compute_dtype": "bfloat16", "kind": "mixed"}, features=("compute_dtype",)),
        Case(
            id="float16_tied",
            sizes={"compute_dtype": "float16", "kind": "tied mixed"},
            features=("compute_dtype", "tied_weights"),
        ),
    ),
    error_cases=(
        ErrorCase(
            id="not_a_module",
            arguments=lambda make: {"module": make.normal(3)},
            error=TypeError,
            match="module is a Tensor: pass a torch.nn.Module",
        ),
        ErrorCase(
            id="compute_dtype",
            arguments=lambda make: {"module": ddp.example(make, "plain"), "compute_dtype": "bfloat16"},
            error=TypeError,
            match="compute_dtype is 'bfloat16': pass a floating dtype",
        ),
        ErrorCase(
            id="no_process_group",
            arguments=lambda make: {"module": ddp.example(make, "plain")},
            error=RuntimeError,
            match="there is no process group: start the ranks with torchrun",
        ),
    ),
    laws=(
        Law(id="cut", statement="each rank stores its part of the large weights alone", check=weights_are_cut),
        Law(id="names", statement="gathering gives the names and shapes of the model", check=names_stay),
        Law(
            id="compute_dtype",
            statement="layers compute in compute_dtype",
            check=layers_compute_in_the_compute_dtype,
            features=("compute_dtype",),
        ),
    ),
    workloads=(Workload(id="three_steps", sizes={"batch": 64}),),
    adapter="get_fsdp",
)
