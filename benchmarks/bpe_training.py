"""Training speed and memory against the field: every library in a fresh process, in interleaved rounds.

    python benchmarks/bpe_training.py CORPUS... [--vocab-sizes 10000 32000] [--sizes 1 10 100 1000] [--rounds 3]
        [--peers numba_bpe gigatoken ...] [--peers-python /path/to/python] [--timeout 1200]

Process wall time (start-up included, bytecode and kernels compiled before) and peak resident memory are measured from
outside. What the merges agree with is stated in every row: those of the backends here must be equal to one another;
peers are held against `numba_bpe` with the tie rule "smallest_ids", and the first merge that differs is named, with
both counts. A row has the medians of one run and the seconds of `numba_bpe` in the same run. Rows are appended to
results/bpe_training.jsonl; results/bpe_training_TEXT_VOCABULARY.svg show growth with the text's size and its unique
pretokens, of texts that were measured at several sizes. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bpe_peers import TRAINERS
from bpe_processes import MIB, RESULTS, SEPARATOR, append_rows, machine, measure, slice_of

from cs336_registry.bench.pictures import growth

NAME = "bpe_training"
OWN = ("numba_bpe", "heap_bpe", "reference")
REFERENCE = "numba_bpe_smallest_ids"
START_BYTES = 10_000_000
"""Enough text for kernels to be compiled."""
SLOW_SECONDS = 20
"""What takes longer than this is run once."""


def read_merges(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def agreement(found: list[str], expected: list[str], text: Path) -> str:
    """ "equal", or the first merge that differs, with both pairs' counts, and how many of all merges both have."""
    if found == expected:
        return "equal"
    place = next((i for i, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other), None)
    shared = len(set(found) & set(expected)) / max(1, len(expected))
    summary = f"{shared:.2%} of the merges are in both"
    if place is None:
        return f"one has {len(found)} merges, the other {len(expected)}; {summary}"
    before, one, other = pairs_of(expected[:place]), *pairs_of([found[place], expected[place]])
    counts = counts_after(text, before, [one, other])
    described = " against ".join(f"{pair!r} ({count})" for pair, count in zip((one, other), counts, strict=True))
    return f"differs from merge {place} on: {described}; {summary}"


def pairs_of(lines: list[str]) -> list[tuple[bytes, bytes]]:
    split = [line.split() for line in lines]
    return [(bytes.fromhex(left), bytes.fromhex(right)) for left, right in split]


def counts_after(text: Path, merges: list[tuple[bytes, bytes]], pairs: list[tuple[bytes, bytes]]) -> list[int]:
    """How often each pair occurs in `text` once `merges` are done."""
    from cs336_numba_bpe.count_table import WordCounts
    from cs336_numba_bpe.merge_engine import MergeEngine
    from cs336_numba_bpe.pretoken_counter import pretoken_counter

    words = WordCounts.from_dict(pretoken_counter(text, [SEPARATOR.decode()]))
    engine = MergeEngine(words, 256 + len(merges), all_pairs=True)
    engine.replay(merges)
    return [engine.pair_count(*pair) for pair in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="*", type=Path)
    parser.add_argument("--vocab-sizes", nargs="+", type=int, default=[10_000, 32_000])
    parser.add_argument("--sizes", nargs="+", type=float, default=None, help="MB taken from each corpus (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=TRAINERS, default=[REFERENCE, "numba_bpe", "gigatoken"])
    parser.add_argument("--peers-python", default=sys.executable, help="an interpreter that has the peers installed")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for corpus in options.corpora[:1]:
            start_once(slice_of(corpus, min(START_BYTES, corpus.stat().st_size), folder), folder, options)
        for corpus in options.corpora:
            for size in options.sizes or [None]:
                text = corpus if size is None else slice_of(corpus, int(size * 1e6), folder)
                label = corpus.stem if size is None else f"{corpus.stem} {size:g} MB"
                for vocab_size in options.vocab_sizes:
                    compare(text, {"corpus": label, "text": corpus.stem}, vocab_size, folder, options)
    rows = [json.loads(line) for line in (RESULTS / f"{NAME}.jsonl").read_text().splitlines()]
    for text, vocab_size in dict.fromkeys((row["text"], row["vocab_size"]) for row in rows):
        mine = [row for row in rows if (row["text"], row["vocab_size"]) == (text, vocab_size)]
        for picture in growth(mine, f"BPE training, {mine[-1]['cores']} cores"):
            (RESULTS / f"{NAME}_{text}_{vocab_size}.svg").write_text(picture, encoding="utf-8")


def start_once(text: Path, folder: Path, options: argparse.Namespace) -> None:
    """Every library compiles its bytecode and kernels, as an installed one has done, before anything is measured."""
    for peer in options.peers:
        measure(options.peers_python, ["train", peer, str(text), "300", str(folder / "start.txt")], options.timeout)


def compare(text: Path, corpus: dict[str, str], vocab_size: int, folder: Path, options: argparse.Namespace) -> None:
    """Append one row for each peer: medians over the rounds, and what the merges were held against."""
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in options.peers}
    for _ in range(options.rounds):
        for peer in options.peers:
            if any(run["wall_seconds"] > SLOW_SECONDS for run in runs[peer]):
                continue
            out = folder / f"merges_{peer}.txt"
            run = measure(options.peers_python, ["train", peer, str(text), str(vocab_size), str(out)], options.timeout)
            runs[peer].append(run)
            print(f"{corpus['corpus']}, {vocab_size}, {peer}: {run}", flush=True)
    common = {"benchmark": NAME} | machine() | corpus | {"bytes": text.stat().st_size, "vocab_size": vocab_size}
    own_seconds = median(runs.get("numba_bpe", []), "wall_seconds")
    phases = [run["phases"] for measured in runs.values() for run in measured if "phases" in run]
    unique = next((phase["unique_pretokens"] for phase in phases if "unique_pretokens" in phase), None)
    common |= {"unique_pretokens": unique} if unique else {}
    rows: list[dict[str, Any]] = []
    for peer, measured in runs.items():
        failed = [run["error"] for run in measured if "error" in run]
        if failed:
            rows.append(common | {"backend": peer, "error": failed[0]})
            continue
        expected = "numba_bpe" if peer in OWN else REFERENCE
        found, right = (read_merges(folder / f"merges_{name}.txt") for name in (peer, expected))
        rows.append(
            common
            | {
                "backend": peer,
                "version": measured[-1]["version"],
                "seconds": median(measured, "wall_seconds"),
                "all_seconds": [run["wall_seconds"] for run in measured],
                "numba_bpe_seconds": own_seconds,
                "processor_seconds": median(measured, "processor_seconds"),
                "peak_memory": int(max(run["peak_mib"] for run in measured) * MIB),
                "phases": measured[-1]["phases"],
                "held_against": "" if peer == expected else expected,
                "result": agreement(found, right, text) if right and peer != expected else "",
            }
        )
    append_rows(NAME, rows)


def median(runs: list[dict[str, Any]], figure: str) -> float | None:
    values = [run[figure] for run in runs if "error" not in run]
    return round(statistics.median(values), 3) if values else None


if __name__ == "__main__":
    main()
