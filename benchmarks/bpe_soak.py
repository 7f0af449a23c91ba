"""Training that is killed again and again, and a disk that fills up: the result must be that of an undisturbed run.

    python benchmarks/bpe_soak.py [CORPUS] [--words 2000000] [--kills 100] [--backends numba_bpe heap_bpe] [--seed 0]
        [--full-disk FOLDER]

Each victim trains with a cache, another number of workers, and a checkpoint every few merges; it is killed (SIGKILL)
after a random part of the time that an undisturbed run takes, and started again until it ends; what it then wrote must
be identical. The phase each kill fell into, told from what lay in the cache, is counted. --full-disk FOLDER: a small
file system, mounted for this (mount -t tmpfs -o size=24m tmpfs FOLDER), where the cache is filled up and given room
again. Ends with status 1 at the first difference.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BACKENDS = ("numba_bpe", "heap_bpe")
VICTIM = """
import hashlib, importlib, sys
corpus, backend, workers, cache, every, vocab_size = sys.argv[1:]
module = importlib.import_module(f"cs336_{backend}.bpe_trainer")
if backend == "numba_bpe":
    from cs336_numba_bpe import corpus as counting, bpe_trainer as merging
    counting.SHARD_BYTES = 1 << 18  # so that a kill falls between shards too
    merging.SAVING_SHARE = 1e9  # every checkpoint that is due is written
else:
    from cs336_heap_bpe import pretoken_counter as counting
    counting.ONE_PROCESS_BYTES, counting.SMALLEST_SHARD = 0, 1 << 18
name = {"numba_bpe": "num_threads", "heap_bpe": "num_workers"}[backend]
options = {name: int(workers), "checkpoint_every": int(every), "cache_dir": cache or None}
vocab, merges = module.bpe_trainer(corpus, int(vocab_size), ["<|endoftext|>"], **options)
print(hashlib.sha256(repr((sorted(vocab.items()), merges)).encode()).hexdigest())
"""


def start(corpus: Path, backend: str, workers: int, cache: str, every: int, vocab_size: int) -> subprocess.Popen:
    arguments = [str(corpus), backend, str(workers), cache, str(every), str(vocab_size)]
    command = [sys.executable, "-c", VICTIM, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(victim: subprocess.Popen) -> str:
    out, errors = victim.communicate()
    if victim.returncode != 0:
        raise SystemExit(f"training failed:\n{errors[-2000:]}")
    return out.strip()


def phase(cache: Path) -> str:
    names = [path.name for path in cache.rglob("*") if path.is_file()]
    for found, prefix in (
        ("merging", "merges_"),
        ("before the first checkpoint", "word_counts_"),
        ("counting", "shard_"),
    ):
        if any(name.startswith(prefix) for name in names):
            return found
    return "start"


def soak(corpus: Path, backend: str, kills: int, vocab_size: int, source: random.Random) -> None:
    expected = finish(start(corpus, backend, 2, "", 300, vocab_size))
    phases: collections.Counter[str] = collections.Counter()
    runs = 0
    while phases.total() < kills:
        runs += 1
        with tempfile.TemporaryDirectory() as name:
            cache = Path(name)
            # An undisturbed run with this cache's cost, so that kills fall into every part of it.
            every, workers = source.choice((1, 7, 50, 300)), source.choice((1, 2, 3))
            began = time.monotonic()
            found = finish(start(corpus, backend, workers, str(cache / "timed"), every, vocab_size))
            took = time.monotonic() - began
            check(found, expected, "undisturbed with a cache")
            for _ in range(8):
                if phases.total() >= kills:
                    break
                victim = start(corpus, backend, source.choice((1, 2, 3)), str(cache / "killed"), every, vocab_size)
                try:
                    victim.wait(source.uniform(0.1, took))
                    break
                except subprocess.TimeoutExpired:
                    victim.send_signal(signal.SIGKILL)
                    victim.communicate()
                    phases[phase(cache / "killed")] += 1
            last = start(corpus, backend, source.choice((1, 2, 3)), str(cache / "killed"), every, vocab_size)
            check(finish(last), expected, f"run {runs} after {phases.total()} kills")
            left = sorted(path.name for path in (cache / "killed").rglob("shard_*"))
            if left:
                raise SystemExit(f"run {runs} left shards behind: {left}")
        print(
            f"{backend}: {phases.total()} kills in {runs} runs, all identical: {dict(sorted(phases.items()))}",
            flush=True,
        )


def fill_disk(corpus: Path, backend: str, folder: Path, vocab_size: int) -> None:
    """Train with the cache on a full disk: a clear error, nothing damaged; with room again, the same result."""
    expected = finish(start(corpus, backend, 2, "", 300, vocab_size))
    ballast, cache = folder / "ballast", folder / f"cache_{backend}"
    for left in (0, 1 << 14, 1 << 18, 1 << 20):
        space = os.statvfs(folder)
        ballast.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - left)))
        victim = start(corpus, backend, 2, str(cache), 300, vocab_size)
        out, errors = victim.communicate()
        last = (errors.strip().splitlines() or ["no error"])[-1]
        print(f"{backend}, {left} bytes left: status {victim.returncode}, {last}", flush=True)
        if victim.returncode == 0:
            check(out.strip(), expected, "with a nearly full disk")
        elif "No space left" not in last or "free some space" not in last:
            raise SystemExit(f"unclear: {last}")
        leftovers = list(folder.rglob("*.tmp"))
        if leftovers:
            raise SystemExit(f"half-written files were left: {leftovers}")
        ballast.unlink()
    check(finish(start(corpus, backend, 2, str(cache), 300, vocab_size)), expected, "with room again")
    print(f"{backend}: identical with room again", flush=True)
    shutil.rmtree(cache)


def check(found: str, expected: str, when: str) -> None:
    if found != expected:
        raise SystemExit(f"{when}: the result {found} is not {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", type=Path, help="by default made-up prose")
    parser.add_argument("--words", type=int, default=2_000_000, help="of the made-up prose, about 6 bytes each")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--vocab-size", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-disk", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        corpus = options.corpus or Path(name, "corpus.txt")
        if options.corpus is None:
            from cs336_registry.text.samples import prose

            corpus.write_text(prose(options.words, seed=options.seed, documents=200))
        for backend in options.backends:
            if options.full_disk is not None:
                fill_disk(corpus, backend, options.full_disk, options.vocab_size)
            soak(corpus, backend, options.kills, options.vocab_size, random.Random(options.seed))


if __name__ == "__main__":
    main()
