"""One block of a Transformer: self-attention and a feed-forward network around a residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import ArgumentMaker
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload
from . import multihead_self_attention

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def transformer_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    *,
    max_seq_len: int | None = None,
    rope_theta: float | None = None,
    num_kv_heads: int | None = None,
    norm: str = "rms",
    ffn: str = "swiglu",
    norm_eps: float = 1e-5,
    ops: Mapping[str, Callable[..., Any]] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """Build a module: `h = x + attn(ln1(x)); h + ffn(ln2(h))`, with `ffn(z) = w2(silu(w1 z) * w3 z)`.

    Called as `module(x, token_positions=None)` with x: (..., seq, d_model). norm: "rms" as above; "post":
    `h = ln1(x + attn(x)); ln2(h + ffn(h))`; "none": no norms. ffn: "swiglu" as above; "silu": `w2(silu(w1 z))`.
    max_seq_len, rope_theta, num_kv_heads, ops: see multihead_self_attention.
    State dict: attn.{q,k,v,output}_proj.weight, ln1.weight, ln2.weight, ffn.w1.weight, ffn.w2.weight, ffn.w3.weight.
    Raises ValueError where a size or an option is not valid.
    Source: Xiong et al. 2020 (pre-norm), https://arxiv.org/abs/2002.04745; Touvron et al. 2023,
    https://arxiv.org/abs/2302.13971.
    """
    raise NotImplementedError


def check(d_ff: int, norm: str, ffn: str) -> None:
    """Refuse what the block adds to self-attention's own checks."""
    if d_ff < 1:
        raise ValueError(f"transformer_block: d_ff is {d_ff}: it must be at least 1 (8/3 of d_model is usual)")
    if norm not in ("rms", "post", "none"):
        raise ValueError(f"transformer_block: norm is {norm!r}: choose 'rms', 'post' or 'none'")
    if ffn not in ("swiglu", "silu"):
        raise ValueError(f"transformer_block: ffn is {ffn!r}: choose 'swiglu' or 'silu'")


def weights(sizes: Mapping[str, Any], make: ArgumentMaker, prefix: str = "") -> dict[str, Tensor]:
    """Seeded weights under the names of the state dict."""
    d_model, d_ff = sizes["d_model"], sizes["d_ff"]
    found = multihead_self_attention.weights(sizes, make, f"{prefix}attn.")
    if sizes.get("norm", "rms") != "none":
        found |= {f"{prefix}{name}.weight": make.normal(d_model, scale=0.1, mean=1.0) for name in ("ln1", "ln2")}
    shapes = {"w1": (d_ff, d_model), "w2": (d_model, d_ff)}
    shapes |= {"w3": (d_ff, d_model)} if sizes.get("ffn", "swiglu") == "swiglu" else {}
    found |= {
        f"{prefix}ffn.{name}.weight": make.normal(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()
    }
    return found


OPTIONS = (*multihead_self_attention.OPTIONS, "d_ff", "norm", "ffn", "norm_eps")


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    found: Arguments = {name: sizes[name] for name in OPTIONS if name in sizes}
    found["x"] = make.normal(*sizes.get("leading", ()), sizes["seq"], sizes["d_model"])
    if "positions" in sizes:
        found["token_positions"] = make.integers(*sizes["positions"], high=sizes["max_seq_len"]).sort(-1).values
    return found | {"weights": weights(sizes, make)}


def observe(implementation: Callable[..., Any], arguments: Arguments) -> Tensor:
    """Build the module, put the seeded weights in and run it."""
    from ..plain_transformer import run_with_weights

    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    x = arguments["x"]
    module = implementation(**options, device=x.device, dtype=x.dtype)
    return run_with_weights(module, arguments["weights"], x, arguments.get("token_positions"))


def oracle(d_model: int, num_heads: int, d_ff: int, **options: Any) -> torch.nn.Module:
    from ..plain_transformer import PlainBlock

    return PlainBlock(d_model, num_heads, d_ff, **options)


COURSE = {"d_model": 64, "num_heads": 4, "d_ff": 128, "max_seq_len": 16, "rope_theta": 10000.0}
SMALL = {"d_model": 32, "num_heads": 2, "d_ff": 43, "max_seq_len": 40, "rope_theta": 10000.0, "leading": (2,), "seq": 9}


def the_future_is_not_seen(build: Callable[..., Any], make: ArgumentMaker) -> None:
    for norm in ("rms", "post", "none"):
        given = arguments(Case(id="law", sizes=SMALL | {"norm": norm}), make)
        changed = given["x"].clone()
        changed[:, 5:] += 3.0
        before, after = observe(build, given), observe(build, given | {"x": changed})
        assert_nearly_equal(after[:, :5], before[:, :5], what=f"results before the change, norm={norm}")


def silent_sublayers_leave_the_stream(build: Callable[..., Any], make: ArgumentMaker) -> None:
    given = arguments(Case(id="law", sizes=SMALL), make)
    silent = {name: 0 * weight for name, weight in given["weights"].items() if "output_proj" in name or ".w2." in name}
    result = observe(build, given | {"weights": given["weights"] | silent})
    assert bool((result == given["x"]).all()), "with output_proj and w2 zero, x must come back unchanged"


def post_norm_ends_normalised(build: Callable[..., Any], make: ArgumentMaker) -> None:
    given = arguments(Case(id="law", sizes=SMALL | {"norm": "post", "norm_eps": 0.0}), make)
    ones = {name: 0 * weight + 1 for name, weight in given["weights"].items() if "ln" in name}
    result = observe(build, given | {"weights": given["weights"] | ones})
    mean_square = result.double().square().mean(-1).to(result.dtype)
    assert_nearly_equal(mean_square, 0 * mean_square + 1, what="the mean square of post-norm's result")


def _workload(
    batch: int, seq: int, d_model: int, num_heads: int, d_ff: int, device: Literal["any", "cpu", "cuda"]
) -> Workload:
    tokens = batch * seq
    flops = tokens * (8.0 * d_model**2 + 2.0 * seq * d_model + 6.0 * d_model * d_ff)
    return Workload(
        id=f"b{batch}_s{seq}_d{d_model}_h{num_heads}_f{d_ff}",
        sizes={
            "leading": (batch,),
            "seq": seq,
            "d_model": d_model,
            "num_heads": num_heads,
            "d_ff": d_ff,
            "max_seq_len": seq,
            "rope_theta": 10000.0,
        },
        bytes_moved=lambda itemsize: (
            (20 * tokens * d_model + 6 * tokens * d_ff + 4 * d_model**2 + 3 * d_model * d_ff) * itemsize
        ),
        flops=flops,
        backward_flops=2.1 * flops,
        device=device,
    )


contract = Component(
    signature=transformer_block,
    kind="module",
    summary="self-attention and a feed-forward network around a residual stream",
    formula="h = x + attn(ln1 x); h + w2(silu(w1 ln2 h) · w3 ln2 h)",
    paper="https://arxiv.org/abs/2002.04745",
    arguments=arguments,
    oracle=oracle,
    observe=observe,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("x", "weights"),
    tolerance=Tolerance(factor=3.0, floor=4.0, reason="a dozen rounded stages whose errors add up in another order"),
    gradient_tolerance=Tolerance(
        factor=3.0, floor=8.0, absolute=64.0, reason="as attention's, through a dozen stages more"
    ),
    cases=(
        Case(id="course", sizes=COURSE | {"leading": (4,), "seq": 12}),
        Case(id="small", sizes=SMALL),
        Case(id="one_token", sizes=SMALL | {"seq": 1}),
        Case(id="no_batch", sizes=SMALL | {"leading": ()}),
        Case(id="positions", sizes=SMALL | {"positions": (2, 9)}),
        Case(id="without_positions", sizes={"d_model": 32, "num_heads": 2, "d_ff": 43, "leading": (2,), "seq": 9}),
        Case(id="grouped_query", sizes=SMALL | {"num_heads": 4, "num_kv_heads": 2}),
        Case(id="post_norm", sizes=SMALL | {"norm": "post"}),
        Case(id="no_norm", sizes=SMALL | {"norm": "none"}),
        Case(id="silu", sizes=SMALL | {"ffn": "silu"}),
        Case(id="large_eps", sizes=SMALL | {"norm_eps": 0.5}),
    ),
    error_cases=(
        ErrorCase(
            id="heads_do_not_divide",
            arguments=lambda make: {"d_model": 30, "num_heads": 4, "d_ff": 64},
            match="d_model is 30 and num_heads is 4",
        ),
        ErrorCase(
            id="no_d_ff",
            arguments=lambda make: {"d_model": 32, "num_heads": 4, "d_ff": 0},
            match="d_ff is 0",
        ),
        ErrorCase(
            id="unknown_norm",
            arguments=lambda make: {"d_model": 32, "num_heads": 4, "d_ff": 64, "norm": "layer"},
            match="norm is 'layer': choose 'rms', 'post' or 'none'",
        ),
        ErrorCase(
            id="unknown_ffn",
            arguments=lambda make: {"d_model": 32, "num_heads": 4, "d_ff": 64, "ffn": "gelu"},
            match="ffn is 'gelu': choose 'swiglu' or 'silu'",
        ),
    ),
    laws=(
        Law(id="causality", statement="later tokens change no earlier result", check=the_future_is_not_seen),
        Law(
            id="residual", statement="silent sublayers leave the stream alone", check=silent_sublayers_leave_the_stream
        ),
        Law(id="post_norm", statement="post-norm's result is normalised", check=post_norm_ends_normalised),
    ),
    workloads=(
        _workload(4, 256, 512, 16, 1344, "any"),
        _workload(8, 1024, 768, 12, 2048, "cuda"),
        _workload(2, 8192, 4096, 32, 14336, "cuda"),
    ),
    adapter="run_transformer_block",
    composed_of=("linear", "rmsnorm", "add_rmsnorm", "silu", "swiglu", "rope", "attention"),
    composite="cs336_registry.nn:TransformerBlock",
)
