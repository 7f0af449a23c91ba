"""Training on the Triton kernels follows training on the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import cs336_registry as registry

from .kernel_checks import DEVICE

STEPS = 200
VOCAB, CONTEXT, BATCH = 32, 16, 1


def loss_curve(backend: str, dtype: torch.dtype) -> list[float]:
    """The losses of a tiny model that learns to continue arithmetic sequences; the same start and data for all."""
    with registry.use(f"{backend}!"):
        from cs336_registry.nn import TransformerLM

        model = TransformerLM(VOCAB, CONTEXT, d_model=16, num_layers=1, num_heads=1, d_ff=24)
        cross_entropy, clip, adamw = (registry.get(name) for name in ("cross_entropy", "gradient_clipping", "adamw"))
    generator = np.random.Generator(np.random.PCG64(0))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            scale = 0.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            values = generator.standard_normal(tuple(parameter.shape)) * scale + (parameter.ndim == 1)
            # Drawn in float64 and rounded to float32 for all, so that the curves start from the same numbers.
            parameter.copy_(torch.from_numpy(values).float())
    model = model.to(DEVICE, dtype)
    optimizer = adamw(model.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(STEPS):
        start, stride = generator.integers(0, VOCAB, (BATCH, 1)), generator.integers(1, 4, (BATCH, 1))
        tokens = torch.from_numpy((start + stride * np.arange(CONTEXT + 1)) % VOCAB).to(DEVICE)
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_two_hundred_steps_stay_beside_the_reference():
    """In float32 both backends drift from float64 by rounding errors that training amplifies. The reference's own drift
    up to a step says how much is amplified there; other orders of summation may drift four times as far, and by a few
    roundings of the loss before there is any drift to speak of."""
    truth, plain, found = (
        np.array(loss_curve(backend, dtype))
        for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32))
    )
    assert np.isfinite(found).all()
    assert truth[-20:].mean() < 0.5 * truth[:20].mean(), "the model does not learn: nothing is compared"
    drift = np.array(list(itertools.accumulate(np.abs(plain - truth), max)))
    band = 4 * drift + 32 * np.finfo(np.float32).eps * truth[0]
    beyond = np.flatnonzero(np.abs(found - truth) > band)
    assert not beyond.size, (
        f"at step {beyond[0]} the loss is {found[beyond[0]]:.8f}, the float64 reference's {truth[beyond[0]]:.8f}, and "
        f"the band is {band[beyond[0]]:.2g} wide"
    )
