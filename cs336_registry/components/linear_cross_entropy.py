"""The output projection and its cross entropy in one step, so that the logits need not be kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..arguments import ArgumentMaker
from ..checks import require_floating, require_same_dtype
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload
from .cross_entropy import check_reduction, check_targets

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def linear_cross_entropy(
    x: Float[Tensor, "*leading d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, "*leading"],
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "*leading"]:
    """Cross entropy in nats of `x @ weight.T`: `log(sum(exp(x @ weight.T))) - (x @ weight.T)[target]`.

    x: the last hidden states, any leading dimensions. weight: the output embedding, one row per vocabulary entry.
    targets: integer ids in [0, vocab), the leading shape of `x`. reduction: as for cross_entropy. Exact: every logit
    counts, in the gradients of `x` and `weight` too. Products accumulate in float32 (float64 stays float64); logits may
    be rounded to the dtype of `x` once; the result has the dtype of `x`.
    Raises ValueError for shapes that do not fit, an unknown reduction and (on the CPU) targets outside the vocabulary,
    TypeError where x and weight differ in dtype or targets are not integers.
    Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
    https://arxiv.org/abs/2411.09009.
    """
    raise NotImplementedError


def check(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    check_reduction("linear_cross_entropy", reduction)
    require_floating("linear_cross_entropy", x=x, weight=weight)
    require_same_dtype("linear_cross_entropy", x=x, weight=weight)
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy: weight has shape {tuple(weight.shape)} but x has shape {tuple(x.shape)}: weight "
            f"must be (vocab, d_model) with the d_model of x's last dimension"
        )
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: targets have shape {tuple(targets.shape)} but x has shape {tuple(x.shape)}: "
            f"targets must have the shape of x without its last dimension"
        )
    check_targets("linear_cross_entropy", targets, weight.shape[0])


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    leading, d_model, vocab = sizes.get("leading", ()), sizes["d_model"], sizes["vocab"]
    return {
        "x": make.normal(*leading, d_model),
        "weight": make.normal(vocab, d_model, scale=sizes.get("scale", 1.0) / d_model**0.5),
        "targets": make.integers(*leading, high=vocab),
        "reduction": sizes.get("reduction", "mean"),
    }


def oracle(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    import torch

    logits = torch.nn.functional.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    rows = logits.reshape(targets.numel(), weight.shape[0])
    loss = torch.nn.functional.cross_entropy(rows, targets.reshape(-1).long(), reduction=reduction)
    return (loss.reshape(targets.shape) if reduction == "none" else loss).to(x.dtype)


def a_common_row_changes_nothing(linear_cross_entropy, make: ArgumentMaker) -> None:
    # Small integers: weight + row and every dot product are exact in every dtype.
    x = make.tensor(make.generator.integers(-2, 3, (5, 8)))
    weight = make.generator.integers(-2, 3, (23, 8))
    row = make.generator.integers(-2, 3, 8)
    targets = make.integers(5, high=23)
    moved = linear_cross_entropy(x, make.tensor(weight + row), targets, reduction="none")
    assert_nearly_equal(moved, linear_cross_entropy(x, make.tensor(weight), targets, reduction="none"))


def reductions_agree(linear_cross_entropy, make: ArgumentMaker) -> None:
    x, weight, targets = make.normal(3, 5, 16), make.normal(29, 16, scale=0.25), make.integers(3, 5, high=29)
    each = linear_cross_entropy(x, weight, targets, reduction="none")
    assert each.shape == targets.shape, f"reduction='none' gave shape {tuple(each.shape)}"
    total = each.double().sum()
    assert_nearly_equal(linear_cross_entropy(x, weight, targets, reduction="sum"), total.to(x.dtype), what="the sum")
    assert_nearly_equal(linear_cross_entropy(x, weight, targets), (total / 15).to(x.dtype), what="the mean")


def weight_gradients_sum_to_zero(linear_cross_entropy, make: ArgumentMaker) -> None:
    import torch

    x, weight = make.normal(6, 16), make.normal(29, 16, scale=0.25).detach().requires_grad_()
    losses = linear_cross_entropy(x, weight, make.integers(6, high=29), reduction="none")
    (gradient,) = torch.autograd.grad(losses, weight, make.normal(6))
    assert float(gradient.double().abs().sum()) > 0, "the gradient is zero everywhere"
    assert_nearly_equal(gradient.double().sum(0).to(weight.dtype), torch.zeros_like(gradient[0]))


contract = Component(
    signature=linear_cross_entropy,
    kind="op",
    summary="cross entropy of x @ weight.T without keeping the logits",
    formula="log Σ exp(x Wᵀ) − (x Wᵀ)[target]",
    paper="https://arxiv.org/abs/2411.09009",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("x", "weight"),
    tolerance=Tolerance(
        floor=8.0,
        absolute=1024.0,
        reason="two sums in sequence, over d_model and over the vocabulary, each in an order of its own; the loss is "
        "the difference of a log-sum-exp and a logit of a few hundred in the cases with large logits",
    ),
    gradient_tolerance=Tolerance(
        factor=3.0,
        floor=8.0,
        reason="gradients of the logits may be rounded to the dtype once before two matrix products",
    ),
    cases=(
        Case(id="small", sizes={"leading": (2, 12), "d_model": 64, "vocab": 101}),
        Case(id="odd", sizes={"leading": (5, 7), "d_model": 41, "vocab": 123}),
        Case(id="sum", sizes={"leading": (9,), "d_model": 32, "vocab": 50, "reduction": "sum"}),
        Case(id="none", sizes={"leading": (3, 5), "d_model": 24, "vocab": 77, "reduction": "none"}),
        Case(id="square", sizes={"leading": (7,), "d_model": 24, "vocab": 24}),
        Case(id="one_row", sizes={"d_model": 16, "vocab": 9}),
        Case(id="no_rows", sizes={"leading": (0, 4), "d_model": 16, "vocab": 9, "reduction": "none"}),
        Case(id="large_logits", sizes={"leading": (6,), "d_model": 32, "vocab": 50, "scale": 30.0}),
        Case(id="many_rows", sizes={"leading": (300,), "d_model": 32, "vocab": 130}),
    ),
    error_cases=(
        ErrorCase(
            id="unknown_reduction",
            arguments=lambda make: {
                "x": make.normal(2, 8),
                "weight": make.normal(5, 8),
                "targets": make.integers(2, high=5),
                "reduction": "average",
            },
            match="reduction is 'average'",
        ),
        ErrorCase(
            id="weight_shape",
            arguments=lambda make: {
                "x": make.normal(2, 8),
                "weight": make.normal(8, 5),
                "targets": make.integers(2, high=5),
            },
            match=r"weight has shape \(8, 5\) but x has shape \(2, 8\)",
        ),
        ErrorCase(
            id="targets_shape",
            arguments=lambda make: {
                "x": make.normal(2, 8),
                "weight": make.normal(5, 8),
                "targets": make.integers(3, high=5),
            },
            match=r"targets have shape \(3,\) but x has shape \(2, 8\)",
        ),
        ErrorCase(
            id="mixed_dtypes",
            arguments=lambda make: {
                "x": make.normal(2, 8).float(),
                "weight": make.normal(5, 8).double(),
                "targets": make.integers(2, high=5),
            },
            error=TypeError,
            match="weight has dtype torch.float64 but x has torch.float32",
        ),
        ErrorCase(
            id="target_too_large",
            arguments=lambda make: {
                "x": make.normal(2, 8),
                "weight": make.normal(5, 8),
                "targets": make.integers(2, low=5, high=6).cpu(),
            },
            match=r"targets contains 5, outside 0\.\.4",
        ),
    ),
    laws=(
        Law(
            id="shift",
            statement="a row added to every row of weight changes nothing",
            check=a_common_row_changes_nothing,
        ),
        Law(id="reductions", statement="sum and mean are those of the losses of 'none'", check=reductions_agree),
        Law(
            id="gradient_sum",
            statement="the weight's gradient sums to zero over the vocabulary",
            check=weight_gradients_sum_to_zero,
        ),
    ),
    workloads=tuple(
        Workload(
            id=f"{rows}x{d_model}x{vocab}",
            sizes={"leading": (rows,), "d_model": d_model, "vocab": vocab},
            bytes_moved=lambda itemsize, n=rows * d_model + vocab * d_model: n * itemsize,
            backward_bytes_moved=lambda itemsize, n=rows * d_model + vocab * d_model: 3 * n * itemsize,
            flops=2.0 * rows * d_model * vocab,
            backward_flops=4.0 * rows * d_model * vocab,
        )
        for rows, d_model, vocab in ((512, 256, 1000), (4096, 768, 10000), (8192, 2048, 32000), (8192, 4096, 128256))
    ),
)
