"""Training speed and memory against the field: every library in a fresh process, in interleaved rounds.

    python benchmarks/bpe_training.py CORPUS... [--vocab-sizes 10000 32000] [--sizes 1 10 100 1000] [--rounds 3]
        [--peers numba_bpe gigatoken ...] [--peers-python /path/to/python] [--timeout 1200]

Process wall time (start-up included), processor time and peak resident memory are measured from outside. Which merges
agree is stated with every row: those of the backends here must be equal to one another; peers are held against
`numba_bpe` with the tie rule "smallest_ids", and the first merge that differs is named, with both counts. Rows are
appended to results/bpe_training.jsonl, and results/bpe_training.png shows growth with size. Run it on a quiet machine.
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
from bpe_processes import RESULTS, SEPARATOR, append_rows, machine, measure, slice_of

NAME = "bpe_training"
OWN = ("numba_bpe", "heap_bpe", "reference")
REFERENCE = "numba_bpe_smallest_ids"


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
    engine = MergeEngine(words, 256 + len(merges))
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
        for corpus in options.corpora:
            for size in options.sizes or [corpus.stat().st_size / 1e6]:
                text = corpus if options.sizes is None else slice_of(corpus, int(size * 1e6), folder)
                for vocab_size in options.vocab_sizes:
                    compare(text, corpus.stem, vocab_size, folder, options)
    table(RESULTS / f"{NAME}.jsonl")
    picture(RESULTS / f"{NAME}.jsonl", RESULTS / f"{NAME}.png")


def compare(text: Path, corpus: str, vocab_size: int, folder: Path, options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    common = machine() | {"corpus": corpus, "bytes": text.stat().st_size, "vocab_size": vocab_size}
    for round_number in range(options.rounds):
        for peer in options.peers:
            out = folder / f"merges_{peer}.txt"
            row = measure(options.peers_python, ["train", peer, str(text), str(vocab_size), str(out)], options.timeout)
            rows.append(common | {"round": round_number, "peer": peer} | row)
            print(f"{corpus} {text.stat().st_size / 1e6:.0f} MB, {vocab_size}, {peer}: {row}", flush=True)
    expected = {
        True: read_merges(folder / "merges_numba_bpe.txt"),
        False: read_merges(folder / f"merges_{REFERENCE}.txt"),
    }
    for row in rows:
        own = row["peer"] in OWN
        if expected[own] and "error" not in row:
            found = read_merges(folder / f"merges_{row['peer']}.txt")
            row["merges_against"] = "numba_bpe" if own else REFERENCE
            row["agreement"] = agreement(found, expected[own], text)
    append_rows(NAME, rows)


def medians(path: Path) -> dict[tuple[str, int, int, str], dict[str, Any]]:
    """The median of each figure over the rounds of the last commit that measured it."""
    groups: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "error" not in row:
            groups.setdefault((row["corpus"], row["bytes"], row["vocab_size"], row["peer"]), []).append(row)
    found = {}
    for key, rows in sorted(groups.items()):
        latest = [row for row in rows if row["commit"] == rows[-1]["commit"]]
        figures = ("wall_seconds", "processor_seconds", "peak_mib")
        found[key] = {name: statistics.median(row[name] for row in latest) for name in figures}
        found[key] |= {"rounds": len(latest), "agreement": latest[-1].get("agreement", ""), "load": latest[-1]["load"]}
    return found


def table(path: Path) -> None:
    """Print the medians as a Markdown table."""
    print("| corpus | MB | vocab | library | wall s | processor s | peak MiB | merges |")
    print("|---|---|---|---|---|---|---|---|")
    for (corpus, num_bytes, vocab_size, peer), row in medians(path).items():
        print(
            f"| {corpus} | {num_bytes / 1e6:.0f} | {vocab_size} | {peer} | {row['wall_seconds']:.2f} | "
            f"{row['processor_seconds']:.2f} | {row['peak_mib']:.0f} | {row['agreement']} |"
        )


def picture(path: Path, target: Path) -> None:
    """Time and memory against the size of the text, a line for each library, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = medians(path)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    largest_vocab = max(vocab_size for _, _, vocab_size, _ in found)
    lines: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for (corpus, num_bytes, vocab_size, peer), row in found.items():
        if vocab_size == largest_vocab:
            lines.setdefault((peer, corpus), []).append((num_bytes, row))
    for (peer, corpus), points in sorted(lines.items()):
        megabytes = [num_bytes / 1e6 for num_bytes, _ in points]
        for axis, figure_name in zip(axes, ("wall_seconds", "peak_mib"), strict=True):
            axis.plot(megabytes, [row[figure_name] for _, row in points], marker="o", label=f"{peer}, {corpus}")
    for axis, label in zip(axes, ("process wall time (s)", "peak resident memory (MiB)"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="text (MB)", ylabel=label)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"BPE training, vocabulary of {largest_vocab}")
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
