"""Attention's kernels for H100 and H200: what they serve, and on such a card what they compute.

The interpreter doesn't run them. `test_cross_compilation` compiles them anywhere.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .kernel_checks import check_against_float64, maker
from .test_cuda_graphs import captured

ROOT = Path(__file__).parents[2]
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0 (H100, H200)",
)
SHAPES = {
    # batch, heads, kv_heads, queries, keys, is_causal
    "odd": (2, 3, 3, 257, 257, True),
    "grouped": (1, 4, 2, 129, 513, False),
    "fewer_keys": (1, 4, 2, 640, 300, True),
    "fewer_queries": (1, 4, 2, 200, 640, True),
    "long": (2, 9, 9, 2111, 2111, True),
}
"""In the second and the third the last 64 keys of the last program don't exist, and queries would see them. In the last
one every program walks over several tiles, and at 64 features with three consumers."""


def inputs(make, shape, d: int) -> dict:
    """q, k and v in the memory order of a projection, each a view into a tensor of which the rest is NaN."""
    batch, heads, kv_heads, queries, keys, is_causal = shape

    def view(count: int, length: int) -> torch.Tensor:
        whole = make.normal(batch, length + 3, count, d)
        whole[:, length:] = float("nan")
        return whole[:, :length].transpose(1, 2)

    return {"q": view(heads, queries), "k": view(kv_heads, keys), "v": view(kv_heads, keys), "is_causal": is_causal}


def check_served(given: dict) -> None:
    """So that what is tested is what this file is about."""
    from cs336_triton import attention_hopper

    q, k, v = given["q"], given["k"], given["v"]
    assert attention_hopper.serves(q, k, v, 0.1) and attention_hopper.serves_backward(torch.empty_like(q), q, k, v)


@on_hopper
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("shape", "dtype"), [*((shape, "bfloat16") for shape in SHAPES), ("odd", "float16")])
def test_values_and_gradients(shape, d, dtype):
    """Compared with float64; twice the same bits; what is not written stays NaN."""
    from cs336_triton.attention import attention

    given = inputs(maker(dtype), SHAPES[shape], d)
    check_served(given)
    check_against_float64("attention", attention, given)


@on_hopper
@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("shape", ["odd", "fewer_keys", "long"])
def test_gradients_of_scores_saved_for_some_heads_at_a_time_or_not_at_all(shape, heads, monkeypatch):
    """The first launch's workspace serves all others; without one, dQ is made from scores computed again."""
    from cs336_triton import attention_hopper
    from cs336_triton.attention import attention

    monkeypatch.setattr(attention_hopper, "saving_heads", lambda *_: heads)
    check_against_float64("attention", attention, inputs(maker("bfloat16"), SHAPES[shape], 128))


@on_hopper
def test_keys_beyond_the_end_weigh_nothing_in_what_is_saved():
    """Their scores are 0 and every other is far below: unmasked, their weights would be infinite."""
    from cs336_triton.attention import attention

    make = maker("bfloat16")
    given = {name: make.normal(1, 2, 200, 128) for name in ("q", "k", "v")}
    given["q"] = given["q"].abs() * 4
    given["k"] = -given["k"].abs() * 4
    for is_causal in (False, True):
        check_against_float64("attention", attention, given | {"is_causal": is_causal})


@on_hopper
@pytest.mark.parametrize("d", [64, 128])
def test_contiguous_heads_and_large_scores(d):
    from cs336_triton.attention import attention

    make = maker("bfloat16")
    given = {name: make.normal(2, 2, 300, d) for name in ("q", "k", "v")}
    given["q"] *= 4
    check_served(given)
    check_against_float64("attention", attention, given)
    check_against_float64("attention", attention, given | {"is_causal": True})


@on_hopper
@pytest.mark.parametrize("d", [64, 128])
def test_every_candidate_gives_the_same_gradients(d):
    """Tiles and schedules change the order of sums at most."""
    from cs336_triton import configurations
    from cs336_triton.attention import attention

    given = inputs(maker("bfloat16"), SHAPES["fewer_queries"], d)
    output_grad = maker("bfloat16", seed=1).normal(*given["q"].shape)

    def values_and_gradients() -> list[torch.Tensor]:
        leaves = [given[name].detach().requires_grad_() for name in ("q", "k", "v")]
        result = attention(*leaves, is_causal=True)
        return [result, *torch.autograd.grad(result, leaves, output_grad)]

    with configurations.experiment({}) as found:
        expected = values_and_gradients()
    assert all("hopper" in kernel for kernel, _, _ in found.found)
    for key, (_, *others) in found.found.items():
        for other in others:
            with configurations.experiment({key: other}):
                for one, same in zip(values_and_gradients(), expected, strict=True):
                    torch.testing.assert_close(one, same, rtol=2e-2, atol=2e-2)


@on_hopper
def test_the_graph_computes_what_the_call_does():
    from cs336_triton.attention import attention

    given, others = (inputs(maker("bfloat16", seed=seed), SHAPES["odd"], 128) for seed in (0, 1))
    leaves = [given[name].requires_grad_() for name in ("q", "k", "v")]

    def step() -> list[torch.Tensor]:
        result = attention(**given)
        return [result, *torch.autograd.grad(result, leaves, torch.ones_like(result))]

    graph, found = captured(step)
    with torch.no_grad():
        for leaf, name in zip(leaves, ("q", "k", "v"), strict=True):
            leaf.copy_(others[name])
    graph.replay()
    for one, other in zip(found, step(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def hopper():
    """`attention_hopper`, for which every tensor is on an H100: nothing is launched."""
    from cs336_triton import attention_hopper
    from cs336_triton.cross_compilation import CARDS
    from cs336_triton.runtime import record_launches

    with record_launches(CARDS[90]):
        yield attention_hopper


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_what_is_served(hopper):
    for dtype in (torch.bfloat16, torch.float16):
        for d in (64, 128):
            x = meta(2, 200, 4, d, dtype=dtype).transpose(1, 2)
            assert hopper.serves(x, x, x, 0.1) and hopper.serves_backward(x, x, x, x)
    # A dimension of one entry may stride over anything.
    single = torch.empty_strided((1, 1, 200, 64), (1, 0, 64, 1), dtype=torch.bfloat16, device="meta")
    assert hopper.serves(single, single, single, 0.1) and hopper.serves_backward(single, single, single, single)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.float(),
        lambda x: meta(2, 4, 200, 80),
        lambda x: x[:, :1].expand(-1, 4, -1, -1),
        lambda x: meta(2, 4, 200, 68)[..., :64],
        lambda x: meta(2, 4, 64, 200).transpose(2, 3),
    ],
    ids=["float32", "d80", "broadcast", "rows_off_16_bytes", "transposed"],
)
def test_what_is_refused(hopper, change):
    good = meta(2, 4, 200, 64)
    bad = change(good)
    assert not hopper.serves(bad, bad, bad, 0.1) and not hopper.serves_backward(bad, bad, bad, bad)
    if bad.shape == good.shape and bad.dtype == good.dtype:
        assert not hopper.serves(good, bad, good, 0.1) and not hopper.serves_backward(bad, good, good, good)


def test_what_only_one_direction_refuses(hopper):
    x, short, wide = meta(2, 4, 200, 64), meta(2, 4, 100, 64), meta(2, 4, 200, 128)
    assert not hopper.serves(x, x, x, 0.0) and not hopper.serves(x, x, x, -0.1) and not hopper.serves(x, x, wide, 0.1)
    assert not hopper.serves(short, x, x, 0.1) and not hopper.serves(x, short, short, 0.1)
    assert hopper.serves_backward(short, short, x, x)
    empty, many, huge = meta(0, 4, 200, 64), meta(1, 65536, 128, 64), meta(2**12, 2**12, 128, 64)
    assert not hopper.serves(empty, empty, empty, 0.1)
    for refused in (empty, many, huge):
        assert not hopper.serves_backward(refused, refused, refused, refused)


@pytest.mark.parametrize("capability", [80, 100])
def test_other_cards_are_refused(capability):
    from cs336_triton import attention_hopper
    from cs336_triton.cross_compilation import CARDS
    from cs336_triton.runtime import record_launches

    x = meta(2, 4, 200, 64)
    with record_launches(CARDS[capability]):
        assert not attention_hopper.serves(x, x, x, 0.1) and not attention_hopper.serves_backward(x, x, x, x)


def kernels_of(masking: str = "", d: int = 64, length: int = 200) -> list[str]:
    from cs336_triton import attention
    from cs336_triton.cross_compilation import CARDS, launches_of

    def call() -> None:
        attention._forward_backward(2, 4, 4, length, d, torch.bfloat16, True, masking)

    return [launch.kernel.fn.__name__ for launch in launches_of(call, CARDS[90])]


def test_gradients_of_scores_are_saved_where_there_is_room():
    """At 65,536 tokens a head's take 4.3 GB."""
    saving = ["attention_key_gradient_hopper_kernel", "attention_saved_query_gradient_hopper_kernel"]
    computing = ["attention_query_gradient_hopper_kernel", "attention_key_gradient_hopper_kernel"]
    assert kernels_of(d=128)[2:] == saving
    assert kernels_of(d=128, length=16384)[2:] == 3 * saving
    assert kernels_of(d=128, length=65536)[2:] == computing
    assert kernels_of(d=64)[2:] == computing


@pytest.mark.parametrize("want_q", [False, True])
def test_what_is_not_wanted_is_not_computed(want_q):
    from cs336_triton import attention
    from cs336_triton.cross_compilation import CARDS, launches_of

    def call() -> None:
        x = meta(2, 4, 200, 128)
        saved = attention.forward(x, x, x, None, None, True, 0.1)
        gradients = attention.backward(
            torch.empty_like(x), x, x, x, *saved, None, None, True, 0.1, want_q=want_q, want_kv=not want_q
        )
        assert [gradient.numel() > 0 for gradient in gradients] == [want_q, not want_q, not want_q]

    wanted = "query" if want_q else "key"
    kernels = [launch.kernel.fn.__name__ for launch in launches_of(call, CARDS[90])]
    assert kernels[2:] == [f"attention_{wanted}_gradient_hopper_kernel"]


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_saved_tile_has_a_place_of_its_own(hopper, is_causal):
    saved_place = hopper.kernels.saved_place.fn
    for queries, keys in itertools.product(range(1, 6), repeat=2):
        tiles = [(i, j) for j in range(keys) for i in range(queries) if i >= j or not is_causal]
        places = [saved_place(query, key, queries, is_causal) for query, key in tiles]
        assert places == list(range(hopper.saved_tiles(queries, keys, is_causal)))


@pytest.mark.parametrize(("heads", "blocks"), [(1, 1), (3, 9), (16, 64), (64, 64), (24, 8)])
def test_every_program_gets_a_tile_of_its_own_and_the_last_one_the_shortest(hopper, heads, blocks, monkeypatch):
    language = SimpleNamespace(cdiv=lambda a, b: -(-a // b), minimum=min, where=lambda c, a, b: a if c else b)
    monkeypatch.setattr(hopper.kernels, "gl", language)
    located = hopper.kernels.located.fn
    for section in range(1, heads + 1):
        found = [located(tile, heads, blocks, section) for tile in range(heads * blocks)]
        assert sorted(found) == [(head, rank) for head in range(heads) for rank in range(blocks)]
        assert found[-1][1] == blocks - 1


def test_masks_and_documents_go_to_the_other_kernels(monkeypatch):
    from cs336_triton import attention_hopper

    assert kernels_of() == [
        "attention_forward_hopper_kernel",
        "attention_statistics_kernel",
        "attention_query_gradient_hopper_kernel",
        "attention_key_gradient_hopper_kernel",
    ]
    plain = [f"attention_{part}_kernel" for part in ("forward", "delta", "query_gradient", "key_gradient")]
    assert kernels_of("mask") == kernels_of("documents") == plain
    monkeypatch.setattr(attention_hopper, "AVAILABLE", False)
    assert kernels_of() == plain


def test_descriptors_would_pass_the_checks_that_they_skip(hopper):
    """`described` makes them without Triton's constructor, for the time it takes."""
    from cs336_triton import attention, attention_hopper, configurations
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def launches(x: torch.Tensor, chosen: dict) -> list:
        from cs336_triton.cross_compilation import CARDS
        from cs336_triton.runtime import record_launches

        with configurations.experiment(chosen) as found, record_launches(CARDS[90]) as launched:
            saved = attention.forward(x, x, x, None, None, True, 0.1)
            attention.backward(torch.empty_like(x), x, x, x, *saved, None, None, True, 0.1)
        found_keys.update(found.found)
        return launched

    found_keys: dict = {}
    single = torch.empty_strided((1, 1, 200, 64), (1, 0, 64, 1), dtype=torch.bfloat16, device="meta")
    for x in (meta(2, 200, 4, 128).transpose(1, 2), meta(1, 2, 2100, 64), single):
        found_keys.clear()
        launched = launches(x, {})
        for key, candidates in list(found_keys.items()):
            for candidate in candidates[1:]:
                launched += launches(x, {key: candidate})
        seen = 0
        for launch in launched:
            for made in launch.arguments:
                if hasattr(made, "block_shape"):
                    seen += 1
                    checked = TensorDescriptor(made.base, made.shape, made.strides, made.block_shape, made.layout)
                    assert (checked.padding, checked.layout) == (made.padding, made.layout)
        expected = 16 if x.shape[3] in attention_hopper.SAVING_WIDTHS else 18
        assert seen == expected * (1 + sum(len(candidates) - 1 for candidates in found_keys.values()))


def test_compiled_kernels_are_told_apart_by_tiles_and_dtypes(hopper):
    from cs336_triton.runtime import _kind

    one, other = meta(2, 4, 200, 64), meta(2, 4, 300, 64)
    assert _kind(hopper.described(one, 64)) == _kind(hopper.described(other, 64))
    assert _kind(hopper.described(one, 64)) != _kind(hopper.described(one, 128))
    assert _kind(hopper.described(one, 64)) != _kind(hopper.described(one.half(), 64))


@pytest.mark.parametrize(("length", "consumers"), [(1024, 2), (4096, 3)])
def test_short_sequences_get_shorter_tiles(hopper, length, consumers):
    """At 64 features tiles of 192 queries would leave an eighth of the rows of 1024 queries empty."""
    from cs336_triton.cross_compilation import CARDS
    from cs336_triton.runtime import record_launches

    x = meta(2, 4, length, 64)
    with record_launches(CARDS[90]) as launches:
        hopper.forward(x, x, x, torch.empty_like(x), torch.empty(2, 4, length, device="meta"), True, 0.1)
    assert launches[0].keywords["CONSUMERS"] == consumers


def test_a_triton_without_gluon_is_no_obstacle():
    script = """
import sys
sys.modules["triton.experimental.gluon"] = None
from cs336_triton import attention, attention_hopper
assert not attention_hopper.AVAILABLE
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
