"""The selector grammar: `[component=]backend[!|?]`, separated by commas."""

from __future__ import annotations

import pytest

from cs336_registry.errors import SelectorError
from cs336_registry.selection import Choice, Selection, parse


@pytest.mark.parametrize(
    ("selector", "choices"),
    [
        ("triton", [Choice("triton")]),
        ("triton!", [Choice("triton", demand=True)]),
        ("triton?", [Choice("triton")]),
        ("attention=triton", [Choice("triton", "attention", demand=True)]),
        ("attention=triton?", [Choice("triton", "attention")]),
        ("attention=triton!", [Choice("triton", "attention", demand=True)]),
        (" triton , adamw = torch ", [Choice("triton"), Choice("torch", "adamw", demand=True)]),
        ("triton,torch", [Choice("triton"), Choice("torch")]),
        ("auto", [Choice("auto")]),
    ],
)
def test_reads(selector, choices):
    assert parse(selector) == Selection(tuple(choices))
    assert parse(str(parse(selector))) == parse(selector), "a selection's text reads back as itself"


@pytest.mark.parametrize(
    "selector", ["", ",", "triton,", "Triton", "a=b=c", "=triton", "attention=", "triton!!", "tri ton", "1x"]
)
def test_refuses_what_it_cannot_read(selector):
    with pytest.raises(SelectorError, match=r"can't read .* in selector .*: write \[component=\]backend\[!\|\?\]"):
        parse(selector)


def test_refuses_a_component_chosen_twice():
    with pytest.raises(SelectorError, match=r"chooses 'adamw' twice \(adamw=torch and adamw=triton\): keep one"):
        parse("adamw=torch,adamw=triton")


def test_a_components_own_choice_goes_first():
    selection = parse("triton,torch,adamw=torch")
    assert [str(choice) for choice in selection.for_component("adamw")] == ["adamw=torch", "triton", "torch"]
    assert [str(choice) for choice in selection.for_component("rmsnorm")] == ["triton", "torch"]
