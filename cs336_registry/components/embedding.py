"""The table that turns token ids into vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import ArgumentMaker
from ..checks import require_floating, require_in_range, require_integer
from ..component import Arguments, Case, Component, ErrorCase, Law, Workload

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def embedding(
    token_ids: Int[Tensor, "*shape"], weight: Float[Tensor, "vocab_size d_model"]
) -> Float[Tensor, "*shape d_model"]:
    """Look up one row per token id: `weight[token_ids]`.

    token_ids: integers in 0..vocab_size-1, any shape. weight: one row per token. The rows are copied, so the result is
    exact and has the dtype of `weight`; the gradient of a row is the sum over the places where its token occurs.
    Raises ValueError where an id is out of range (looked at on the CPU only) or `weight` is not a matrix; TypeError for
    dtypes.
    Source: Bengio et al. 2003, "A Neural Probabilistic Language Model", https://www.jmlr.org/papers/v3/bengio03a.html.
    """
    raise NotImplementedError


def check(token_ids: Tensor, weight: Tensor) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    require_integer("embedding", token_ids=token_ids)
    require_floating("embedding", weight=weight)
    if weight.ndim != 2:
        raise ValueError(f"embedding: weight has shape {tuple(weight.shape)}: it must be (vocab_size, d_model)")
    require_in_range(
        "embedding", "token_ids", token_ids, weight.shape[0], "use the tokenizer that this vocabulary belongs to"
    )


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    low, high = sizes.get("ids", (0, sizes["vocab_size"]))
    return {
        "token_ids": make.integers(*sizes["shape"], low=low, high=high),
        "weight": make.normal(sizes["vocab_size"], sizes["d_model"]),
    }


def oracle(token_ids: Tensor, weight: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.embedding(token_ids, weight)


def rows_are_exact_copies(embedding, make: ArgumentMaker) -> None:
    weight, token_ids = make.normal(19, 7), make.integers(4, 5, high=19)
    result = embedding(token_ids, weight)
    for row, column in ((0, 0), (1, 3), (3, 4)):
        assert (result[row, column] == weight[token_ids[row, column]]).all(), "a row is not an exact copy"


def unused_rows_get_no_gradient(embedding, make: ArgumentMaker) -> None:
    import torch

    weight = make.normal(6, 5).requires_grad_()
    token_ids = make.integers(8, low=2, high=3)
    (gradient,) = torch.autograd.grad(embedding(token_ids, weight).sum(), weight)
    counts = torch.tensor([0, 0, 8, 0, 0, 0], dtype=gradient.dtype, device=gradient.device)
    assert (gradient == counts[:, None]).all(), "the gradient of a row is not the number of its uses"


contract = Component(
    signature=embedding,
    kind="op",
    summary="one row of a table per token id",
    formula="weight[token_ids]",
    paper="https://www.jmlr.org/papers/v3/bengio03a.html",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("weight",),
    cases=(
        Case(id="course", sizes={"shape": (4, 12), "vocab_size": 1000, "d_model": 64}),
        Case(id="odd", sizes={"shape": (5, 123), "vocab_size": 97, "d_model": 41}),
        Case(id="one_token", sizes={"shape": (), "vocab_size": 5, "d_model": 8}),
        Case(id="no_tokens", sizes={"shape": (0, 4), "vocab_size": 5, "d_model": 8}),
        Case(id="one_feature", sizes={"shape": (3, 2), "vocab_size": 7, "d_model": 1}),
        Case(id="same_token", sizes={"shape": (63,), "vocab_size": 300, "d_model": 33, "ids": (299, 300)}),
        Case(id="leading", sizes={"shape": (2, 3, 4, 5), "vocab_size": 50, "d_model": 16}),
    ),
    error_cases=(
        ErrorCase(
            id="id_too_large",
            # On the CPU, where the values are looked at; on a GPU the lookup itself would stop the process.
            arguments=lambda make: {
                "token_ids": make.integers(3, low=8, high=9).cpu(),
                "weight": make.normal(8, 4).cpu(),
            },
            match="token_ids contains 8, outside 0..7",
        ),
        ErrorCase(
            id="negative_id",
            arguments=lambda make: {
                "token_ids": make.integers(3, low=-1, high=0).cpu(),
                "weight": make.normal(8, 4).cpu(),
            },
            match="token_ids contains -1, outside 0..7",
        ),
        ErrorCase(
            id="ids_not_integers",
            arguments=lambda make: {"token_ids": make.normal(3), "weight": make.normal(8, 4)},
            error=TypeError,
            match="embedding: token_ids has dtype",
        ),
        ErrorCase(
            id="weight_not_a_matrix",
            arguments=lambda make: {"token_ids": make.integers(3, high=8), "weight": make.normal(8)},
            match=r"weight has shape \(8,\): it must be \(vocab_size, d_model\)",
        ),
    ),
    laws=(
        Law(id="copies", statement="every result row is an exact copy of its token's row", check=rows_are_exact_copies),
        Law(
            id="gradient_counts",
            statement="the gradient of a row sums over the uses of its token and is zero without any",
            check=unused_rows_get_no_gradient,
        ),
    ),
    workloads=tuple(
        Workload(
            id=f"{tokens}_of_{vocab_size}x{d_model}",
            sizes={"shape": (tokens,), "vocab_size": vocab_size, "d_model": d_model},
            bytes_moved=lambda itemsize, n=tokens * d_model, ids=tokens: 2 * n * itemsize + 8 * ids,
            backward_bytes_moved=lambda itemsize, n=tokens * d_model, table=vocab_size * d_model, ids=tokens: (
                (n + table) * itemsize + 8 * ids
            ),
            backward_flops=1.0 * tokens * d_model,
        )
        for tokens, vocab_size, d_model in ((2048, 10000, 512), (16384, 50257, 768), (16384, 128256, 4096))
    ),
    adapter="run_embedding",
)
