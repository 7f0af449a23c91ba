"""Encoding speed against the field: every library in a fresh process, in interleaved rounds, ids compared exactly.

    python benchmarks/encoding.py CORPUS [--vocab-size 32000] [--held-out 20] [--rounds 5] [--threads 1 2]
        [--peers numba_bpe gigatoken tiktoken] [--peers-python /path/to/python]

The vocabulary is trained on all of CORPUS but its first 20 MB, and the most frequent pretokens are kept with it, as
`cs336 tokenizer train` does; the held-out text is encoded. Of gigatoken there are its three entry points that give the
ids of a whole text. Modes:

    first           the first pass over the text after the tokenizer was loaded
    first, on disk  the same and writing the ids, in the type that the library gives them in, to a file
    warm            later passes of the same process, the median of three

Rows, one for each library and mode, with medians over the rounds, are appended to results/encoding.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bpe_peers import ENCODERS, END
from bpe_processes import MIB, append_rows, machine, measure

NAME = "encoding"
ONE_THREAD = ("gigatoken", "tiktoken", "tokenizers")
SLOW = ("tokenizers",)
"""Libraries that are run once, without a warm pass."""
MODES = {"first": ("first",), "first, on disk": ("first", "write"), "warm": ("warm",)}

Runs = dict[tuple[str, int], list[dict[str, Any]]]


def prepare(corpus: Path, num_bytes: int, vocab_size: int, text: Path, vocabulary: Path) -> None:
    """Write the held-out text, cut behind a document at about `num_bytes`, and train on the rest.

    In a process of its own: what its parent holds would count as the peak of every process that is measured.
    """
    content = corpus.read_bytes()
    cut = content.index(END.encode(), num_bytes) + len(END)
    text.write_bytes(content[:cut])
    rest = text.with_name("rest.txt")
    rest.write_bytes(content[cut:])
    train(rest, vocab_size, vocabulary)


def train(corpus: Path, vocab_size: int, target: Path) -> None:
    from cs336_numba_bpe.bpe_trainer import bpe_trainer
    from cs336_numba_bpe.pretoken_counter import pretoken_counter
    from cs336_numba_bpe.tokenizer import Tokenizer

    from cs336_registry.text.training_cache import WordCounts

    vocab, merges = bpe_trainer(corpus, vocab_size, [END])
    readable = {"vocab": {token_id: token.hex() for token_id, token in vocab.items()}}
    target.write_text(json.dumps(readable | {"merges": [[left.hex(), right.hex()] for left, right in merges]}))
    counts = WordCounts.of(pretoken_counter(corpus, [END]))
    Tokenizer(vocab, merges, [END]).keep_frequent_words(counts, target.parent)


def measured(text: Path, vocabulary: Path, out: Path, options: argparse.Namespace) -> Runs:
    """What each library's processes said, by library and number of threads."""
    runs: Runs = {}
    for round_number in range(options.rounds):
        for peer in options.peers:
            for threads in options.threads if peer not in ONE_THREAD else [1]:
                if peer in SLOW and round_number:
                    continue
                out.unlink(missing_ok=True)
                passes = "0" if peer in SLOW else "3"
                arguments = ["encode", peer, str(text), str(vocabulary), str(out), str(threads), passes]
                run = measure(options.peers_python, arguments, options.timeout)
                if "error" not in run:
                    run["digest"] = hashlib.sha256(out.read_bytes()).hexdigest()[:16]
                runs.setdefault((peer, threads), []).append(run)
                print(peer, threads, run, flush=True)
    return runs


def rows(
    runs: dict[tuple[str, int], list[dict[str, Any]]], common: dict[str, Any], oracle: str
) -> list[dict[str, Any]]:
    """One row for each library, number of threads and mode; ids are held against those of `oracle`."""
    expected = runs[oracle, 1][0].get("digest")
    found: list[dict[str, Any]] = []
    for mode, phases in MODES.items():
        for (peer, threads), all_runs in sorted(runs.items(), key=lambda run: run[0][1]):
            failed = [run["error"] for run in all_runs if "error" in run]
            row = common | {"mode": f"{threads} thread{'s' * (threads > 1)}, {mode}", "backend": peer}
            if failed:
                found.append(row | {"error": failed[0]})
                continue
            if any(phase not in run["phases"] for run in all_runs for phase in phases):
                continue
            seconds = [round(sum(run["phases"][phase] for phase in phases), 4) for run in all_runs]
            equal = all(run["digest"] == expected for run in all_runs)
            row |= {
                "version": all_runs[-1]["version"],
                "seconds": statistics.median(seconds),
                "all_seconds": seconds,
                "megabytes_per_second": round(common["bytes"] / 1e6 / statistics.median(seconds), 1),
                "load_seconds": statistics.median(run["phases"]["load"] for run in all_runs),
                "peak_memory": int(max(run["peak_mib"] for run in all_runs) * MIB),
                "result": f"ids {'equal' if equal else 'NOT equal'} to {oracle}'s",
            }
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--held-out", type=float, default=20.0, help="MB at the corpus's beginning")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--peers", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--peers-python", default=sys.executable, help="an interpreter that has the peers installed")
    parser.add_argument("--timeout", type=float, default=600.0)
    options = parser.parse_args()
    oracle = "tiktoken" if "tiktoken" in options.peers else options.peers[0]
    with tempfile.TemporaryDirectory() as name:
        text, vocabulary = Path(name, "held_out.txt"), Path(name, "vocabulary.json")
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            size = int(options.held_out * 1e6)
            pool.submit(prepare, options.corpus, size, options.vocab_size, text, vocabulary).result()
        common = {"benchmark": NAME} | machine()
        common |= {"corpus": f"{options.corpus.stem} {options.vocab_size // 1000}k", "bytes": text.stat().st_size}
        runs = measured(text, vocabulary, Path(name, "ids.bin"), options)
    found = rows(runs, common, oracle)
    append_rows(NAME, found)
    for row in found:
        print(row["corpus"], row["mode"], row["backend"], row.get("megabytes_per_second"), row.get("result"))


if __name__ == "__main__":
    main()
