"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..arguments import ArgumentMaker
from ..checks import require_floating, require_in_range, require_integer
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Workload

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def rope(
    q: Float[Tensor, "*heads seq d_head"],
    k: Float[Tensor, "*kv_heads seq d_head"] | None,
    cos: Float[Tensor, "max_seq_len d_head/2"],
    sin: Float[Tensor, "max_seq_len d_head/2"],
    token_positions: Int[Tensor, "*leading seq"] | None = None,
) -> tuple[Float[Tensor, "*heads seq d_head"], Float[Tensor, "*kv_heads seq d_head"] | None]:
    """Rotate each pair of neighbouring features by an angle proportional to the token's position.

    With `c, s = cos[position, i], sin[position, i]`, the features `(a, b) = (x[2i], x[2i + 1])` become
    `(a·c - b·s, a·s + b·c)`.
    q, k: any leading dimensions, which may differ (grouped-query heads); with k = None the second result is None.
    cos, sin: tables in float32, `angle[position, i] = position · theta^(-2i / d_head)`.
    token_positions: integers in 0..max_seq_len-1, by default 0..seq-1. Its leading dimensions are those of q from the
    left, and missing ones are filled in before seq: (seq,) and (batch, seq) both serve (batch, heads, seq, d_head).
    Computed in float32 (float64 stays float64); the results have the dtypes of q and k.
    Raises ValueError where shapes do not fit, d_head is odd or a position lies outside the tables (positions are looked
    at on the CPU only), TypeError for dtypes.
    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding",
    https://arxiv.org/abs/2104.09864.
    """
    raise NotImplementedError


def check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, token_positions: Tensor | None) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    require_floating("rope", q=q, cos=cos, sin=sin)
    shape, tables = q.shape, cos.shape
    if len(shape) < 2 or shape[-1] % 2:
        raise ValueError(f"rope: q has shape {tuple(shape)}: it must be (..., seq, d_head) with an even d_head")
    if tables != sin.shape or len(tables) != 2 or tables[1] != shape[-1] // 2:
        raise ValueError(
            f"rope: cos and sin have shapes {tuple(tables)} and {tuple(sin.shape)} but q has d_head {shape[-1]}: both "
            f"must be (max_seq_len, {shape[-1] // 2})"
        )
    if k is not None:
        require_floating("rope", k=k)
        if k.ndim < 2 or k.shape[-2:] != shape[-2:]:
            raise ValueError(
                f"rope: k has shape {tuple(k.shape)} but q has shape {tuple(shape)}: their last two dimensions must "
                f"agree"
            )
    if token_positions is None:
        if shape[-2] > tables[0]:
            raise ValueError(f"rope: a sequence of {shape[-2]} is longer than the tables: max_seq_len is {tables[0]}")
        return
    require_integer("rope", token_positions=token_positions)
    for x in (q, k):
        if x is not None and not _positions_fit(token_positions.shape, x.shape):
            raise ValueError(
                f"rope: token_positions has shape {tuple(token_positions.shape)} but q has shape {tuple(q.shape)}: it "
                f"must end "
                f"in seq ({q.shape[-2]}) and its other dimensions must be those of q and k from the left, or 1"
            )
    require_in_range(
        "rope", "token_positions", token_positions, cos.shape[0], "build the tables with a larger max_seq_len"
    )


def align_positions(token_positions: Tensor, x: Tensor) -> Tensor:
    """`token_positions` with singleton dimensions before seq, so that it broadcasts against `x[..., 0]`."""
    *leading, seq = token_positions.shape
    if not leading:
        return token_positions
    return token_positions.reshape(*leading, *(1,) * (x.ndim - 2 - len(leading)), seq)


def rotation_tables(d_head: int, max_seq_len: int, theta: float, device: Any = None) -> tuple[Tensor, Tensor]:
    """The tables `cos, sin` of (max_seq_len, d_head // 2): angles in float64, rounded once to float32."""
    import torch

    frequencies = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
    return angles.cos().to(torch.float32).to(device), angles.sin().to(torch.float32).to(device)


def _positions_fit(positions: tuple[int, ...], x: tuple[int, ...]) -> bool:
    leading = len(positions) - 1
    return (
        0 <= leading <= len(x) - 2
        and positions[-1] == x[-2]
        and all(size in (1, wanted) for size, wanted in zip(positions[:-1], x, strict=False))
    )


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    leading, seq, d_head = sizes.get("leading", ()), sizes["seq"], sizes["d_head"]
    max_seq_len = sizes.get("max_seq_len", seq)
    kv_leading = sizes.get("kv_leading", leading)
    positions = sizes.get("positions")
    # The tables are float32 whatever the dtype of q, and follow the maker's strides.
    tables = ArgumentMaker(make.seed, dtype="float32", device=make.device)
    cos, sin = rotation_tables(d_head, max_seq_len, sizes.get("theta", 10000.0))
    return {
        "q": make.normal(*leading, seq, d_head),
        "k": None if kv_leading is None else make.normal(*kv_leading, seq, d_head),
        "cos": tables.tensor(cos.numpy()),
        "sin": tables.tensor(sin.numpy()),
        "token_positions": None if positions is None else make.integers(*positions, high=max_seq_len),
    }


def oracle(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, token_positions: Tensor | None):
    """Each pair is a complex number, and the rotation a multiplication by `exp(i · angle)`."""
    import torch

    def rotate(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        rotation = torch.complex(cos.to(wide), sin.to(wide))
        if token_positions is None:
            rotation = rotation[: x.shape[-2]]
        else:
            positions = token_positions
            while 1 < positions.ndim < x.ndim - 1:
                positions = positions.unsqueeze(-2)
            rotation = rotation[positions]
        pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)

    return rotate(q), None if k is None else rotate(k)


def _tables(make: ArgumentMaker, d_head: int, max_seq_len: int) -> tuple[Tensor, Tensor]:
    return rotation_tables(d_head, max_seq_len, 100.0, make.device)


def lengths_are_kept(rope, make: ArgumentMaker) -> None:
    import torch

    q, k = make.normal(2, 3, 9, 24), make.normal(2, 1, 9, 24)
    for before, after in zip((q, k), rope(q, k, *_tables(make, 24, 9)), strict=True):
        # In float32 even for float64 inputs: that is how exactly the tables are rotations.
        lengths = [x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1) for x in (after, before)]
        roundings = (
            16 if after.dtype.itemsize >= 4 else 16 * torch.finfo(after.dtype).eps / torch.finfo(torch.float32).eps
        )
        assert_nearly_equal(*(length.float() for length in lengths), roundings=roundings)


def only_distances_matter(rope, make: ArgumentMaker) -> None:
    import torch

    cos, sin = _tables(make, 16, 64)
    q, k = make.normal(1, 16).expand(40, 16), make.normal(1, 16).expand(40, 16)
    positions = torch.arange(40, device=q.device)
    q_rotated, _ = rope(q, None, cos, sin, positions)
    k_rotated, _ = rope(k, None, cos, sin, positions + 7)
    products = (q_rotated.double() * k_rotated.double()).sum(-1)
    spread = (products - products[0]).abs().max()
    allowed = (
        64
        * max(torch.finfo(q.dtype).eps, torch.finfo(cos.dtype).eps)
        * float(q[0].double().norm() * k[0].double().norm())
    )
    assert spread <= allowed, f"q·k at distance 7 varies by {spread:.3g} over the positions, at most {allowed:.3g}"


def position_zero_is_not_rotated(rope, make: ArgumentMaker) -> None:
    import torch

    q = make.normal(3, 5, 8)
    zeros = torch.zeros(5, dtype=torch.int64, device=q.device)
    assert (rope(q, None, *_tables(make, 8, 5), zeros)[0] == q).all(), "position 0 must leave q unchanged"


def neighbours_are_the_pairs(rope, make: ArgumentMaker) -> None:
    import torch

    q = make.normal(4, 6)
    quarter_turn = torch.ones(4, 3, device=q.device)
    rotated, _ = rope(q, None, torch.zeros_like(quarter_turn), quarter_turn)
    expected = torch.stack((-q[:, 1::2], q[:, 0::2]), dim=-1).flatten(-2)
    assert (rotated == expected).all(), "a quarter turn must take features (2i, 2i+1) = (a, b) to (-b, a)"


def positions_select_rows_of_the_tables(rope, make: ArgumentMaker) -> None:
    import torch

    cos, sin = _tables(make, 8, 50)
    q = make.normal(2, 3, 4, 8)
    positions = torch.tensor([[3, 41, 0, 7], [49, 2, 2, 11]], device=q.device)
    rotated, _ = rope(q, None, cos, sin, positions)
    for batch in range(2):
        alone, _ = rope(q[batch], None, cos[positions[batch]], sin[positions[batch]])
        assert_nearly_equal(rotated[batch], alone, what=f"row {batch} of the batch")


contract = Component(
    signature=rope,
    kind="op",
    summary="rotary position embedding of queries and keys",
    formula="(a, b) → (a·cos - b·sin, a·sin + b·cos) for features (2i, 2i+1) at angle position · theta^(-2i/d)",
    paper="https://arxiv.org/abs/2104.09864",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("q", "k"),
    cases=(
        Case(id="course", sizes={"leading": (4,), "seq": 12, "d_head": 64, "kv_leading": None, "positions": (12,)}),
        Case(id="heads", sizes={"leading": (2, 3), "seq": 9, "d_head": 16}),
        Case(id="grouped", sizes={"leading": (2, 6), "kv_leading": (2, 2), "seq": 7, "d_head": 24, "max_seq_len": 33}),
        Case(id="two_dimensions", sizes={"leading": (), "seq": 63, "d_head": 10}),
        Case(id="one_pair", sizes={"leading": (3, 1), "seq": 5, "d_head": 2}),
        Case(
            id="one_token", sizes={"leading": (2, 3), "seq": 1, "d_head": 16, "max_seq_len": 100, "positions": (2, 1)}
        ),
        Case(id="no_rows", sizes={"leading": (0, 3), "seq": 4, "d_head": 8}),
        Case(
            id="positions_shared",
            sizes={"leading": (2, 3), "seq": 11, "d_head": 16, "max_seq_len": 1000, "positions": (11,)},
        ),
        Case(
            id="positions_of_each_row",
            sizes={
                "leading": (3, 4),
                "kv_leading": (3, 2),
                "seq": 11,
                "d_head": 16,
                "max_seq_len": 1000,
                "positions": (3, 11),
            },
        ),
        Case(
            id="positions_broadcast",
            sizes={"leading": (3, 4), "seq": 5, "d_head": 8, "max_seq_len": 20, "positions": (3, 1, 5)},
        ),
        Case(
            id="many_leading",
            sizes={"leading": (2, 2, 3), "seq": 5, "d_head": 8, "max_seq_len": 20, "positions": (2, 5)},
        ),
        Case(id="other_theta", sizes={"leading": (2,), "seq": 41, "d_head": 32, "theta": 500000.0}),
    ),
    error_cases=(
        ErrorCase(
            id="odd_d_head",
            arguments=lambda make: {
                "q": make.normal(4, 7),
                "k": None,
                "cos": make.normal(4, 3),
                "sin": make.normal(4, 3),
            },
            match=r"q has shape \(4, 7\): it must be \(..., seq, d_head\) with an even d_head",
        ),
        ErrorCase(
            id="tables_of_another_d_head",
            arguments=lambda make: {
                "q": make.normal(4, 8),
                "k": None,
                "cos": make.normal(4, 8),
                "sin": make.normal(4, 8),
            },
            match=r"both must be \(max_seq_len, 4\)",
        ),
        ErrorCase(
            id="sequence_too_long",
            arguments=lambda make: {
                "q": make.normal(6, 8),
                "k": None,
                "cos": make.normal(5, 4),
                "sin": make.normal(5, 4),
            },
            match="a sequence of 6 is longer than the tables: max_seq_len is 5",
        ),
        ErrorCase(
            id="k_of_another_length",
            arguments=lambda make: {
                "q": make.normal(6, 8),
                "k": make.normal(5, 8),
                "cos": make.normal(6, 4),
                "sin": make.normal(6, 4),
            },
            match=r"k has shape \(5, 8\) but q has shape \(6, 8\)",
        ),
        ErrorCase(
            id="positions_of_another_length",
            arguments=lambda make: {
                "q": make.normal(2, 6, 8),
                "k": None,
                "cos": make.normal(9, 4),
                "sin": make.normal(9, 4),
                "token_positions": make.integers(5, high=9),
            },
            match=r"token_positions has shape \(5,\) but q has shape \(2, 6, 8\)",
        ),
        ErrorCase(
            id="position_outside_the_tables",
            # On the CPU, where the values are looked at.
            arguments=lambda make: {
                "q": make.normal(2, 8).cpu(),
                "k": None,
                "cos": make.normal(9, 4).cpu(),
                "sin": make.normal(9, 4).cpu(),
                "token_positions": make.integers(2, low=9, high=10).cpu(),
            },
            match="token_positions contains 9, outside 0..8",
        ),
        ErrorCase(
            id="positions_not_integers",
            arguments=lambda make: {
                "q": make.normal(2, 8),
                "k": None,
                "cos": make.normal(9, 4),
                "sin": make.normal(9, 4),
                "token_positions": make.normal(2),
            },
            error=TypeError,
            match="token_positions has dtype",
        ),
    ),
    laws=(
        Law(id="norms", statement="a rotation keeps the length of every row", check=lengths_are_kept),
        Law(
            id="relative", statement="q·k depends on the distance of their positions alone", check=only_distances_matter
        ),
        Law(id="origin", statement="position 0 is not rotated", check=position_zero_is_not_rotated),
        Law(id="pairs", statement="features 2i and 2i+1 are a pair", check=neighbours_are_the_pairs),
        Law(
            id="positions",
            statement="token_positions selects rows of the tables",
            check=positions_select_rows_of_the_tables,
        ),
    ),
    workloads=tuple(
        Workload(
            id=f"b{batch}_h{heads}_kv{kv_heads}_s{seq}_d{d_head}",
            sizes={"leading": (batch, heads), "kv_leading": (batch, kv_heads), "seq": seq, "d_head": d_head},
            bytes_moved=lambda itemsize, n=batch * (heads + kv_heads) * seq * d_head, table=seq * d_head: (
                2 * n * itemsize + 4 * table
            ),
            backward_bytes_moved=lambda itemsize, n=batch * (heads + kv_heads) * seq * d_head, table=seq * d_head: (
                2 * n * itemsize + 4 * table
            ),
            flops=3.0 * batch * (heads + kv_heads) * seq * d_head,
            backward_flops=3.0 * batch * (heads + kv_heads) * seq * d_head,
            device="any" if seq < 8192 else "cuda",
        )
        for batch, heads, kv_heads, seq, d_head in (
            (4, 16, 16, 256, 32),
            (4, 12, 12, 1024, 64),
            (4, 32, 8, 8192, 128),
        )
    ),
    adapter="run_rope",
)
