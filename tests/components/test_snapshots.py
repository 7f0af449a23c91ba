"""Every backend against results that are kept in the repository: a change of any result is seen in review.

The snapshots are made by the reference, in float64, from the contracts' cases (`--update-snapshots`), one file a
component. Of large results a fixed selection of entries is kept, and of text a digest of everything besides.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cs336_registry import registry
from cs336_registry.compare import assert_within
from cs336_registry.conformance.checks import Check
from cs336_registry.conformance.subject import find
from cs336_registry.conformance.trial import Trial, expected
from cs336_registry.conformance.values import is_array, is_tensor, leaves, widened
from cs336_registry.machine import detect
from cs336_registry.text.files import atomic_write

FOLDER = Path(__file__).parent.parent / "_snapshots"
KEPT = 256
"""Entries kept of a result."""

# What "io" components write depends on the machine, and distributed ones are judged on two ranks by the kit alone.
COMPONENTS = sorted(
    name
    for name in registry.components()
    if registry.contract(name).kind != "io" and name not in ("ddp", "fsdp", "sharded_optimizer")
)
CASES = [(name, case.id) for name in COMPONENTS for case in sorted(registry.contract(name).cases, key=lambda c: c.id)]


def dtype_of(contract):
    return "float32" if "float32" in contract.dtypes else next(iter(contract.dtypes), None)


def selected(values):
    """At most KEPT entries of a tensor or an array, evenly spread, the first and the last among them."""
    flat = values.reshape(-1)
    places = np.unique(np.linspace(0, max(len(flat) - 1, 0), min(KEPT, len(flat))).round().astype(int))
    return flat[torch.from_numpy(places)] if is_tensor(values) else flat[places]


def flattened(result):
    """(tensors by path, everything else by path as text)."""
    tensors, others = {}, {}
    for path, leaf in leaves(result, "result"):
        if is_tensor(leaf) or is_array(leaf):
            tensors[path] = leaf
        else:
            others[path] = repr(leaf)
    return tensors, others


def summary(others):
    lines = [f"{path}={text}" for path, text in sorted(others.items())]
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    step = max(len(lines) // 32, 1)
    return {"count": len(lines), "sha256": digest, "some": [line[:200] for line in lines[::step]]}


@functools.cache
def snapshot(component):
    """case -> (kept tensors by path, shapes by path, summary of the rest)."""
    text = json.loads((FOLDER / f"{component}.json").read_text(encoding="utf-8"))
    path = FOLDER / f"{component}.npz"
    arrays = {}
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    return text, arrays


def write_snapshot(component, folder):
    contract = registry.contract(component)
    reference = find("reference", component).load()
    text, arrays = {}, {}
    for case in contract.cases:
        arguments = Trial(folder=folder).arguments(contract, case, dtype_of(contract))
        tensors, others = flattened(contract.run(reference, arguments if contract.exact else widened(arguments)))
        for path, tensor in tensors.items():
            arrays[f"{case.id}/{path}"] = selected(np.asarray(tensor.detach() if is_tensor(tensor) else tensor))
        text[case.id] = {
            "shapes": {path: list(tensor.shape) for path, tensor in tensors.items()},
            "others": summary(others),
        }
    if arrays:
        with atomic_write(FOLDER / f"{component}.npz") as file:
            np.savez_compressed(file, **arrays)
    with atomic_write(FOLDER / f"{component}.json", "w") as file:
        json.dump(text, file, ensure_ascii=True, indent=1)
        file.write("\n")


@pytest.fixture(scope="module", params=COMPONENTS)
def updated_component(request, tmp_path_factory):
    if not request.config.getoption("--update-snapshots"):
        pytest.skip("run with --update-snapshots to write tests/_snapshots anew")
    write_snapshot(request.param, tmp_path_factory.mktemp("snapshots"))
    return request.param


def test_update(updated_component):
    """Comes first, so that `--update-snapshots` compares with what it has just written."""
    text, _ = snapshot(updated_component)
    assert set(text) == {case.id for case in registry.contract(updated_component).cases}


@pytest.mark.parametrize(("component", "case_id"), CASES, ids=["-".join(case) for case in CASES])
def test_snapshot(implementation_of, cs336_backend, component, case_id, tmp_path):
    contract = registry.contract(component)
    case, dtype, subject = contract.case(case_id), dtype_of(contract), find(cs336_backend, component)
    implementation = implementation_of(component)
    unclaimed = Check("case", contract, case, dtype).unclaimed(subject.claims, detect(), subject.device)
    if unclaimed:
        pytest.skip("; ".join(unclaimed))
    trial = Trial(folder=tmp_path, device=subject.device)
    text, arrays = snapshot(component)
    assert case_id in text, f"tests/_snapshots/{component}.json lacks {case_id!r}: run pytest --update-snapshots"
    found = contract.run(implementation, trial.arguments(contract, case, dtype))
    tensors, others = flattened(found)
    assert {path: list(tensor.shape) for path, tensor in tensors.items()} == text[case_id]["shapes"]
    if contract.exact:
        assert summary(others) == text[case_id]["others"]
        plain = tensors
    else:
        plain, _ = flattened(expected(contract, case, dtype, trial)[0])
    for path, tensor in tensors.items():
        kept = torch.from_numpy(arrays[f"{case_id}/{path}"])
        assert_within(selected(tensor), kept, selected(plain[path]), contract.tolerance, what=path)
    if not tensors and not contract.exact:
        (value,) = (leaf for _, leaf in leaves(found))
        assert_within(value, float(text[case_id]["others"]["some"][0].partition("=")[2]), value, contract.tolerance)
