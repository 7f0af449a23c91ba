"""The whole decoder-only language model: token ids in, logits of the next token out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import ArgumentMaker
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload
from . import transformer_block

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def transformer_lm(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float | None = 10000.0,
    *,
    num_kv_heads: int | None = None,
    norm: str = "rms",
    position: str = "rope",
    ffn: str = "swiglu",
    tie_embeddings: bool = False,
    norm_eps: float = 1e-5,
    ops: Mapping[str, Callable[..., Any]] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """Build a module: `lm_head(ln_final(block_n(... block_1(token_embeddings[token_ids]))))`.

    Called as `module(token_ids, token_positions=None)` with integers (..., seq), seq at most context_length; the result
    is logits (..., seq, vocab_size), those at a position depending on the tokens up to it. position: "rope" or "none".
    tie_embeddings: lm_head shares the embeddings' weight. norm, ffn, num_kv_heads, norm_eps, ops: see
    transformer_block; norm = "none" drops ln_final too.
    State dict: token_embeddings.weight, layers.{n}.<the block's names>, ln_final.weight, lm_head.weight.
    Raises ValueError where a size or an option is not valid, or a sequence is longer than context_length.
    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Touvron et al. 2023,
    https://arxiv.org/abs/2302.13971.
    """
    raise NotImplementedError


def check(vocab_size: int, context_length: int, num_layers: int, position: str) -> None:
    """Refuse what the model adds to the block's own checks."""
    sizes = {"vocab_size": vocab_size, "context_length": context_length, "num_layers": num_layers}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"transformer_lm: {name} is {size}: it must be at least 1")
    if position not in ("rope", "none"):
        raise ValueError(f"transformer_lm: position is {position!r}: choose 'rope' or 'none'")


OPTIONS = (
    "vocab_size",
    "context_length",
    "d_model",
    "num_layers",
    "num_heads",
    "d_ff",
    "rope_theta",
    "num_kv_heads",
    "norm",
    "position",
    "ffn",
    "tie_embeddings",
    "norm_eps",
)


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    vocab_size, d_model = sizes["vocab_size"], sizes["d_model"]
    weights = {"token_embeddings.weight": make.normal(vocab_size, d_model)}
    for layer in range(sizes["num_layers"]):
        weights |= transformer_block.weights(sizes, make, f"layers.{layer}.")
    if sizes.get("norm", "rms") != "none":
        weights["ln_final.weight"] = make.normal(d_model, scale=0.1, mean=1.0)
    tied = sizes.get("tie_embeddings", False)
    head = weights["token_embeddings.weight"] if tied else make.normal(vocab_size, d_model, scale=d_model**-0.5)
    found: Arguments = {name: sizes[name] for name in OPTIONS if name in sizes}
    found["token_ids"] = make.integers(*sizes.get("leading", ()), sizes["seq"], high=vocab_size)
    if "positions" in sizes:
        found["token_positions"] = make.integers(*sizes["positions"], high=sizes["context_length"]).sort(-1).values
    return found | {"weights": weights | {"lm_head.weight": head}}


def observe(implementation: Callable[..., Any], arguments: Arguments) -> Tensor:
    """Build the module, put the seeded weights in and run it."""
    from ..plain_transformer import run_with_weights

    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    weights = arguments["weights"]
    weight = weights["lm_head.weight"]
    module = implementation(**options, device=weight.device, dtype=weight.dtype)
    return run_with_weights(module, weights, arguments["token_ids"], arguments.get("token_positions"))


def oracle(*sizes: int, **options: Any) -> torch.nn.Module:
    from ..plain_transformer import PlainLM

    return PlainLM(*sizes, **options)


COURSE = {
    "vocab_size": 1000,
    "context_length": 16,
    "d_model": 64,
    "num_layers": 3,
    "num_heads": 4,
    "d_ff": 128,
    "rope_theta": 10000.0,
}
SMALL = {
    "vocab_size": 61,
    "context_length": 33,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 2,
    "d_ff": 43,
    "leading": (2,),
    "seq": 13,
}

SIZES = {name: SMALL[name] for name in OPTIONS if name in SMALL}


def the_future_is_not_seen(build: Callable[..., Any], make: ArgumentMaker) -> None:
    given = arguments(Case(id="law", sizes=SMALL), make)
    changed = given["token_ids"].clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 61
    before, after = observe(build, given), observe(build, given | {"token_ids": changed})
    assert_nearly_equal(after[:, :8], before[:, :8], what="logits before the change")
    assert bool((after[:, 8:] != before[:, 8:]).any(-1).all()), "every later token must see the change"


def rows_of_a_batch_do_not_meet(build: Callable[..., Any], make: ArgumentMaker) -> None:
    given = arguments(Case(id="law", sizes=SMALL), make)
    alone = observe(build, given | {"token_ids": given["token_ids"][1]})
    assert_nearly_equal(alone, observe(build, given)[1], what="a row alone, without a batch dimension")


def a_prefix_has_the_same_logits(build: Callable[..., Any], make: ArgumentMaker) -> None:
    given = arguments(Case(id="law", sizes=SMALL), make)
    prefix = observe(build, given | {"token_ids": given["token_ids"][:, :7]})
    assert_nearly_equal(prefix, observe(build, given)[:, :7], what="the logits of a prefix")


def _workload(
    batch: int,
    seq: int,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    device: Literal["any", "cpu", "cuda"],
) -> Workload:
    tokens = batch * seq
    parameters = num_layers * (4 * d_model**2 + 3 * d_model * d_ff) + vocab_size * d_model
    flops = 2.0 * tokens * parameters + 2.0 * num_layers * tokens * seq * d_model
    return Workload(
        id=f"b{batch}_s{seq}_v{vocab_size}_l{num_layers}_d{d_model}",
        sizes={
            "leading": (batch,),
            "seq": seq,
            "vocab_size": vocab_size,
            "context_length": seq,
            "d_model": d_model,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "d_ff": d_ff,
        },
        flops=flops,
        backward_flops=2.0 * flops,
        device=device,
    )


contract = Component(
    signature=transformer_lm,
    kind="module",
    summary="decoder-only Transformer language model",
    formula="lm_head(ln_final(blocks(token_embeddings[token_ids])))",
    paper="https://arxiv.org/abs/2302.13971",
    arguments=arguments,
    oracle=oracle,
    observe=observe,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("weights",),
    tolerance=Tolerance(factor=3.0, floor=8.0, reason="the rounding errors of all layers add up in another order"),
    gradient_tolerance=Tolerance(
        factor=3.0, floor=16.0, absolute=64.0, reason="the rounding errors of all layers, there and back"
    ),
    cases=(
        Case(id="course", sizes=COURSE | {"leading": (4,), "seq": 16}),
        Case(id="course_truncated", sizes=COURSE | {"leading": (4,), "seq": 8}),
        Case(id="small", sizes=SMALL),
        Case(id="one_token", sizes=SMALL | {"leading": (1,), "seq": 1}),
        Case(id="no_batch", sizes=SMALL | {"leading": ()}),
        Case(id="positions", sizes=SMALL | {"positions": (2, 13)}),
        Case(id="without_positions", sizes=SMALL | {"position": "none"}),
        Case(id="grouped_query", sizes=SMALL | {"num_heads": 4, "num_kv_heads": 2}),
        Case(id="post_norm", sizes=SMALL | {"norm": "post"}),
        Case(id="no_norm", sizes=SMALL | {"norm": "none", "num_layers": 1}),
        Case(id="silu", sizes=SMALL | {"ffn": "silu"}),
        Case(id="tied", sizes=SMALL | {"tie_embeddings": True}),
    ),
    error_cases=(
        ErrorCase(
            id="no_vocabulary",
            arguments=lambda make: SIZES | {"vocab_size": 0},
            match="vocab_size is 0: it must be at least 1",
        ),
        ErrorCase(
            id="negative_layers",
            arguments=lambda make: SIZES | {"num_layers": -1},
            match="num_layers is -1: it must be at least 1",
        ),
        ErrorCase(
            id="unknown_position",
            arguments=lambda make: SIZES | {"position": "sine"},
            match="position is 'sine': choose 'rope' or 'none'",
        ),
        ErrorCase(
            id="sequence_too_long",
            arguments=lambda make: arguments(Case(id="long", sizes=SMALL | {"seq": 34}), make),
            match="34 tokens is longer than context_length 33",
        ),
    ),
    laws=(
        Law(id="causality", statement="later tokens change no earlier logits", check=the_future_is_not_seen),
        Law(id="rows", statement="the rows of a batch do not meet", check=rows_of_a_batch_do_not_meet),
        Law(
            id="prefix", statement="a prefix has the logits it has within the whole", check=a_prefix_has_the_same_logits
        ),
    ),
    workloads=(
        _workload(2, 256, 10000, 512, 4, 16, 1344, "any"),
        _workload(8, 1024, 50257, 768, 12, 12, 2048, "cuda"),
        _workload(2, 4096, 50257, 2048, 16, 16, 5504, "cuda"),
    ),
    adapter="run_transformer_lm",
    composed_of=("embedding", "linear", "rmsnorm", "add_rmsnorm", "silu", "swiglu", "rope", "attention"),
    composite="cs336_registry.nn:TransformerLM",
)
