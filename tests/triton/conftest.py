"""Kernel tests run on a GPU where there is one, otherwise in Triton's interpreter on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, so before any test module is.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where this folder is named on the command line: `pytest tests/triton --compile-for=80`."""
    parser.addoption(
        "--compile-for",
        action="append",
        type=int,
        choices=(80, 100),
        help="compile the Triton kernels for this compute capability too (80: A100, 100: B200); takes minutes",
    )


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    """What a kernel forgets to write shows as NaN: every floating tensor from torch.empty starts so."""

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda") and type(tensor) is torch.Tensor:
                tensor.fill_(float("nan"))
            return tensor

        return make_poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
