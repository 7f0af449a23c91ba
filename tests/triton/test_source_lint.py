"""Rules that every kernel file keeps, checked on the source: see the header of `cs336_triton.runtime`."""

from __future__ import annotations

import ast
from pathlib import Path

import cs336_triton
import pytest

FILES = {path.name: path for path in sorted(Path(cs336_triton.__file__).parent.glob("*.py"))}

FORBIDDEN = {
    "make_block_ptr": "block pointers are gone from Triton: use pointers or tensor descriptors",
    "advance": "block pointers are gone from Triton: use pointers or tensor descriptors",
    "libdevice": "libdevice does not exist in the interpreter: use tl.math",
    "inline_asm_elementwise": "inline assembly does not exist in the interpreter",
    "autotune": "tuning is asked for, not done at start: use configurations.configuration",
    "atomic_add": "the order of atomic additions changes from run to run",
    **{
        name: "the host must not wait for the device: keep the number in a tensor"
        for name in ("item", "tolist", "cpu", "nonzero", "synchronize")
    },
}


def lint(source: str, name: str = "kernel.py") -> list[str]:
    """Every breach of the rules in `source`, as "line: what is wrong"."""
    tree = ast.parse(source)
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    found = []
    for node in ast.walk(tree):
        called = getattr(node, "attr", None) if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        if isinstance(node, ast.alias):
            called = node.name.rpartition(".")[2]
        if called in FORBIDDEN and not _is_gluon(node):
            found.append(f"{node.lineno}: {FORBIDDEN[called]}")
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr in ("dot", "dot_scaled") and _is_tl(node.func.value) and _function(node, parents) != "dot":
            found.append(f"{node.lineno}: matrix products go through runtime.dot")
        if node.func.attr == "program_id" and not _is_gluon(node.func) and not _is_cast_to_int64(node, parents):
            found.append(f"{node.lineno}: cast the program id before anything else: tl.program_id(0).to(tl.int64)")
    return found


def _is_tl(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("tl", "language")


def _is_gluon(node: ast.AST) -> bool:
    """Gluon's kernels never run in the interpreter, and the copy engine counts rows in int32."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gl"


def _function(node: ast.AST, parents: dict) -> str:
    while node in parents and not isinstance(node, ast.FunctionDef):
        node = parents[node]
    return getattr(node, "name", "")


def _is_cast_to_int64(call: ast.Call, parents: dict) -> bool:
    """The parent is `.to`, its parent is the call with tl.int64."""
    attribute = parents[call]
    if not (isinstance(attribute, ast.Attribute) and attribute.attr == "to"):
        return False
    cast = parents[attribute]
    return isinstance(cast, ast.Call) and ast.unparse(cast.args[0]) == "tl.int64"


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_rules_are_kept(name):
    found = lint(FILES[name].read_text(encoding="utf-8"), name)
    assert not found, f"{name}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("row = tl.program_id(0) * BLOCK", "cast the program id"),
        ("row = tl.program_id(0).to(tl.int32)", "cast the program id"),
        ("pointer = tl.make_block_ptr(x, (1,), (1,), (0,), (16,), (0,))", "block pointers"),
        ("c = tl.dot(a, b)", "runtime.dot"),
        ("from triton.language.extra import libdevice", "libdevice"),
        ("@triton.autotune(configs=[], key=[])\ndef kernel(): ...", "tuning is asked for"),
        ("tl.atomic_add(x, 1.0)", "atomic additions"),
        ("y = tl.extra.libdevice.tanh(x)", "libdevice"),
        ("if norm.item() > max_l2_norm: ...", "must not wait"),
    ],
    ids=["uncast", "int32", "block_pointer", "dot", "libdevice_import", "autotune", "atomic", "libdevice_call", "item"],
)
def test_a_breach_is_found(source, complaint):
    assert any(complaint in line for line in lint(source)), lint(source)


def test_good_source_passes():
    assert lint("row = tl.program_id(0).to(tl.int64) * BLOCK\nc = dot(a, b, c)") == []
    assert lint("head = gl.program_id(1)\ny = gl.inline_asm_elementwise(x)") == []
