"""Causal multi-head self-attention, with or without rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import ArgumentMaker
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def multihead_self_attention(
    d_model: int,
    num_heads: int,
    *,
    max_seq_len: int | None = None,
    rope_theta: float | None = None,
    num_kv_heads: int | None = None,
    ops: Mapping[str, Callable[..., Any]] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """Build a module: `output_proj(concat of each head's attention(q_proj x, k_proj x, v_proj x))`, causal.

    Called as `module(x, token_positions=None)` with x: (..., seq, d_model), token_positions: (..., seq) or (seq,).
    max_seq_len, rope_theta: tables of the rotary positions; without rope_theta there are none. num_kv_heads:
    grouped-query heads, by default num_heads. ops: component name to callable; by default the registry chooses them.
    State dict: q_proj.weight, k_proj.weight, v_proj.weight, output_proj.weight.
    Raises ValueError where the heads do not divide d_model or each other, or max_seq_len is missing.
    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
    """
    raise NotImplementedError


def check(
    d_model: int, num_heads: int, max_seq_len: int | None, rope_theta: float | None, num_kv_heads: int | None
) -> None:
    """Refuse sizes outside the contract."""
    name = "multihead_self_attention"
    if d_model < 1 or num_heads < 1 or d_model % num_heads:
        raise ValueError(f"{name}: d_model is {d_model} and num_heads is {num_heads}: num_heads must divide d_model")
    if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
        raise ValueError(
            f"{name}: num_heads is {num_heads} and num_kv_heads is {num_kv_heads}: num_kv_heads must divide num_heads"
        )
    if rope_theta is None:
        return
    if rope_theta <= 0:
        raise ValueError(f"{name}: rope_theta is {rope_theta}: it must be positive (10000.0 is usual)")
    if max_seq_len is None or max_seq_len < 1:
        raise ValueError(f"{name}: max_seq_len is {max_seq_len}: rotary positions need the longest sequence's length")
    if d_model // num_heads % 2:
        raise ValueError(f"{name}: heads of {d_model // num_heads} features: rotary positions need an even number")


def weights(sizes: Mapping[str, Any], make: ArgumentMaker, prefix: str = "") -> dict[str, Tensor]:
    """Seeded weights under the names of the state dict."""
    d_model = sizes["d_model"]
    d_kv = d_model // sizes["num_heads"] * sizes.get("num_kv_heads", sizes["num_heads"])
    shapes = {"q": (d_model, d_model), "k": (d_kv, d_model), "v": (d_kv, d_model), "output": (d_model, d_model)}
    return {f"{prefix}{name}_proj.weight": make.normal(*shape, scale=d_model**-0.5) for name, shape in shapes.items()}


OPTIONS = ("d_model", "num_heads", "max_seq_len", "rope_theta", "num_kv_heads")


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


def oracle(d_model: int, num_heads: int, **options: Any) -> torch.nn.Module:
    from ..plain_transformer import PlainAttention

    return PlainAttention(d_model, num_heads, **options)


def _law_arguments(make: ArgumentMaker, **sizes: Any) -> Arguments:
    defaults = {"d_model": 32, "num_heads": 4, "seq": 11, "leading": (2,), "max_seq_len": 40, "rope_theta": 10000.0}
    return arguments(Case(id="law", sizes=defaults | sizes), make)


def the_future_is_not_seen(build: Callable[..., Any], make: ArgumentMaker) -> None:
    given = _law_arguments(make)
    changed = given["x"].clone()
    changed[:, 6:] += 3.0
    before, after = observe(build, given), observe(build, given | {"x": changed})
    assert_nearly_equal(after[:, :6], before[:, :6], what="results before the change")
    assert bool((after[:, 6:] != before[:, 6:]).any()), "the change itself must be seen"


def only_distances_matter(build: Callable[..., Any], make: ArgumentMaker) -> None:
    import torch

    given = _law_arguments(make)
    positions = torch.arange(11, device=given["x"].device)
    near, far = (observe(build, given | {"token_positions": positions + start}) for start in (0, 23))
    assert_nearly_equal(observe(build, given), near, what="default positions")
    # The tables are float32, so this holds to float32's rounding at best; other angles round differently.
    tables = torch.float32 if near.dtype == torch.float64 else near.dtype
    assert_nearly_equal(far.to(tables), near.to(tables), roundings=64, what="positions shifted by 23")


def rows_of_a_batch_do_not_meet(build: Callable[..., Any], make: ArgumentMaker) -> None:
    given = _law_arguments(make)
    alone = observe(build, given | {"x": given["x"][1]})
    assert_nearly_equal(alone, observe(build, given)[1], what="a row alone, without a batch dimension")


def the_first_token_attends_to_itself(build: Callable[..., Any], make: ArgumentMaker) -> None:
    given = _law_arguments(make)
    v = given["x"][:, 0].double() @ given["weights"]["v_proj.weight"].double().T
    expected = v @ given["weights"]["output_proj.weight"].double().T
    assert_nearly_equal(observe(build, given)[:, 0], expected.to(given["x"].dtype), what="the first token's result")


def _workload(batch: int, seq: int, d_model: int, num_heads: int, device: Literal["any", "cpu", "cuda"]) -> Workload:
    tokens = batch * seq
    flops = 8.0 * tokens * d_model**2 + 2.0 * tokens * seq * d_model
    return Workload(
        id=f"b{batch}_s{seq}_d{d_model}_h{num_heads}",
        sizes={
            "leading": (batch,),
            "seq": seq,
            "d_model": d_model,
            "num_heads": num_heads,
            "max_seq_len": seq,
            "rope_theta": 10000.0,
        },
        bytes_moved=lambda itemsize: (12 * tokens * d_model + 4 * d_model**2) * itemsize,
        flops=flops,
        backward_flops=2.25 * flops,
        device=device,
    )


contract = Component(
    signature=multihead_self_attention,
    kind="module",
    summary="causal multi-head self-attention with rotary positions",
    formula="W_o · concat_h softmax(rope(W_q x)_h rope(W_k x)_hᵀ / √d_head) (W_v x)_h",
    paper="https://arxiv.org/abs/1706.03762",
    arguments=arguments,
    oracle=oracle,
    observe=observe,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("x", "weights"),
    tolerance=Tolerance(factor=3.0, floor=4.0, reason="four rounded stages whose errors add up in another order"),
    gradient_tolerance=Tolerance(
        factor=3.0, floor=8.0, absolute=64.0, reason="as attention's, through four products more"
    ),
    cases=(
        Case(id="course", sizes={"d_model": 64, "num_heads": 4, "leading": (4,), "seq": 12}),
        Case(
            id="course_rope",
            sizes={
                "d_model": 64,
                "num_heads": 4,
                "leading": (4,),
                "seq": 12,
                "max_seq_len": 12,
                "rope_theta": 10000.0,
                "positions": (1, 12),
            },
        ),
        Case(
            id="default_positions",
            sizes={
                "d_model": 48,
                "num_heads": 3,
                "leading": (2,),
                "seq": 33,
                "max_seq_len": 63,
                "rope_theta": 10000.0,
            },
        ),
        Case(
            id="positions_of_each_row",
            sizes={
                "d_model": 32,
                "num_heads": 2,
                "leading": (3,),
                "seq": 9,
                "max_seq_len": 100,
                "rope_theta": 500.0,
                "positions": (3, 9),
            },
        ),
        Case(id="one_token", sizes={"d_model": 32, "num_heads": 2, "leading": (3,), "seq": 1}),
        Case(
            id="no_batch",
            sizes={"d_model": 32, "num_heads": 2, "seq": 9, "max_seq_len": 9, "rope_theta": 10000.0},
        ),
        Case(id="one_head", sizes={"d_model": 16, "num_heads": 1, "leading": (2, 2), "seq": 7}),
        Case(
            id="grouped_query",
            sizes={
                "d_model": 64,
                "num_heads": 4,
                "num_kv_heads": 2,
                "leading": (2,),
                "seq": 13,
                "max_seq_len": 20,
                "rope_theta": 10000.0,
            },
        ),
    ),
    error_cases=(
        ErrorCase(
            id="heads_do_not_divide",
            arguments=lambda make: {"d_model": 30, "num_heads": 4},
            match="d_model is 30 and num_heads is 4: num_heads must divide d_model",
        ),
        ErrorCase(
            id="no_heads",
            arguments=lambda make: {"d_model": 32, "num_heads": 0},
            match="d_model is 32 and num_heads is 0",
        ),
        ErrorCase(
            id="kv_heads_do_not_divide",
            arguments=lambda make: {"d_model": 32, "num_heads": 4, "num_kv_heads": 3},
            match="num_heads is 4 and num_kv_heads is 3",
        ),
        ErrorCase(
            id="positions_without_a_length",
            arguments=lambda make: {"d_model": 32, "num_heads": 4, "rope_theta": 10000.0},
            match="max_seq_len is None",
        ),
        ErrorCase(
            id="odd_heads",
            arguments=lambda make: {"d_model": 12, "num_heads": 4, "rope_theta": 10000.0, "max_seq_len": 8},
            match="heads of 3 features",
        ),
    ),
    laws=(
        Law(id="causality", statement="later tokens change no earlier result", check=the_future_is_not_seen),
        Law(id="relative", statement="shifting all positions changes nothing", check=only_distances_matter),
        Law(id="rows", statement="the rows of a batch do not meet", check=rows_of_a_batch_do_not_meet),
        Law(id="first_token", statement="the first token attends to itself", check=the_first_token_attends_to_itself),
    ),
    workloads=(
        _workload(4, 256, 512, 16, "any"),
        _workload(8, 1024, 768, 12, "cuda"),
        _workload(2, 8192, 4096, 32, "cuda"),
    ),
    adapter="run_multihead_self_attention",
    composed_of=("linear", "rope", "attention"),
    composite="cs336_registry.nn:MultiHeadSelfAttention",
)
