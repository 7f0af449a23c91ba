"""AdamW in one launch for all parameters of a kind, the clip factor folded in.

Moments and arithmetic are float32 (float64 for float64 parameters) whatever the dtype of parameters and gradients.
With `max_l2_norm` the step first takes the norm of all gradients (two small launches) and multiplies by the clip factor
where it reads the gradients, so that clipping costs one more read of the gradients instead of two reads and a write:
32 bytes per float32 parameter for norm, clip and update. The factor never leaves the device; `.grad` is not changed.

A step can be captured in a CUDA graph. Learning rate and bias correction are numbers of the host, which a graph repeats
as they were: capture forward and backward, and step outside, where they shall change.

`update` is registered as an operator that mutates its lists, so that a compiled step keeps it whole; the eager step
calls the function and tells autograd itself: handing some hundred tensors through the dispatcher costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from cs336_registry.components.adamw import check
from cs336_registry.components.gradient_clipping import check as check_clipping

from .gradient_clipping import CLIP_EPS, clip_factor, norm_operator, total_norm
from .multi_tensor import chunk_of, contiguous, group_by_type, launch_over, operand, triton_dtype, write_back
from .operators import operator, scalar
from .runtime import PRODUCTION_DTYPES, accumulator, accumulator_dtype, dtype_name, meta, narrow

if TYPE_CHECKING:
    from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """AdamW as the contract says, in one launch; see the module.

    max_l2_norm: where given, gradients count as scaled by `max_l2_norm / (norm + 1e-6)` when their norm is larger;
    `gradient_norm` then holds the norm of the last step, a 0-d tensor on the device.
    master_weights: keep a float32 copy of every narrower parameter, update that and round it to the parameter, so that
    updates smaller than the parameter's own rounding error add up.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        max_l2_norm: float | None = None,
        master_weights: bool = False,
    ) -> None:
        check(lr, betas, eps, weight_decay)
        if max_l2_norm is not None:
            check_clipping(max_l2_norm, CLIP_EPS)
        self.max_l2_norm, self.master_weights = max_l2_norm, master_weights
        self.gradient_norm: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        settings = {**self.defaults, **param_group}
        check(settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compiling = torch.compiler.is_compiling()
        take_norm, take_step = (norm_operator, update_operator) if compiling else (total_norm, update)
        if self.max_l2_norm is not None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            self.gradient_norm = take_norm(gradients) if gradients else None
        for group in self.param_groups:
            for (step, has_master), members in self._members(group).items():
                parameters = [parameter for parameter, _ in members]
                states = [state for _, state in members]
                take_step(
                    parameters,
                    [parameter.grad for parameter in parameters],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [state["master"] for state in states] if has_master else [],
                    self.gradient_norm,
                    self.max_l2_norm or 0.0,
                    group["lr"],
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    step,
                )
                if not compiling:
                    torch.autograd.graph.increment_version(parameters)
        return loss

    def _members(self, group: dict[str, Any]) -> dict[tuple[int, bool], list[tuple[Tensor, dict[str, Any]]]]:
        """The group's parameters that have a gradient, by the step they now take; new ones get their state."""
        members: dict[tuple[int, bool], list[tuple[Tensor, dict[str, Any]]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise ValueError("adamw: a gradient is sparse: use a dense one (sparse=False)")
            state = self.state[parameter]
            if not state:
                wide = accumulator_dtype(parameter.dtype)
                state["step"] = 0
                state["exp_avg"] = torch.zeros(parameter.shape, dtype=wide, device=parameter.device)
                state["exp_avg_sq"] = torch.zeros(parameter.shape, dtype=wide, device=parameter.device)
                if self.master_weights and parameter.dtype != wide:
                    state["master"] = parameter.detach().to(wide, memory_format=torch.contiguous_format, copy=True)
            state["step"] += 1
            members.setdefault((state["step"], "master" in state), []).append((parameter, state))
        return members

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, from this or another backend; PyTorch's own loading would round the moments to the parameters'
        dtype."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        loaded = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, loaded, strict=True):
            if key not in state_dict["state"]:
                continue
            wide, device = accumulator_dtype(parameter.dtype), parameter.device
            self.state[parameter] = {
                name: int(value)
                if name == "step"
                else value.detach().to(device, wide, memory_format=torch.contiguous_format, copy=True)
                for name, value in state_dict["state"][key].items()
            }


@triton.jit
def update_tile(
    parameter_pointer,
    gradient_pointer,
    exp_avg_pointer,
    exp_avg_sq_pointer,
    master_pointer,
    at,
    remaining,
    factor,
    decay,
    step_size,
    weight_of_gradient,
    beta2,
    weight_of_square,
    inverse_root,
    eps,
    PARAMETER: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    MASTER: tl.constexpr,
    MASKED: tl.constexpr,
):
    mask = (at < remaining) if MASKED else None
    gradient = tl.load(gradient_pointer + at, mask=mask).to(ACCUMULATOR) * factor
    exp_avg = tl.load(exp_avg_pointer + at, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_pointer + at, mask=mask)
    value = tl.load((master_pointer if MASTER else parameter_pointer) + at, mask=mask).to(ACCUMULATOR)
    exp_avg += (gradient - exp_avg) * scalar(weight_of_gradient, ACCUMULATOR)
    exp_avg_sq = exp_avg_sq * scalar(beta2, ACCUMULATOR) + gradient * gradient * scalar(weight_of_square, ACCUMULATOR)
    spread = tl.sqrt(exp_avg_sq) * scalar(inverse_root, ACCUMULATOR) + scalar(eps, ACCUMULATOR)
    if MASKED:
        spread = tl.where(mask, spread, 1.0)
    value = value * scalar(decay, ACCUMULATOR) - exp_avg / spread * scalar(step_size, ACCUMULATOR)
    tl.store(exp_avg_pointer + at, exp_avg, mask=mask)
    tl.store(exp_avg_sq_pointer + at, exp_avg_sq, mask=mask)
    if MASTER:
        tl.store(master_pointer + at, value, mask=mask)
    tl.store(parameter_pointer + at, narrow(value, PARAMETER), mask=mask)


@triton.jit
def update_kernel(
    chunk_pointer,
    address_pointer,
    norm_pointer,
    max_l2_norm: tl.float64,
    clip_eps: tl.float64,
    decay: tl.float64,
    step_size: tl.float64,
    weight_of_gradient: tl.float64,
    beta2: tl.float64,
    weight_of_square: tl.float64,
    inverse_root: tl.float64,
    eps: tl.float64,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    CLIP: tl.constexpr,
    MASTER: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, first, remaining = chunk_of(chunk_pointer, address_pointer, COLUMNS)
    parameter_pointer = operand(row, first, 0, PARAMETER, ALIGNED)
    gradient_pointer = operand(row, first, 1, GRADIENT, ALIGNED)
    exp_avg_pointer = operand(row, first, 2, ACCUMULATOR, ALIGNED)
    exp_avg_sq_pointer = operand(row, first, 3, ACCUMULATOR, ALIGNED)
    # Without a master the column holds the number of entries, which nobody follows.
    master_pointer = operand(row, first, 4, ACCUMULATOR, ALIGNED)
    factor = tl.full((), 1.0, ACCUMULATOR)
    if CLIP:
        factor = clip_factor(norm_pointer, max_l2_norm, clip_eps, ACCUMULATOR)
    if remaining >= CHUNK:
        for start in range(0, CHUNK, BLOCK):
            update_tile(
                parameter_pointer,
                gradient_pointer,
                exp_avg_pointer,
                exp_avg_sq_pointer,
                master_pointer,
                start + tl.arange(0, BLOCK),
                remaining,
                factor,
                decay,
                step_size,
                weight_of_gradient,
                beta2,
                weight_of_square,
                inverse_root,
                eps,
                PARAMETER,
                ACCUMULATOR,
                MASTER,
                MASKED=False,
            )
    else:
        for tail in range(0, remaining, BLOCK):
            update_tile(
                parameter_pointer,
                gradient_pointer,
                exp_avg_pointer,
                exp_avg_sq_pointer,
                master_pointer,
                tail + tl.arange(0, BLOCK),
                remaining,
                factor,
                decay,
                step_size,
                weight_of_gradient,
                beta2,
                weight_of_square,
                inverse_root,
                eps,
                PARAMETER,
                ACCUMULATOR,
                MASTER,
                MASKED=True,
            )


def update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    norm: Tensor | None,
    max_l2_norm: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Step number `step` of the given parameters, in place; `masters` is empty, or float32 twins of the parameters."""
    lists = (parameters, gradients, exp_avgs, exp_avg_sqs, *([masters] if masters else []))
    for group in group_by_type(*lists):
        operands = [contiguous(tensors) for tensors in group]
        parameter, gradient, exp_avg, *_ = (tensors[0] for tensors in operands)
        launch_over(
            update_kernel,
            operands,
            exp_avg if norm is None else norm.to(parameter.device, non_blocking=True),
            float(max_l2_norm),
            CLIP_EPS,
            1.0 - lr * weight_decay,
            lr / (1.0 - beta1**step),
            1.0 - beta1,
            float(beta2),
            1.0 - beta2,
            (1.0 - beta2**step) ** -0.5,
            float(eps),
            PARAMETER=triton_dtype(parameter.dtype),
            GRADIENT=triton_dtype(gradient.dtype),
            ACCUMULATOR=accumulator(parameter.dtype),
            CLIP=norm is not None,
            MASTER=bool(masters),
            BLOCK=1024,
        )
        for copies, tensors in zip(operands, group, strict=True):
            if tensors is not group[1]:
                write_back(copies, tensors)


def production_calls() -> Iterator[tuple[str, Any]]:
    settings = (1.0, 1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    for dtype in PRODUCTION_DTYPES:
        values = [meta(4096, 4096, dtype=dtype), meta(4096, dtype=dtype)]
        moments = [meta(*value.shape) for value in values]
        name = dtype_name(dtype)
        yield f"adamw_{name}", partial(update, values, values, moments, moments, [], None, *settings)
        yield f"adamw_clipped_{name}", partial(update, values, values, moments, moments, [], meta(), *settings)
        if dtype != torch.float32:
            yield f"adamw_master_{name}", partial(update, values, values, moments, moments, moments, None, *settings)


update_operator = operator(
    "adamw_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] masters, Tensor? norm, float max_l2_norm, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, int step) -> ()",
    update,
    lambda *arguments: None,
)
