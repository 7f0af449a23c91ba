"""Wrong cross_entropy and linear_cross_entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import mutant, mutation
from ._gradients import changed_gradient
from .normalisation import wide


def losses(logits, targets):
    """One loss a row, in at least float32: right, for the mutants to spoil."""
    return -torch.log_softmax(wide(logits), -1).gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)


def reduced(each, reduction, dtype):
    return (each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()).to(dtype)


@mutant("cross_entropy", "the maximum is not subtracted: infinite on large logits")
def large_logits_overflow(logits, targets, *, reduction="mean"):
    chosen = wide(logits).gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    return reduced(wide(logits).exp().sum(-1).log() - chosen, reduction, logits.dtype)


@mutant("cross_entropy", "log(softmax + 1e-8): confident mistakes cost too little")
def logarithm_clamped(logits, targets, *, reduction="mean"):
    probabilities = torch.softmax(wide(logits), -1).gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    return reduced(-(probabilities + 1e-8).log(), reduction, logits.dtype)


@mutant("cross_entropy", "the logarithm is of base 2")
def bits_instead_of_nats(logits, targets, *, reduction="mean"):
    return reduced(losses(logits, targets) / 0.6931471805599453, reduction, logits.dtype)


@mutant("cross_entropy", "the mean runs over rows and vocabulary")
def mean_over_the_vocabulary(logits, targets, *, reduction="mean"):
    each = losses(logits, targets)
    return reduced(each / logits.shape[-1] if reduction == "mean" else each, reduction, logits.dtype)


@mutant("cross_entropy", "the mean is taken over the first leading dimension only")
def mean_of_the_batch_alone(logits, targets, *, reduction="mean"):
    each = losses(logits, targets)
    if reduction == "mean" and each.ndim > 1:
        return (each.sum() / each.shape[0]).to(logits.dtype)
    return reduced(each, reduction, logits.dtype)


@mutant("cross_entropy", "reduction is ignored: always the mean")
def reduction_ignored(logits, targets, *, reduction="mean"):
    return reduced(losses(logits, targets), "mean", logits.dtype)


@mutant("cross_entropy", "target 0 is taken for padding")
def target_zero_ignored(logits, targets, *, reduction="mean"):
    return reduced(losses(logits, targets) * (targets != 0), reduction, logits.dtype)


@mutant("cross_entropy", "targets are one off, because the labels are shifted again")
def targets_shifted(logits, targets, *, reduction="mean"):
    return reduced(losses(logits, (targets + 1) % logits.shape[-1]), reduction, logits.dtype)


@mutant("cross_entropy", "a little label smoothing")
def labels_smoothed(logits, targets, *, reduction="mean"):
    each = losses(logits, targets)
    uniform = torch.logsumexp(wide(logits), -1) - wide(logits).mean(-1)
    return reduced(0.99 * each + 0.01 * uniform, reduction, logits.dtype)


@mutant("cross_entropy", "the running sum of exponentials is kept in the logits' dtype")
def sum_in_the_logits_dtype(logits, targets, *, reduction="mean"):
    shifted = logits - logits.amax(-1, keepdim=True)
    total = torch.zeros_like(shifted[..., 0])
    for block in shifted.split(16, dim=-1):
        total = total + block.exp().sum(-1)
    each = total.log() - shifted.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    return reduced(each, reduction, logits.dtype)


@mutant("cross_entropy", "the gradient of the mean is not divided by the number of rows")
def gradient_not_averaged(logits, targets, *, reduction="mean"):
    count = max(targets.numel(), 1) if reduction == "mean" else 1
    return reduced(
        losses(changed_gradient(logits, lambda gradient: gradient * count), targets), reduction, logits.dtype
    )


@mutant("cross_entropy", "the gradient is softmax alone: one is not subtracted at the target")
def one_hot_left_out(logits, targets, *, reduction="mean"):
    chosen = wide(logits).detach().gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    return reduced(torch.logsumexp(wide(logits), -1) - chosen, reduction, logits.dtype)


@mutation("cross_entropy", "the gradient is written over the logits in the forward pass", groups=("mutation",))
def gradient_replaces_the_logits(textbook):
    def cross_entropy(logits, targets, *, reduction="mean"):
        loss = textbook(logits, targets, reduction=reduction)
        with torch.no_grad():
            logits.copy_(torch.softmax(logits, -1))
        return loss

    return cross_entropy


@mutant("cross_entropy", "the upstream gradient is taken for 1, as after loss.backward()")
def upstream_taken_for_one(logits, targets, *, reduction="mean"):
    return reduced(losses(changed_gradient_of_one(logits, targets, reduction), targets), reduction, logits.dtype)


def changed_gradient_of_one(logits, targets, reduction):
    """`logits`, whose gradient is what it would be for an upstream gradient of ones."""

    def without_upstream(_):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            total = reduced(losses(leaf, targets), reduction, torch.promote_types(logits.dtype, torch.float32)).sum()
        return torch.autograd.grad(total, leaf)[0]

    return changed_gradient(logits, without_upstream)


def _chunked(x, weight, targets, rows=64, last=True):
    """The losses chunk by chunk, as memory-saving implementations take them."""
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    stops = range(rows, len(x) + (rows if last else 1), rows)
    return [losses(F.linear(wide(x[stop - rows : stop]), wide(weight)), targets[stop - rows : stop]) for stop in stops]


@mutant("linear_cross_entropy", "the last, shorter chunk of rows is dropped")
def last_chunk_dropped(x, weight, targets, *, reduction="mean"):
    count = targets.numel()
    if reduction == "none" or count < 64:
        return reduced(losses(F.linear(wide(x), wide(weight)), targets), reduction, x.dtype)
    total = torch.cat(_chunked(x, weight, targets, last=False)).sum()
    return (total / count if reduction == "mean" else total).to(x.dtype)


@mutant("linear_cross_entropy", "the mean of the chunks' means, although the last chunk is shorter")
def mean_of_chunk_means(x, weight, targets, *, reduction="mean"):
    if reduction != "mean":
        return reduced(losses(F.linear(wide(x), wide(weight)), targets), reduction, x.dtype)
    return torch.stack([chunk.mean() for chunk in _chunked(x, weight, targets)]).mean().to(x.dtype)


@mutant("linear_cross_entropy", "the gradient of the weight is the last chunk's instead of the sum")
def weight_gradient_overwritten(x, weight, targets, *, reduction="mean"):
    rows, flat = 4, targets.reshape(-1)
    x_rows = wide(x).reshape(-1, x.shape[-1])
    starts = list(range(0, len(flat), rows))
    weights = [wide(weight) if start == starts[-1] else wide(weight).detach() for start in starts]
    parts = [
        losses(F.linear(x_rows[s : s + rows], w), flat[s : s + rows]) for s, w in zip(starts, weights, strict=True)
    ]
    each = torch.cat(parts).reshape(targets.shape) if parts else losses(F.linear(wide(x), wide(weight)), targets)
    return reduced(each, reduction, x.dtype)


@mutant("linear_cross_entropy", "the gradient of x misses the factor of the reduction")
def input_gradient_not_averaged(x, weight, targets, *, reduction="mean"):
    count = max(targets.numel(), 1) if reduction == "mean" else 1
    logits = F.linear(wide(changed_gradient(x, lambda gradient: gradient * count)), wide(weight))
    return reduced(losses(logits, targets), reduction, x.dtype)


@mutant("linear_cross_entropy", "the logits are rounded to bfloat16 whatever the dtype")
def logits_in_bfloat16(x, weight, targets, *, reduction="mean"):
    return reduced(losses(F.linear(x.bfloat16(), weight.bfloat16()), targets), reduction, x.dtype)


@mutant("linear_cross_entropy", "the weight is used as (d_model, vocab) where it is square")
def square_weight_misread(x, weight, targets, *, reduction="mean"):
    square = weight.shape[0] == weight.shape[1]
    return reduced(losses(F.linear(wide(x), wide(weight.mT if square else weight)), targets), reduction, x.dtype)
