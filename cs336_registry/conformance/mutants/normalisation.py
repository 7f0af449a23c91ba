"""Wrong rmsnorm and add_rmsnorm."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from . import mutant, mutation
from ._gradients import changed_gradient


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normed(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The right answer, for the mutants below to spoil."""
    # Widened once: each conversion would round its share of the gradient to the input's dtype.
    values = wide(x)
    return (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


@mutant("rmsnorm", "the mean of the absolute values instead of the root mean square")
def mean_instead_of_rms(x, weight, eps=1e-5):
    return (wide(x) / (wide(x).abs().mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


@mutant("rmsnorm", "the mean is subtracted first, as in layer normalisation")
def layernorm_instead(x, weight, eps=1e-5):
    return normed(wide(x) - wide(x).mean(-1, keepdim=True), weight, eps).to(x.dtype)


@mutant("rmsnorm", "eps is added outside the root")
def eps_outside_the_root(x, weight, eps=1e-5):
    return (wide(x) / (wide(x).square().mean(-1, keepdim=True).sqrt() + eps) * wide(weight)).to(x.dtype)


@mutant("rmsnorm", "eps is left out")
def eps_left_out(x, weight, eps=1e-5):
    return normed(x, weight, 0.0)


@mutant("rmsnorm", "eps is the constant 1e-5 whatever is passed")
def eps_hard_coded(x, weight, eps=1e-5):
    return normed(x, weight, 1e-5)


@mutant("rmsnorm", "the sum of squares is not divided by the width")
def sum_of_squares(x, weight, eps=1e-5):
    return (wide(x) * torch.rsqrt(wide(x).square().sum(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


@mutant("rmsnorm", "the divisor is the width rounded up to a power of two: the padded block of a kernel")
def mean_over_the_padded_block(x, weight, eps=1e-5):
    block = 1 << (x.shape[-1] - 1).bit_length()
    return (wide(x) * torch.rsqrt(wide(x).square().sum(-1, keepdim=True) / block + eps) * wide(weight)).to(x.dtype)


@mutant("rmsnorm", "the gain is one plus the weight, as in Gemma")
def gain_is_one_plus_weight(x, weight, eps=1e-5):
    return normed(x, 1 + weight, eps)


@mutant("rmsnorm", "the statistics are taken in the input's dtype")
def statistics_in_the_input_dtype(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@mutant("rmsnorm", "the result is float32 whatever the input's dtype")
def result_stays_wide(x, weight, eps=1e-5):
    return normed(wide(x), wide(weight), eps)


@mutant("rmsnorm", "the input is scaled in place", groups=("mutation",))
def scaled_in_place(x, weight, eps=1e-5):
    result = normed(x, weight, eps)
    with torch.no_grad():
        x.mul_(2)
    return result


@mutant("rmsnorm", "the last rows, short of a block of four, are never written", groups=("poison",))
def last_rows_uninitialised(x, weight, eps=1e-5):
    result, rows = torch.empty_like(x), x.reshape(-1, x.shape[-1])
    count = max(len(rows) // 4 * 4, min(len(rows), 4))
    result.view(-1, x.shape[-1])[:count] = normed(rows[:count], weight, eps)
    return result


@mutant("rmsnorm", "strides are ignored: the storage is read as if it were contiguous", groups=("layout",))
def strides_ignored(x, weight, eps=1e-5):
    packed = torch.zeros(x.shape, device=x.device).stride()
    return normed(x if x.is_contiguous() else torch.as_strided(x, x.shape, packed), weight, eps)


@mutant("rmsnorm", "the stride between features is ignored, the one between rows is not", groups=("layout",))
def inner_stride_ignored(x, weight, eps=1e-5):
    return normed(torch.as_strided(x, x.shape, (*x.stride()[:-1], 1)) if x.ndim else x, weight, eps)


@mutation("rmsnorm", "the root mean square of an earlier call with the same shape is used again", groups=("again",))
def statistics_cached_by_shape(textbook):
    cache = {}

    def rmsnorm(x, weight, eps=1e-5):
        scale = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
        return (wide(x) * cache.setdefault((x.shape, x.dtype, eps), scale.detach()) * wide(weight)).to(x.dtype)

    return rmsnorm


@mutant("rmsnorm", "the gradient of the weight is averaged over the rows, not summed")
def weight_gradient_averaged(x, weight, eps=1e-5):
    rows = max(x.numel() // x.shape[-1], 1)
    return normed(x, changed_gradient(weight, lambda gradient: gradient / rows), eps)


@mutant("rmsnorm", "the gradient of x leaves out how the root mean square depends on x")
def statistics_detached(x, weight, eps=1e-5):
    scale = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    return (wide(x) * scale.detach() * wide(weight)).to(x.dtype)


class _AssumesAllGradients(torch.autograd.Function):
    """A backward pass with a switch for each of several bugs; without one it is right."""

    @staticmethod
    def forward(context, x, weight, eps, bug):
        context.save_for_backward(x, weight)
        context.eps, context.bug = eps, bug
        return normed(x, weight, eps)

    @staticmethod
    def backward(context, upstream):
        x, weight = context.saved_tensors
        if (
            context.bug == "upstream read as contiguous"
            and upstream.ndim > 1
            and upstream.stride()[-2] > upstream.shape[-1]
        ):
            upstream = torch.as_strided(upstream, upstream.shape, x.contiguous().stride())
        wide_upstream = wide(upstream)
        scale = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + context.eps)
        weighted = wide_upstream * wide(weight)
        projected = wide(x) * (weighted * wide(x)).mean(-1, keepdim=True) * scale.square()
        x_gradient = (scale * (weighted - projected)).to(x.dtype)
        weight_gradient = (wide_upstream * wide(x) * scale).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if context.bug == "upstream overwritten":
            upstream.copy_(x_gradient)
        if context.bug == "weight gradient only with x's" and not context.needs_input_grad[0]:
            weight_gradient = torch.zeros_like(weight_gradient)
        return x_gradient, weight_gradient, None, None


@mutant("rmsnorm", "the upstream gradient is read as if it were contiguous", groups=("layout",))
def upstream_read_as_contiguous(x, weight, eps=1e-5):
    return _AssumesAllGradients.apply(x, weight, eps, "upstream read as contiguous")


@mutant("rmsnorm", "the backward pass writes its result into the upstream gradient", groups=("mutation",))
def upstream_overwritten(x, weight, eps=1e-5):
    return _AssumesAllGradients.apply(x, weight, eps, "upstream overwritten")


@mutant("rmsnorm", "without a gradient for x, the weight gets none either")
def weight_gradient_needs_the_other(x, weight, eps=1e-5):
    return _AssumesAllGradients.apply(x, weight, eps, "weight gradient only with x's")


@mutant("rmsnorm", "a negative eps is accepted", groups=("error",))
def negative_eps_accepted(x, weight, eps=1e-5):
    if weight.shape[0] != x.shape[-1]:
        raise ValueError(f"rmsnorm: weight has shape {tuple(weight.shape)} but x has shape {tuple(x.shape)}")
    return normed(x, weight, eps)


@mutation("rmsnorm", "one scratch buffer is shared by all threads", groups=("threads",))
def scratch_buffer_shared(textbook):
    scratch = {}

    def rmsnorm(x, weight, eps=1e-5):
        scratch["x"] = x.clone()
        time.sleep(1e-4)
        return normed(scratch["x"], weight, eps) if scratch["x"].shape == x.shape else scratch["x"]

    return rmsnorm


@mutation("rmsnorm", "the backward pass reads what the latest forward pass of any thread left", groups=("threads",))
def saved_for_all_threads(textbook):
    saved = {}

    def rmsnorm(x, weight, eps=1e-5):
        own = saved["sum"] = float(x.detach().double().sum())
        time.sleep(1e-4)
        return normed(x, changed_gradient(weight, lambda gradient: gradient + (saved["sum"] - own)), eps)

    return rmsnorm


@mutant("rmsnorm", "a random rounding of the last bits", groups=("repeat",))
def last_bits_random(x, weight, eps=1e-5):
    noise = 1 + torch.finfo(torch.float32).eps * torch.randn(x.shape, device=x.device)
    return (wide(normed(x, weight, eps)) * noise).to(x.dtype)


@mutant("rmsnorm", "the parameters are in another order", groups=("signature",))
def parameters_swapped(weight, x, eps=1e-5):
    return normed(x, weight, eps)


@mutant("rmsnorm", "eps has another default", groups=("signature",))
def another_default(x, weight, eps=1e-6):
    return normed(x, weight, eps)


@mutant("add_rmsnorm", "the second result is x, not the sum")
def sum_not_returned(x, residual, weight, eps=1e-5):
    return normed(x + residual, weight, eps), x


@mutant("add_rmsnorm", "the residual is normalised and x is added afterwards")
def added_after_the_norm(x, residual, weight, eps=1e-5):
    return x + normed(residual, weight, eps), x + residual


@mutant("add_rmsnorm", "the sum is written into the residual", groups=("mutation",))
def residual_overwritten(x, residual, weight, eps=1e-5):
    total = x + residual
    with torch.no_grad():
        residual.copy_(total)
    return normed(total, weight, eps), total


@mutant("add_rmsnorm", "the gradient that arrives at the sum is dropped")
def stream_gradient_dropped(x, residual, weight, eps=1e-5):
    total = x + residual
    return normed(total, weight, eps), changed_gradient(total, torch.zeros_like)


@mutant("add_rmsnorm", "the gradient of the residual leaves out the path through the norm")
def residual_gradient_skips_the_norm(x, residual, weight, eps=1e-5):
    return normed(x + residual.detach(), weight, eps), x + residual


@mutant("add_rmsnorm", "the gradient of x counts the sum twice")
def stream_gradient_counted_twice(x, residual, weight, eps=1e-5):
    total = x + residual
    return normed(total, weight, eps), changed_gradient(x, lambda gradient: 2 * gradient) + residual
