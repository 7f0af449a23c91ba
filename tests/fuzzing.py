"""Seeded input for fuzzing the text backends, and what the definitions make of it; each backend's checks are its own.

In CI with a fixed budget (test_fuzz.py of heap_bpe and numba_bpe); longer, from fresh seeds:
`python -m tests.heap_bpe.fuzzing 100000`, `python -m tests.numba_bpe.fuzzing 100000`.
"""

from __future__ import annotations

import random
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

from cs336_registry.components.pretoken_counter import split_on_special_tokens
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
    *(chr(code) for code in range(0x3001) if chr(code).isspace()),
    *"\u180e\u200b\u2060\ufeff",  # These look like it.
]


def random_bytes(source: random.Random) -> bytes:
    """A byte string of one of the troublesome kinds; special tokens may stand at either end."""
    content = _random_content(source)
    if source.random() < 0.3:
        end = source.choice((END, END + END, "<|pad|>", "ab", " ", "\n", "é")).encode()
        content = source.choice((end + content, content + end, end + content + end))
    return content


def _random_content(source: random.Random) -> bytes:
    kind = source.randrange(10)
    if kind == 0:
        return source.randbytes(source.randrange(300))
    if kind == 1:
        return "".join(random_character(source) for _ in range(source.randrange(200))).encode()
    if kind == 2:
        return samples.tricky_bytes(source.randrange(80), seed=source.getrandbits(32))
    if kind == 3:
        pieces = [*WHITE_SPACE, "a", "1", ".", "é", "日", "。", "。\n", "'s", " the"]
        return "".join(source.choice(pieces) for _ in range(source.randrange(150))).encode()
    if kind == 4:
        repeated = source.choice((b"a", b"ab", b"'s", b" ", b"\n", "é".encode(), b"\xff", b". "))
        return repeated * source.randrange(3000 if source.random() < 0.05 else 400)
    if kind == 5:
        return "".join(random_contraction(source) for _ in range(source.randrange(60))).encode()
    if kind == 6:
        ordinary = ("word", " ", " ", "a", ".", "\n")
        tokens = [source.choice((*ordinary, *source.choice(SPECIAL_TOKEN_LISTS))) for _ in range(source.randrange(80))]
        return "".join(tokens).encode()
    text = samples.tricky(source.randrange(120), seed=source.getrandbits(32)).encode()
    return b"x" * source.randrange(130) + text if kind == 7 else text


def random_character(source: random.Random) -> str:
    """A character of any range, or of a general category of Unicode, the rare ones as often as the others."""
    if source.random() < 0.5:
        return source.choice(source.choice(characters_of_categories()))
    low, high = source.choice(((0x20, 0x7F), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000), (0x20, 0x21)))
    return chr(source.randrange(low, high))


@lru_cache
def characters_of_categories() -> list[str]:
    """Up to 200 characters of each general category, surrogates apart: letters, marks, numbers, separators ..."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for code in [*range(0x3400), *range(0x3400, 0x110000, 37)]:
        category = unicodedata.category(chr(code))
        if category != "Cs" and len(found[category]) < 200:
            found[category].append(chr(code))
    return ["".join(characters) for _, characters in sorted(found.items())]


def random_contraction(source: random.Random) -> str:
    ending = source.choice(("s", "d", "m", "t", "ll", "ve", "re", "l", "v", "x", "S", "LL", "Ve", "ſ", ""))
    return source.choice(("", "it", " you", "é", "1", ".", " ", "\n")) + source.choice("'’'‘") + ending


def random_special_tokens(source: random.Random) -> tuple[str, ...]:
    if source.random() < 0.7:
        return source.choice(SPECIAL_TOKEN_LISTS)
    tokens = [source.choice(samples.TRICKY) + source.choice(samples.TRICKY) for _ in range(source.randrange(1, 20))]
    return tuple(dict.fromkeys(tokens))


def expected_counts(content: bytes, special_tokens: tuple[str, ...], pattern: str) -> dict[bytes, int]:
    """Counts by `regex` over Python's own decoding."""
    counts: Counter[str] = Counter()
    for part, is_special in split_on_special_tokens(content.decode("utf-8", "replace"), special_tokens):
        if not is_special:
            counts.update(pretoken_finder(pattern)(part))
    return {pretoken.encode(): count for pretoken, count in counts.items()}


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


def run(*checks: Callable[[int], None]) -> None:
    """As many rounds of each check as the command line says, from a fresh seed."""
    first_seed, rounds = random.SystemRandom().randrange(2**40), int(sys.argv[1])
    for check in checks:
        for round_number in range(rounds):
            check(first_seed + round_number)
        print(f"{check.__name__}: {rounds} rounds from seed {first_seed}: no difference", flush=True)
