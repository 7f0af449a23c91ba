"""Counting on Ray: a cluster of two nodes, one of which is killed on the way, counts what the reference counts."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cs336_reference import pretoken_counter as reference

from cs336_registry.text import samples
from tests.corpora import SPECIAL_TOKENS, english

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "backends"))),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def test_the_manifest_imports_no_ray():
    code = "import sys, cs336_ray; assert cs336_ray.cs336_backend().name == 'ray'; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


def test_a_corpus_of_one_shard_needs_no_cluster(tmp_path):
    from cs336_ray.pretoken_counter import pretoken_counter

    corpus = tmp_path / "corpus.txt"
    corpus.write_text(english(20_000) + samples.tricky(300), encoding="utf-8", newline="")
    counts = pretoken_counter(corpus, SPECIAL_TOKENS, counter="heap_bpe")
    assert counts == reference.pretoken_counter(corpus, SPECIAL_TOKENS)
    assert "ray" not in sys.modules


@pytest.mark.parametrize("options", [{"shard_bytes": 0}, {"max_retries": -1}], ids=["shard_bytes", "max_retries"])
def test_bad_options_are_named(tmp_path, options):
    from cs336_ray.pretoken_counter import pretoken_counter

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("text")
    with pytest.raises(ValueError, match=r"shard_bytes is -?\d+, max_retries -?\d+"):
        pretoken_counter(corpus, **options)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'cs336-registry[ray]'")
def test_a_node_killed_on_the_way_changes_nothing(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(english(3_000_000) + samples.tricky(2000), encoding="utf-8", newline="")
    command = [sys.executable, "-m", "tests.ray.two_nodes", str(corpus), "60000"]
    finished = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=550)
    assert finished.returncode == 0, finished.stderr[-3000:]
    record = json.loads(finished.stdout.splitlines()[-1])
    counts = reference.pretoken_counter(corpus, SPECIAL_TOKENS)
    assert record["digest"] == hashlib.sha256(repr(sorted(counts.items())).encode()).hexdigest()
    assert record["nodes"] == 2, "only one node has counted"
    assert 0 < record["killed_after"] < record["shards"], record
    assert record["taken"] == list(range(record["shards"])), "a shard was taken twice or not at all"
    assert record["the_head_counted_what_was_lost"]
    assert record["the_backend_agrees"]
    assert "damaged.txt.gz is damaged" in record["error"]
