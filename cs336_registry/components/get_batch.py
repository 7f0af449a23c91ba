"""Random windows of a token array: the inputs and targets of one training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..arguments import ArgumentMaker
from ..component import Arguments, Case, Component, ErrorCase, Law, Workload

if TYPE_CHECKING:
    import numpy as np
    import torch
    from jaxtyping import Int, Integer
    from torch import Tensor


def get_batch(
    dataset: Integer[np.ndarray, " tokens"],
    batch_size: int,
    context_length: int,
    device: str | torch.device = "cpu",
    *,
    generator: np.random.Generator | None = None,
) -> tuple[Int[Tensor, "batch_size context_length"], Int[Tensor, "batch_size context_length"]]:
    """Cut windows at random places: `inputs[b] = dataset[start_b : start_b + context_length]`, targets one token later.

    dataset: one array or memory map of integers; only the windows are read from it. Places are drawn uniformly, with
    replacement, as `generator.integers(0, len(dataset) - context_length, batch_size)`, so equal generators give equal
    batches in every backend; without a generator a fresh one is used. Both results are int64 on `device` and own their
    memory.
    Raises ValueError where dataset is not one-dimensional or has at most context_length tokens, or a size is not
    positive; TypeError where dataset is no integer array; PyTorch's own error for an unknown device.
    Source: the next-token objective of Bengio et al. 2003, https://www.jmlr.org/papers/v3/bengio03a.html.
    """
    raise NotImplementedError


def check(dataset: Any, batch_size: int, context_length: int) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    import numpy as np

    if not isinstance(dataset, np.ndarray) or dataset.dtype.kind not in "iu":
        found = dataset.dtype if isinstance(dataset, np.ndarray) else type(dataset).__name__
        raise TypeError(f"get_batch: dataset is {found}: pass a numpy array or memory map of integers")
    if dataset.ndim != 1:
        raise ValueError(
            f"get_batch: dataset has shape {dataset.shape}: it must be one long sequence (dataset.reshape(-1))"
        )
    if batch_size < 1 or context_length < 1:
        raise ValueError(
            f"get_batch: batch_size is {batch_size} and context_length is {context_length}: both must be at least 1"
        )
    if len(dataset) <= context_length:
        raise ValueError(
            f"get_batch: dataset has {len(dataset)} tokens but context_length is {context_length}: a window and its "
            f"next token "
            f"need {context_length + 1}"
        )


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    import numpy as np

    sizes = case.sizes
    dtype = np.dtype(sizes.get("dtype", "uint16"))
    dataset = make.generator.integers(0, sizes.get("vocab_size", 500), sizes["tokens"]).astype(dtype)
    if sizes.get("on_disk", False):
        path = make.file(dataset.tobytes(), "tokens.bin")
        dataset = np.memmap(path, dtype=dtype, mode="r")
    return {
        "dataset": dataset,
        "batch_size": sizes["batch_size"],
        "context_length": sizes["context_length"],
        "device": make.device,
        "generator": np.random.default_rng(case.seed),
    }


def oracle(
    dataset: np.ndarray, batch_size: int, context_length: int, device: str, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    import torch

    starts = generator.integers(0, len(dataset) - context_length, batch_size)
    windows = [[int(token) for token in dataset[start : start + context_length + 1]] for start in starts]
    tokens = torch.tensor(windows, dtype=torch.int64, device=device)
    return tokens[:, :-1], tokens[:, 1:]


def every_window_is_possible(get_batch, make: ArgumentMaker) -> None:
    import numpy as np

    inputs, targets = get_batch(np.arange(10), 2000, 7, make.device, generator=np.random.default_rng(0))
    assert (targets == inputs + 1).all(), "targets must be the inputs one token later"
    starts = set(inputs[:, 0].tolist())
    assert starts == {0, 1, 2}, f"10 tokens hold windows of 7 and a target at 0, 1 and 2; found {sorted(starts)}"


def windows_are_uniform(get_batch, make: ArgumentMaker) -> None:
    import numpy as np

    inputs, _ = get_batch(np.arange(100), 32_000, 36, make.device, generator=np.random.default_rng(1))
    counts = np.bincount(inputs[:, 0].cpu().numpy(), minlength=64)
    # 500 expected at each of the 64 places; six standard deviations of a binomial count are 134.
    assert len(counts) == 64 and (abs(counts - 500) < 134).all(), f"places are not uniform: {counts.tolist()}"


def fresh_without_a_generator(get_batch, make: ArgumentMaker) -> None:
    import numpy as np

    one, other = (get_batch(np.arange(1_000_000), 8, 4, make.device)[0] for _ in range(2))
    assert (one != other).any(), "two calls without a generator gave the same batch"


def results_own_their_memory(get_batch, make: ArgumentMaker) -> None:
    import numpy as np

    dataset = np.arange(50, dtype=np.int64)
    inputs, targets = get_batch(dataset, 3, 8, make.device, generator=np.random.default_rng(2))
    kept = targets.clone()
    inputs.zero_()
    assert (dataset == np.arange(50)).all(), "writing into the inputs changed the dataset"
    assert (targets == kept).all(), "writing into the inputs changed the targets"


contract = Component(
    signature=get_batch,
    kind="op",
    summary="random windows of a token array, with the next tokens as targets",
    formula="dataset[start : start + context_length], dataset[start + 1 : start + context_length + 1]",
    paper="https://www.jmlr.org/papers/v3/bengio03a.html",
    arguments=arguments,
    oracle=oracle,
    exact=True,
    mutates=("generator",),
    cases=(
        Case(id="course", sizes={"tokens": 100, "batch_size": 32, "context_length": 7, "dtype": "int64"}),
        Case(id="uint16", sizes={"tokens": 1000, "batch_size": 5, "context_length": 63, "vocab_size": 65536}),
        Case(
            id="uint32",
            sizes={"tokens": 1000, "batch_size": 3, "context_length": 9, "dtype": "uint32", "vocab_size": 2**32},
        ),
        Case(id="memory_map", sizes={"tokens": 5000, "batch_size": 8, "context_length": 64, "on_disk": True}),
        Case(id="one_window", sizes={"tokens": 9, "batch_size": 4, "context_length": 8}),
        Case(id="one_token", sizes={"tokens": 2, "batch_size": 1, "context_length": 1}),
        Case(id="other_seed", sizes={"tokens": 300, "batch_size": 7, "context_length": 5}, seed=1),
    ),
    error_cases=(
        ErrorCase(
            id="too_short",
            arguments=lambda make: {"dataset": _tokens(8), "batch_size": 2, "context_length": 8},
            match="dataset has 8 tokens but context_length is 8",
        ),
        ErrorCase(
            id="no_batch",
            arguments=lambda make: {"dataset": _tokens(8), "batch_size": 0, "context_length": 4},
            match="batch_size is 0 and context_length is 4",
        ),
        ErrorCase(
            id="negative_context",
            arguments=lambda make: {"dataset": _tokens(8), "batch_size": 2, "context_length": -4},
            match="context_length is -4",
        ),
        ErrorCase(
            id="two_dimensions",
            arguments=lambda make: {"dataset": _tokens(8).reshape(2, 4), "batch_size": 2, "context_length": 2},
            match=r"dataset has shape \(2, 4\)",
        ),
        ErrorCase(
            id="not_integers",
            arguments=lambda make: {"dataset": _tokens(8) * 1.0, "batch_size": 2, "context_length": 2},
            error=TypeError,
            match="dataset is float64",
        ),
        ErrorCase(
            id="a_list",
            arguments=lambda make: {"dataset": [1, 2, 3], "batch_size": 2, "context_length": 2},
            error=TypeError,
            match="dataset is list",
        ),
    ),
    laws=(
        Law(
            id="every_window",
            statement="every place that has a next token occurs, and no other",
            check=every_window_is_possible,
        ),
        Law(id="uniform", statement="places are uniform", check=windows_are_uniform),
        Law(id="fresh", statement="without a generator, calls differ", check=fresh_without_a_generator),
        Law(id="memory", statement="the results share memory with nothing", check=results_own_their_memory),
    ),
    workloads=tuple(
        Workload(
            id=f"{batch_size}x{context_length}_of_{tokens}",
            sizes={"tokens": tokens, "batch_size": batch_size, "context_length": context_length, "vocab_size": 50257},
            # Tokens of two bytes are read once and written twice as int64.
            bytes_moved=lambda itemsize, n=batch_size * context_length: 18 * n,
        )
        for batch_size, context_length, tokens in ((32, 256, 1_000_000), (512, 1024, 10_000_000))
    ),
    adapter="run_get_batch",
)


def _tokens(count: int) -> np.ndarray:
    import numpy as np

    return np.arange(count)
