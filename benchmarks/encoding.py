"""Encoding speed against the field: every library in a fresh process, in interleaved rounds, ids compared exactly.

    python benchmarks/encoding.py CORPUS TEXT [--vocab-size 32000] [--rounds 3] [--threads 1 2]
        [--peers numba_bpe gigatoken tiktoken tokenizers] [--peers-python /path/to/python]

The vocabulary is trained on CORPUS, whose most frequent pretokens `numba_bpe` keeps with it; TEXT is encoded twice in
the same process: the first pass meets every pretoken for the first time, the second is warm. The ids become a flat
array on disk. Rows are appended to results/encoding.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bpe_peers import ENCODERS
from bpe_processes import append_rows, machine, measure

THREADED = ("numba_bpe", "gigatoken")


def train(corpus: Path, vocab_size: int, target: Path) -> None:
    from cs336_numba_bpe.bpe_trainer import bpe_trainer
    from cs336_numba_bpe.pretoken_counter import pretoken_counter
    from cs336_numba_bpe.tokenizer import Tokenizer

    from cs336_registry.text.training_cache import WordCounts

    vocab, merges = bpe_trainer(corpus, vocab_size, ["<|endoftext|>"])
    readable = {"vocab": {token_id: token.hex() for token_id, token in vocab.items()}}
    target.write_text(json.dumps(readable | {"merges": [[left.hex(), right.hex()] for left, right in merges]}))
    counts = WordCounts.of(pretoken_counter(corpus, ["<|endoftext|>"]))
    Tokenizer(vocab, merges, ["<|endoftext|>"]).keep_frequent_words(counts, target.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--peers", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--peers-python", default=sys.executable, help="an interpreter that has the peers installed")
    parser.add_argument("--timeout", type=float, default=600.0)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        vocabulary, out = Path(name, "vocabulary.json"), Path(name, "ids.bin")
        train(options.corpus, options.vocab_size, vocabulary)
        num_bytes = options.text.stat().st_size
        common = machine() | {"corpus": options.corpus.stem, "vocab_size": options.vocab_size, "bytes": num_bytes}
        for round_number in range(options.rounds):
            for peer in options.peers:
                for threads in options.threads if peer in THREADED else [1]:
                    out.unlink(missing_ok=True)
                    arguments = ["encode", peer, str(options.text), str(vocabulary), str(out), str(threads)]
                    row = measure(options.peers_python, arguments, options.timeout)
                    if "error" not in row:
                        row["ids_digest"] = hashlib.sha256(out.read_bytes()).hexdigest()[:16]
                        for phase in ("first", "warm"):
                            row[f"{phase}_mb_per_second"] = round(num_bytes / 1e6 / row["phases"][phase], 1)
                    rows.append(common | {"round": round_number, "peer": peer, "threads": threads} | row)
                    print(peer, threads, row, flush=True)
    digests = {row["ids_digest"] for row in rows if "ids_digest" in row}
    print("all ids are equal" if len(digests) == 1 else f"ids differ: {len(digests)} different results")
    for row in rows:
        row["ids_equal"] = len(digests) == 1
    append_rows("encoding", rows)


if __name__ == "__main__":
    main()
