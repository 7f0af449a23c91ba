"""Every kernel that Python calls: the group it is compiled with, its module and its argument types.

Types are numpy's names with `[]` for each dimension of a C-contiguous array; every kernel returns an int64.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    module: str
    arguments: tuple[str, ...]


_SPECIAL_TOKENS = "int64 int64[] int64[] int64[] uint8[]"
_TABLE = "uint64[][] uint8[] int64[]"
_BATCH = "uint64[] uint64[] int64[]"

_ROWS = "uint64[] int64[] int64[] int64[]"
_PAIRS = "uint64[] int32[]"
_TOKENS = "uint8[] int64[] int64[] uint64[]"
_NEIGHBOURS = "int64[] int64[] int64[] int64[] int32[] int32[]"
_LIST_BYTE_PAIRS = f"{{symbol}}[] int64[] int64[] int64[] {{place}}[] uint64[] int64[] int64[] int64[] {_PAIRS} int64[]"
_MERGE_PAIRS = (
    f"int64 {{symbol}}[] int64[] {{place}}[] {_ROWS} {_PAIRS} int64[] int32[] {_TOKENS} {_NEIGHBOURS} "
    f"{{place}}[] int32[] int32[] int32[] int32[] int64[] int64[] int64 int64 int32[] int32[]"
)

_MERGING = "uint64[][] int32[] int64[] int64[] int64[] int64[] int64[] int64[]"
_ENCODE_TABLE = "uint64[][] uint64[][] uint8[] int32[] int64[]"


def symbol_of(name: str) -> str:
    """A kernel's name in machine code."""
    return "cs336_" + name.replace(":", "_")


def _kernel(module: str, arguments: str) -> Kernel:
    return Kernel(module, tuple(arguments.split()))


def _merge_kernels(**types: str) -> dict[str, Kernel]:
    symbol = types["symbol"]
    return {
        "lay_out_words": _kernel(
            "word_layout", f"uint8[] int64[] int64[] int64[] {symbol}[] int64[] int64[] int64[] int64"
        ),
        "list_byte_pairs": _kernel("word_layout", _LIST_BYTE_PAIRS.format(**types)),
        "merge_pairs": _kernel("merge_engine", _MERGE_PAIRS.format(**types)),
    }


GROUPS: dict[str, dict[str, Kernel]] = {
    "count": {
        "count_block": _kernel(
            "count_table",
            f"uint8[] int64 int64 int64 int64 {_SPECIAL_TOKENS} uint8[] int64[] {_TABLE} {_BATCH}",
        ),
        "move_table": _kernel("count_table", "uint64[][] uint64[][]"),
        "add_table": _kernel("count_table", f"{_TABLE} uint64[][] uint8[] int64"),
        "add_words": _kernel("count_table", f"uint8[] int64[] int64[] {_TABLE}"),
        "total_bytes": _kernel("count_table", "uint64[][]"),
        "list_words": _kernel("count_table", "uint64[][] uint8[] uint64[] uint8[] int64[] int64[]"),
        "measure_words": _kernel("word_layout", "int64[] int64[] int64[] int64[]"),
    },
    "merge": {
        **_merge_kernels(symbol="uint16", place="int32"),
        "move_pairs": _kernel("pair_table", "uint64[] int32[] uint64[] int32[]"),
    },
    # For vocabularies of more than 2**16 tokens, and for corpora whose unique words have 2**31 bytes or more.
    "merge_wide": {
        **_merge_kernels(symbol="int32", place="int64"),
        "move_pairs": _kernel("pair_table", "uint64[] int32[] uint64[] int32[]"),
    },
    "encode": {
        "put_merges": _kernel("encoder", "int32[] int32[] int32[] int32[] uint64[][]"),
        "encode_words": _kernel("encoder", f"uint8[] int64[] {_ENCODE_TABLE} {_MERGING} int64"),
        "merge_words": _kernel(
            "encoder",
            "uint8[] int64[] uint64[][] int32[] int64[] int64[] int64[] int64[] int64[] int64[] int64[] uint32[] "
            "int64[]",
        ),
        "put_words": _kernel("encoder", f"uint8[] int64[] uint32[] int64[] {_ENCODE_TABLE} int64[] int64"),
        "encode_block": _kernel(
            "encoder",
            f"uint8[] int64 int64 int64 int64 {_SPECIAL_TOKENS} int32[] uint8[] int64[] uint64[] "
            f"{_ENCODE_TABLE} {_MERGING} uint8[] int64",
        ),
        "move_table": _kernel("count_table", "uint64[][] uint64[][]"),
    },
}
