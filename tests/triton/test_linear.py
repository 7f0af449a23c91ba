"""The linear map is PyTorch's; this shows that it is passed on whole."""

from __future__ import annotations

import pytest

from .kernel_checks import DTYPES, check_against_float64, check_full_graph, check_gradients_numerically, maker


@pytest.fixture
def linear():
    from cs336_triton.linear import linear

    return linear


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", *DTYPES])
def test_matches_float64(linear, dtype, strided):
    make = maker(dtype, strided=strided)
    check_against_float64("linear", linear, {"x": make.normal(3, 5, 63), "weight": make.normal(17, 63)})


def test_compiles_whole(linear):
    check_full_graph(linear, maker().normal(3, 9), maker().normal(5, 9))


def test_gradcheck(linear):
    check_gradients_numerically(linear, maker().normal(3, 5), maker().normal(4, 5))
