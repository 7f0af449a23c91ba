"""Fuzzing the compiled engine against the contracts' oracles: what the tests run with a fixed budget.

Longer: `python -m tests.numba_bpe.fuzzing 100000` runs that many rounds of each check with fresh seeds.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import cs336_numba_bpe.corpus
import cs336_numba_bpe.tokenizer
import numpy as np
from cs336_numba_bpe.character_classes import load_character_classes
from cs336_numba_bpe.compile_cache import default_cache_folder, load_kernels
from cs336_numba_bpe.corpus import COMPILED_PATTERNS
from cs336_numba_bpe.count_table import CountTable, WordCounts
from cs336_numba_bpe.merge_engine import MergeEngine
from cs336_numba_bpe.special_token_table import build_special_token_table
from cs336_numba_bpe.text_buffer import TextBuffer

from cs336_registry.components.pretoken_counter import split_on_special_tokens
from cs336_registry.components.tokenizer import NaiveTokenizer
from cs336_registry.text import samples
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN, pretoken_finder
from cs336_registry.text.vocab_files import BYTES_IN_CHARACTER_ORDER

PATTERNS = (GPT2_PATTERN, CL100K_PATTERN)
END = samples.END_OF_TEXT
SPECIAL_TOKEN_LISTS: tuple[tuple[str, ...], ...] = (
    (),
    (END,),
    (END, END + END),
    ("a",),
    ("ab", "bc", "abc"),
    (" ",),
    ("\n", "\n\n"),
    ("a b", " b", "b "),
    ("\ufffd",),
    ("x\ufffd", "\ufffd\ufffd "),
    ("é", "日"),
    tuple("abcdefghijklmno"),
    ("quick ", "word1", " 1"),
    (END, "<|end", "text|>", "|>", "<|pad|>"),
)
WHITE_SPACE = [
    chr(code) for code in (*range(9, 14), 0x1C, 0x1F, 0x20, 0x85, 0xA0, 0x1680, 0x2007, 0x2028, 0x202F, 0x3000)
]


def random_bytes(source: random.Random) -> bytes:
    """A short byte string of one of the troublesome kinds."""
    kind = source.randrange(8)
    if kind == 0:
        return source.randbytes(source.randrange(300))
    if kind == 1:
        return "".join(random_character(source) for _ in range(source.randrange(200))).encode()
    if kind == 2:
        return samples.tricky_bytes(source.randrange(80), seed=source.getrandbits(32))
    if kind == 3:
        pieces = [*WHITE_SPACE, "a", "1", ".", "é", "日", "'s", " the"]
        return "".join(source.choice(pieces) for _ in range(source.randrange(150))).encode()
    if kind == 4:
        return source.choice((b"a", b"ab", b"'s", b" ", b"\n", "é".encode(), b"\xff", b". ")) * source.randrange(400)
    text = samples.tricky(source.randrange(120), seed=source.getrandbits(32)).encode()
    return b"x" * source.randrange(130) + text if kind == 5 else text


def random_character(source: random.Random) -> str:
    low, high = source.choice(((0x20, 0x7F), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000), (0x20, 0x21)))
    return chr(source.randrange(low, high))


def random_special_tokens(source: random.Random) -> tuple[str, ...]:
    if source.random() < 0.7:
        return source.choice(SPECIAL_TOKEN_LISTS)
    tokens = [source.choice(samples.TRICKY) + source.choice(samples.TRICKY) for _ in range(source.randrange(1, 20))]
    return tuple(dict.fromkeys(tokens))


def counted(content: bytes, special_tokens: tuple[str, ...], pattern: str, block_bytes: int) -> dict[bytes, int]:
    """Counts from the compiled scanner, fed in blocks."""
    special = build_special_token_table(special_tokens)
    classes = load_character_classes(default_cache_folder())
    table = CountTable(load_kernels("count"), COMPILED_PATTERNS[pattern], special, classes, bits=6)
    buffer = TextBuffer(table, always_decode=special.need_decoded_text, block_bytes=block_bytes)
    for start in range(0, len(content), block_bytes):
        buffer.append(content[start : start + block_bytes])
        buffer.settle(False)
    buffer.settle(True)
    return table.words()[0].to_dict()


def expected_counts(content: bytes, special_tokens: tuple[str, ...], pattern: str) -> dict[bytes, int]:
    """Counts by `regex` over Python's own decoding."""
    counts: Counter[str] = Counter()
    for part, is_special in split_on_special_tokens(content.decode("utf-8", "replace"), special_tokens):
        if not is_special:
            counts.update(pretoken_finder(pattern)(part))
    return {pretoken.encode(): count for pretoken, count in counts.items()}


def check_counting(seed: int) -> None:
    source = random.Random(seed)
    content, special_tokens = random_bytes(source), random_special_tokens(source)
    pattern, block = source.choice(PATTERNS), source.choice((1, 2, 3, 7, 16, 63, 64, 65, 128, 1000, 1 << 20))
    found, expected = (
        counted(content, special_tokens, pattern, block),
        expected_counts(content, special_tokens, pattern),
    )
    different = {word: (found.get(word), expected.get(word)) for word in found.keys() | expected.keys()}
    different = {word: counts for word, counts in different.items() if counts[0] != counts[1]}
    assert not different, f"seed {seed}: {content!r} with {special_tokens}, blocks of {block}: {different}"


def random_words(source: random.Random) -> dict[bytes, int]:
    alphabet = source.choice((b"a", b"ab", b"abc", b"\0a", b"\0\xff", bytes(range(97, 117)), bytes(range(256))))
    lengths, counts = (1, 2, 3, 5, 8, 20, 60), (1, 1, 2, 3, 10, 1000, 2**33, 2**50)
    return {
        bytes(source.choices(alphabet, k=source.choice(lengths))): source.choice(counts)
        for _ in range(source.randrange(1, 40))
    }


def naive_merges(words: dict[bytes, int], num_merges: int, tie_break: str) -> list[tuple[bytes, bytes, int]]:
    """(left, right, count): every pair is counted anew before every merge."""
    tokenised = [([bytes((byte,)) for byte in word], count) for word, count in words.items()]
    number = {bytes((byte,)): place for place, byte in enumerate(BYTES_IN_CHARACTER_ORDER)}
    merges = []
    while len(merges) < num_merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for tokens, count in tokenised:
            for pair in pairwise(tokens):
                pairs[pair] += count
        if not pairs:
            break
        highest = max(pairs.values())
        tied = [pair for pair, count in pairs.items() if count == highest]
        if tie_break == "greatest_bytes":
            best = max(tied)
        else:
            best = min(tied, key=lambda pair: (number[pair[0]], number[pair[1]]))
        merges.append((*best, highest))
        number.setdefault(best[0] + best[1], len(number))
        for tokens, _ in tokenised:
            place = 0
            while place < len(tokens) - 1:
                if (tokens[place], tokens[place + 1]) == best:
                    tokens[place : place + 2] = [best[0] + best[1]]
                place += 1
    return merges


def engine_merges(engine: MergeEngine) -> list[tuple[bytes, bytes, int]]:
    tokens = engine.tokens()
    return [(tokens[left], tokens[right], count) for left, right, count in engine.merge_rows()]


def check_merging(seed: int) -> None:
    """All merges with their counts; with tiny arrays that must grow, in strides, with wide places, and replayed."""
    source = random.Random(seed)
    words, num_merges = random_words(source), source.choice((1, 5, 30, 120))
    tie_break = source.choice(("greatest_bytes", "smallest_ids"))
    engine = MergeEngine(WordCounts.from_dict(words), 256 + num_merges, tie_break=tie_break, wide=source.random() < 0.3)
    if source.random() < 0.3:
        for name in ("found", "found_left", "found_right", "heap_counts", "heap_rows"):
            setattr(engine, name, getattr(engine, name)[:2].copy())
        engine.token_bytes = engine.token_bytes[:256].copy()
    for stop in range(1, num_merges, source.choice((1, 3, 1000))):
        engine.run(stop)
    engine.run(num_merges)
    expected = naive_merges(words, num_merges, tie_break)
    assert engine_merges(engine) == expected, f"seed {seed}: {tie_break}, {words}"
    tokens = engine.tokens()
    assert len(set(tokens)) == len(tokens), f"seed {seed}: two merges made the same bytes"
    kept = source.randrange(len(expected) + 1)
    resumed = MergeEngine(WordCounts.from_dict(words), 256 + num_merges, tie_break=tie_break)
    resumed.replay([merge[:2] for merge in expected[:kept]])
    resumed.run(num_merges)
    assert engine_merges(resumed) == expected, f"seed {seed}: differs when resumed after {kept} merges"


def random_vocabulary(source: random.Random) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Trained merges, some with their order shuffled, some repeated; ids dense, scattered or up to 2**31 - 1."""
    text = samples.tricky(source.randrange(1, 300), seed=source.getrandbits(32)) + "ab" * source.randrange(90)
    words = expected_counts(text.encode(), (), source.choice(PATTERNS))
    merges = [merge[:2] for merge in naive_merges(words, 80, "greatest_bytes")]
    tokens = [bytes((byte,)) for byte in range(256)] + [left + right for left, right in merges]
    if source.random() < 0.3:
        source.shuffle(merges)
        merges += source.choices(merges, k=4) if merges else []
    highest = source.choice((len(tokens), 60_000, 2**31))
    vocab = dict(zip(sorted(source.sample(range(highest), len(tokens))), tokens, strict=True))
    if source.random() < 0.2:
        vocab.setdefault(source.randrange(2**20), source.choice(tokens))
    return vocab, merges


def check_encoding(seed: int) -> None:
    """encode, encode_iterable and encode_to_array against the definition."""
    source = random.Random(seed)
    vocab, merges = random_vocabulary(source)
    special_tokens, pattern = random_special_tokens(source), source.choice(PATTERNS)
    tokenizer = cs336_numba_bpe.tokenizer.Tokenizer(vocab, merges, special_tokens, pattern=pattern)
    content = random_bytes(source)
    text = content.decode("utf-8", "replace")
    expected = NaiveTokenizer(vocab, merges, special_tokens, pattern=pattern).encode(text)
    what = f"seed {seed}: {text!r} with {special_tokens}"
    assert tokenizer.encode(text) == expected, what
    size = source.choice((1, 3, 50))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(tokenizer.encode_iterable(pieces)) == expected, f"{what}, in pieces of {size}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_bytes(content)
        ids = tokenizer.encode_to_array(path, num_threads=source.choice((1, 2)))
    assert ids.tolist() == expected, f"{what}, from a file"
    assert ids.dtype == (np.uint16 if max(tokenizer.vocab) < 1 << 16 else np.uint32)


if __name__ == "__main__":
    cs336_numba_bpe.corpus.WARM_BYTES = cs336_numba_bpe.corpus.COLD_BYTES = 0
    cs336_numba_bpe.tokenizer.RANGE_BYTES = 40
    first_seed = random.SystemRandom().randrange(2**40)
    for check in (check_counting, check_merging, check_encoding):
        for round_number in range(int(sys.argv[1])):
            check(first_seed + round_number)
        print(f"{check.__name__}: {sys.argv[1]} rounds from seed {first_seed}: no difference")
