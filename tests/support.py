"""What the tests of tensor components share: seeded values, the backend's device, and settings for properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from cs336_registry.conformance.subject import find

properties = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def normal(*shape: int, seed: int = 0, device="cpu", dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Standard normal values times scale, equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)


def device_of(backend: str, component: str) -> str:
    """Where the tensors that `backend`'s `component` is tested with must live."""
    subject = find(backend, component)
    return "cpu" if subject.claims is None else subject.device


def skip_without_float64(backend: str, component: str) -> None:
    """gradcheck compares with finite differences, which only float64 resolves."""
    claims = find(backend, component).claims
    if claims is not None and "float64" not in claims.dtypes:
        pytest.skip(f"{backend} does not claim float64 for {component}, which gradcheck needs")
