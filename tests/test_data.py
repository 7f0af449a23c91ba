"""Area "data": get_batch cuts windows and their next tokens out of one long array."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .support import device_of, properties


@pytest.fixture
def device(cs336_backend):
    return device_of(cs336_backend, "get_batch")


def test_shapes_and_the_shift_by_one(implementation_of, device):
    inputs, targets = implementation_of("get_batch")(np.arange(100), 32, 7, device)
    assert inputs.shape == targets.shape == (32, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.device.type == targets.device.type == device
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7, device=device))


def test_starts_are_uniform_over_every_place_with_a_next_token(implementation_of, device):
    get_batch = implementation_of("get_batch")
    starts = torch.cat([get_batch(np.arange(100), 32, 7, device)[0][:, 0] for _ in range(1000)]).cpu().numpy()
    assert starts.min() == 0 and starts.max() == 92
    counts = np.bincount(starts, minlength=93)
    expected = 32_000 / 93
    # Six standard deviations: one false alarm in five million places.
    assert abs(counts - expected).max() < 6 * expected**0.5


def test_a_memory_map_of_uint16_is_read_where_it_lies(implementation_of, device, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 10_000).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    seeds = (np.random.default_rng(7) for _ in range(2))
    get_batch = implementation_of("get_batch")
    from_disk, from_memory = (
        get_batch(array, 4, 128, device, generator=seed) for array, seed in zip((mapped, tokens), seeds, strict=True)
    )
    assert torch.equal(from_disk[0], from_memory[0]) and torch.equal(from_disk[1], from_memory[1])
    assert from_disk[0].max() > 32767, "large ids must not become negative"


def test_an_unknown_device_is_torchs_own_error(implementation_of):
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA|device"):
        implementation_of("get_batch")(np.arange(100), 2, 4, "cuda:99")


@settings(properties, max_examples=30)
@given(tokens=st.integers(2, 300), batch_size=st.integers(1, 9), seed=st.integers(0, 2**32), data=st.data())
def test_every_window_is_a_piece_of_the_dataset(implementation_of, device, tokens, batch_size, seed, data):
    context_length = data.draw(st.integers(1, tokens - 1))
    dataset = np.random.default_rng(seed).integers(0, 50, tokens)
    inputs, targets = implementation_of("get_batch")(dataset, batch_size, context_length, device)
    windows = np.lib.stride_tricks.sliding_window_view(dataset, context_length + 1).tolist()
    for row in torch.cat((inputs, targets[:, -1:]), dim=1).tolist():
        assert row in windows
