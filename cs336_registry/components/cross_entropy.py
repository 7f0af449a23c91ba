"""Cross entropy of next-token logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..arguments import ArgumentMaker
from ..checks import require_floating, require_in_range, require_integer
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Float[Tensor, "*leading vocab"],
    targets: Int[Tensor, "*leading"],
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "*leading"]:
    """Negative log-likelihood in nats of each target under softmax(logits): `log(sum(exp(logits))) - logits[target]`.

    logits: scores before softmax, any leading dimensions. targets: integer ids in [0, vocab), the leading shape of
    `logits`. reduction: "mean" or "sum" over all targets (a 0-d tensor; the mean of no target is NaN), or "none" (one
    loss per target). The sum is taken in float32 (float64 stays float64) after subtracting the largest logit, so any
    finite logits give a finite loss; the result has the dtype of `logits`.
    Raises ValueError for an unknown reduction, shapes that do not fit or an empty vocabulary, TypeError for logits that
    are not floating or targets that are not integers, and, where looking needs no wait for a device (on the CPU),
    ValueError for a target outside the vocabulary. There is no ignored index.
    Source: Goodfellow et al. 2016, "Deep Learning", section 6.2.1.1,
    https://www.deeplearningbook.org/contents/mlp.html.
    """
    raise NotImplementedError


def check(logits: Tensor, targets: Tensor, reduction: str) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    check_reduction("cross_entropy", reduction)
    require_floating("cross_entropy", logits=logits)
    if logits.ndim == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: targets have shape {tuple(targets.shape)} but logits have shape {tuple(logits.shape)}: "
            f"targets must have the shape of logits without the last (vocabulary) dimension"
        )
    check_targets("cross_entropy", targets, logits.shape[-1])


def check_reduction(name: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}: it must be one of {', '.join(map(repr, REDUCTIONS))}")


def check_targets(name: str, targets: Tensor, vocab_size: int) -> None:
    require_integer(name, targets=targets)
    if vocab_size == 0:
        raise ValueError(f"{name}: the vocabulary has 0 entries: there must be at least one logit per row")
    require_in_range(name, "targets", targets, vocab_size, "every target must be an entry of the vocabulary")


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    leading, vocab = sizes.get("leading", ()), sizes["vocab"]
    logits = make.normal(*leading, vocab, scale=sizes.get("scale", 2.0), mean=sizes.get("mean", 0.0))
    targets = make.integers(*leading, high=vocab)
    return {
        "logits": logits,
        "targets": targets.int() if sizes.get("int32") else targets,
        "reduction": sizes.get("reduction", "mean"),
    }


def oracle(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    import torch

    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = wide.reshape(targets.numel(), logits.shape[-1])
    loss = torch.nn.functional.cross_entropy(rows, targets.reshape(-1).long(), reduction=reduction)
    return (loss.reshape(targets.shape) if reduction == "none" else loss).to(logits.dtype)


def adding_a_constant_changes_nothing(cross_entropy, make: ArgumentMaker) -> None:
    # Multiples of 64 up to 8448 are exact in every dtype, so the shift itself rounds nothing.
    steps = make.generator.integers(-3, 4, (6, 37)) * 64.0
    targets = make.integers(6, high=37)
    shifted = cross_entropy(make.tensor(steps + 8192), targets, reduction="none")
    # The log-sum-exp may be rounded before a logit is taken off: at 8192, some 32 times the losses, two roundings.
    assert_nearly_equal(shifted, cross_entropy(make.tensor(steps), targets, reduction="none"), roundings=64)


def gradients_sum_to_zero(cross_entropy, make: ArgumentMaker) -> None:
    import torch

    logits = make.normal(5, 33).detach().requires_grad_()
    losses = cross_entropy(logits, make.integers(5, high=33), reduction="none")
    (gradient,) = torch.autograd.grad(losses, logits, make.normal(5))
    assert float(gradient.double().abs().sum()) > 0, "the gradient is zero everywhere"
    assert_nearly_equal(gradient.double().sum(-1).to(logits.dtype), torch.zeros_like(gradient[:, 0]))


def reductions_agree(cross_entropy, make: ArgumentMaker) -> None:
    logits, targets = make.normal(4, 7, 19), make.integers(4, 7, high=19)
    each = cross_entropy(logits, targets, reduction="none")
    assert each.shape == targets.shape, f"reduction='none' gave shape {tuple(each.shape)}"
    total = each.double().sum().to(each.dtype)
    assert_nearly_equal(cross_entropy(logits, targets, reduction="sum"), total, what="the sum")
    assert_nearly_equal(cross_entropy(logits, targets), (each.double().sum() / 28).to(each.dtype), what="the mean")


def equal_logits_cost_log_vocab(cross_entropy, make: ArgumentMaker) -> None:
    import math

    loss = cross_entropy(make.tensor([[0.25] * 41] * 3), make.integers(3, high=41))
    assert_nearly_equal(loss, make.tensor(math.log(41)))


contract = Component(
    signature=cross_entropy,
    kind="op",
    summary="negative log-likelihood of the targets under softmax(logits)",
    formula="log Σ exp(logits) − logits[target]",
    paper="https://www.deeplearningbook.org/contents/mlp.html",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("logits",),
    tolerance=Tolerance(
        absolute=1024.0,
        reason="the loss is the difference of a log-sum-exp and a logit, which reach thousands in the cases",
    ),
    gradient_tolerance=Tolerance(
        factor=3.0, floor=4.0, absolute=2.0, reason="p - 1 is a difference of numbers near 1 where the target's p is"
    ),
    cases=(
        Case(id="course", sizes={"leading": (8,), "vocab": 5}),
        Case(id="batch_and_sequence", sizes={"leading": (3, 12), "vocab": 101}),
        Case(id="sum", sizes={"leading": (9, 7), "vocab": 41, "reduction": "sum"}),
        Case(id="none", sizes={"leading": (5, 3), "vocab": 123, "reduction": "none"}),
        Case(id="one_row", sizes={"vocab": 1000}),
        Case(id="one_entry", sizes={"leading": (4,), "vocab": 1, "reduction": "none"}),
        Case(id="no_rows", sizes={"leading": (0, 4), "vocab": 8, "reduction": "none"}),
        Case(id="no_rows_sum", sizes={"leading": (0, 4), "vocab": 8, "reduction": "sum"}),
        Case(id="large_logits", sizes={"leading": (6,), "vocab": 50, "scale": 100.0, "mean": 1000.0}),
        Case(id="int32_targets", sizes={"leading": (6,), "vocab": 11, "int32": True}),
        Case(id="wide", sizes={"leading": (3,), "vocab": 32003}),
    ),
    error_cases=(
        ErrorCase(
            id="unknown_reduction",
            arguments=lambda make: {
                "logits": make.normal(2, 8),
                "targets": make.integers(2, high=8),
                "reduction": "average",
            },
            match="reduction is 'average': it must be one of 'mean', 'sum', 'none'",
        ),
        ErrorCase(
            id="shapes",
            arguments=lambda make: {"logits": make.normal(2, 8), "targets": make.integers(3, high=8)},
            match=r"targets have shape \(3,\) but logits have shape \(2, 8\)",
        ),
        ErrorCase(
            id="floating_targets",
            arguments=lambda make: {"logits": make.normal(2, 8), "targets": make.normal(2).float()},
            error=TypeError,
            match="targets has dtype torch.float32",
        ),
        ErrorCase(
            id="integer_logits",
            arguments=lambda make: {"logits": make.integers(2, 8, high=8), "targets": make.integers(2, high=8)},
            error=TypeError,
            match="logits has dtype torch.int64: pass floating-point values",
        ),
        ErrorCase(
            id="empty_vocabulary",
            arguments=lambda make: {"logits": make.normal(2, 0), "targets": make.integers(2, high=8)},
            match="the vocabulary has 0 entries",
        ),
        ErrorCase(
            id="target_too_large",
            arguments=lambda make: {"logits": make.normal(2, 8), "targets": make.integers(2, low=8, high=9).cpu()},
            match=r"targets contains 8, outside 0\.\.7",
        ),
        ErrorCase(
            id="target_negative",
            arguments=lambda make: {"logits": make.normal(2, 8), "targets": make.integers(2, high=8).cpu() - 100},
            match=r"targets contains -[0-9]+, outside 0\.\.7",
        ),
    ),
    laws=(
        Law(
            id="shift", statement="adding a constant to a row changes nothing", check=adding_a_constant_changes_nothing
        ),
        Law(
            id="gradient_sum",
            statement="a row's gradient sums to zero over the vocabulary",
            check=gradients_sum_to_zero,
        ),
        Law(id="reductions", statement="sum and mean are those of the losses of 'none'", check=reductions_agree),
        Law(id="uniform", statement="equal logits cost log(vocab)", check=equal_logits_cost_log_vocab),
    ),
    workloads=tuple(
        Workload(
            id=f"{rows}x{vocab}",
            sizes={"leading": (rows,), "vocab": vocab},
            bytes_moved=lambda itemsize, n=rows * vocab: n * itemsize,
            backward_bytes_moved=lambda itemsize, n=rows * vocab: 2 * n * itemsize,
            flops=4.0 * rows * vocab,
        )
        for rows, vocab in ((256, 1000), (4096, 10000), (8192, 32000), (4096, 128256))
    ),
    adapter="run_cross_entropy",
)
