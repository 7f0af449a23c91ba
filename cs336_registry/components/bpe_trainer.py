"""Training a byte-level byte-pair tokenizer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence, Sized
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from ..arguments import ArgumentMaker
from ..component import Arguments, Case, Component, ErrorCase, Law, Workload
from ..plugin import load
from ..text import samples
from ..text.inputs import InputPath
from ..text.patterns import CL100K_PATTERN, GPT2_PATTERN
from ..text.training_cache import WordCounts
from ..text.vocab_files import BYTES_IN_CHARACTER_ORDER, Merges, Vocab
from . import pretoken_counter

TieBreak = Literal["greatest_bytes", "smallest_ids"]
SPECIAL_TOKENS = pretoken_counter.SPECIAL_TOKENS


def bpe_trainer(
    input_path: InputPath,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = GPT2_PATTERN,
    tie_break: TieBreak = "greatest_bytes",
) -> tuple[Vocab, Merges]:
    """Learn merges: time and again, join the most frequent pair of neighbouring tokens within pretokens.

    Every pretoken starts as its bytes; a pair's count is the number of places where its tokens are neighbours (`aaa`
    holds (a, a) twice), over all pretokens. The chosen pair is joined everywhere, from left to right, before the next.
    Returns vocab (id → bytes: the special tokens as given, the 256 bytes in order, then a token a merge) and the merges
    in order. A merge whose bytes are in the vocab already (reached by another pair) takes that token and adds no id.
    Training ends when vocab has `vocab_size` entries, or when no pair is left, which may be earlier.
    tie_break, among equally frequent pairs: "greatest_bytes" takes the lexicographically greatest pair of byte strings
    (the course's rule); "smallest_ids" the smallest pair of ids where the bytes are numbered as Hugging Face's trainer
    does (`BYTES_IN_CHARACTER_ORDER`) and new tokens follow.
    Raises ValueError where vocab_size is below 256 plus the special tokens, or the corpus has no text; and what
    `pretoken_counter` raises.
    Source: Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword Units",
    https://arxiv.org/abs/1508.07909, over bytes as in GPT-2.
    """
    raise NotImplementedError


def check(
    input_path: InputPath, vocab_size: int, special_tokens: Sequence[str], pattern: str, tie_break: str
) -> tuple[list[Path], tuple[str, ...]]:
    """The files and the special tokens, or the error that every backend raises for bad arguments."""
    paths, tokens = pretoken_counter.check(input_path, special_tokens, pattern)
    if isinstance(vocab_size, bool) or not hasattr(vocab_size, "__index__"):
        raise TypeError(f"bpe_trainer: vocab_size is {vocab_size!r}: it must be a whole number")
    if vocab_size < 256 + len(tokens):
        raise ValueError(
            f"bpe_trainer: vocab_size is {vocab_size}: it must be at least {256 + len(tokens)}, "
            f"for the 256 bytes and {len(tokens)} special token{'' if len(tokens) == 1 else 's'}"
        )
    if tie_break not in get_args(TieBreak):
        raise ValueError(f"bpe_trainer: tie_break is {tie_break!r}: choose one of {', '.join(get_args(TieBreak))}")
    return paths, tokens


def check_counts(counts: Sized, input_path: InputPath) -> None:
    """Refuse a corpus without a single pretoken."""
    if not len(counts):
        paths = [input_path] if isinstance(input_path, str | os.PathLike) else input_path
        names = ", ".join(repr(str(path)) for path in paths)
        raise ValueError(f"bpe_trainer: {names} holds no text besides special tokens: pass a corpus with text in it")


def initial_vocab(special_tokens: Sequence[str]) -> Vocab:
    """The vocab before the first merge: special tokens, then the 256 bytes."""
    tokens = [token.encode() for token in special_tokens] + [bytes((byte,)) for byte in range(256)]
    return dict(enumerate(tokens))


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = dict(case.sizes)
    return {
        **pretoken_counter.arguments(case, make),
        "vocab_size": sizes["vocab_size"],
        "tie_break": sizes.get("tie_break", "greatest_bytes"),
    }


def oracle(
    input_path: InputPath,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = GPT2_PATTERN,
    tie_break: TieBreak = "greatest_bytes",
) -> tuple[Vocab, Merges]:
    """The definition, word for word: every pair is counted anew before every merge."""
    check(input_path, vocab_size, special_tokens, pattern, tie_break)
    counts = pretoken_counter.oracle(input_path, special_tokens, pattern=pattern)
    words = [([bytes((byte,)) for byte in pretoken], count) for pretoken, count in counts.items()]
    vocab = initial_vocab(special_tokens)
    known = set(vocab.values())
    number = {bytes((byte,)): position for position, byte in enumerate(BYTES_IN_CHARACTER_ORDER)}
    merges: Merges = []
    while len(vocab) < vocab_size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for tokens, count in words:
            for pair in pairwise(tokens):
                pairs[pair] += count
        if not pairs:
            break
        highest = max(pairs.values())
        tied = [pair for pair, count in pairs.items() if count == highest]
        if tie_break == "greatest_bytes":
            left, right = max(tied)
        else:
            left, right = min(tied, key=lambda pair: (number[pair[0]], number[pair[1]]))
        merges.append((left, right))
        if left + right not in known:
            known.add(left + right)
            vocab[len(vocab)] = left + right
        number.setdefault(left + right, len(number))
        for tokens, _ in words:
            position = 0
            while position < len(tokens) - 1:
                if tokens[position] == left and tokens[position + 1] == right:
                    tokens[position : position + 2] = [left + right]
                position += 1
    return vocab, merges


def a_shorter_training_is_a_prefix(bpe_trainer, make: ArgumentMaker) -> None:
    corpus = make.file(samples.prose(500, seed=make.seed))
    long_vocab, long_merges = bpe_trainer(corpus, 400)
    for vocab_size in (256, 257, 333):
        vocab, merges = bpe_trainer(corpus, vocab_size)
        assert merges == long_merges[: len(merges)], f"vocab_size {vocab_size} starts differently from 400"
        assert vocab == {token_id: long_vocab[token_id] for token_id in range(vocab_size)}


def only_ratios_count(bpe_trainer, make: ArgumentMaker) -> None:
    documents = samples.prose(400, seed=make.seed, documents=4).split(samples.END_OF_TEXT)
    once = make.file(samples.END_OF_TEXT.join(documents), "once.txt")
    thrice = make.file(samples.END_OF_TEXT.join(documents[::-1] * 3), "thrice.txt")
    trained = bpe_trainer(once, 350, SPECIAL_TOKENS)
    assert bpe_trainer(thrice, 350, SPECIAL_TOKENS) == trained, "three copies of the corpus give other merges"
    assert bpe_trainer([once, once], 350, SPECIAL_TOKENS) == trained, "the same file twice gives other merges"


def merges_stay_between_special_tokens(bpe_trainer, make: ArgumentMaker) -> None:
    corpus = make.file("ab<|pad|>ab<|endoftext|><|pad|>" * 50)
    vocab, merges = bpe_trainer(corpus, 300, SPECIAL_TOKENS)
    assert merges == [(b"a", b"b")], f"merges beyond (a, b): {merges}"
    assert len(vocab) == 259, "training must end when no pair is left"
    reordered_vocab, reordered = bpe_trainer(corpus, 300, SPECIAL_TOKENS[::-1])
    assert reordered == merges
    assert reordered_vocab[0] == SPECIAL_TOKENS[1].encode()


def vocab_follows_from_merges(bpe_trainer, make: ArgumentMaker) -> None:
    corpus = make.file(samples.tricky(2000, seed=make.seed) + samples.prose(500, seed=make.seed))
    vocab, merges = bpe_trainer(corpus, 420, SPECIAL_TOKENS)
    expected = [*initial_vocab(SPECIAL_TOKENS).values()]
    for left, right in merges:
        assert left in expected and right in expected, f"({left!r}, {right!r}) is merged before both parts exist"
        if left + right not in expected:
            expected.append(left + right)
    assert vocab == dict(enumerate(expected)), "vocab is not special tokens, bytes, then one token a merge"
    assert list(vocab) == sorted(vocab), "vocab is not in the order of ids"


def large_counts_are_exact(bpe_trainer, make: ArgumentMaker) -> None:
    """A corpus of terabytes, given as its counted words: no count may pass through 32 bits or a float.

    A backend that claims "from_counts" has `train_from_counts(words, vocab_size, special_tokens, tie_break=...)` in a
    module of that name in its package, as `cs336 tokenizer train --from-counts` calls it.
    """
    package = bpe_trainer.__module__.partition(".")[0]
    train_from_counts = load(f"{package}.train_from_counts:train_from_counts")
    counts = {b"ab": 2**32 + 5, b"cd": 2**31 + 9, b"ef": 7, b"gh": 2**53 + 1, b"ij": 2**53}
    _, merges = train_from_counts(WordCounts.of(counts), 256 + len(counts))
    expected = [(pair[:1], pair[1:]) for pair in sorted(counts, key=counts.__getitem__, reverse=True)]
    assert merges == expected, f"the merges are {merges}, in the order of the counts they are {expected}"


def known_answer(bpe_trainer, make: ArgumentMaker) -> None:
    """The worked example of Sennrich et al., with the course's tie rule."""
    corpus = make.file("low " * 5 + "lower " * 2 + "widest " * 3 + "newest " * 6)
    _, merges = bpe_trainer(corpus, 256 + 6, pattern=r"\S+")
    assert merges == [(b"s", b"t"), (b"e", b"st"), (b"o", b"w"), (b"l", b"ow"), (b"w", b"est"), (b"n", b"e")], merges


_PROSE = {"words": 1200, "documents": 5, "special_tokens": SPECIAL_TOKENS}

contract = Component(
    signature=bpe_trainer,
    kind="algorithm",
    summary="merges and vocabulary of a byte-level byte-pair tokenizer",
    formula="repeat: (a, b) = argmax count(a, b); replace a b by ab",
    paper="https://arxiv.org/abs/1508.07909",
    arguments=arguments,
    oracle=oracle,
    exact=True,
    features=("from_counts",),
    cases=(
        Case(id="prose", sizes={**_PROSE, "vocab_size": 500}),
        Case(id="smallest_ids", sizes={**_PROSE, "vocab_size": 500, "tie_break": "smallest_ids"}),
        Case(id="cl100k", sizes={**_PROSE, "vocab_size": 400, "pattern": CL100K_PATTERN}),
        Case(id="no_special_tokens", sizes={"words": 400, "documents": 3, "vocab_size": 350}),
        Case(id="no_merges", sizes={"words": 100, "vocab_size": 258, "special_tokens": SPECIAL_TOKENS}),
        Case(id="tricky", sizes={"tricky": 2000, "vocab_size": 420, "special_tokens": SPECIAL_TOKENS}),
        Case(id="tricky_smallest_ids", sizes={"tricky": 2000, "vocab_size": 420, "tie_break": "smallest_ids"}),
        Case(id="invalid_utf8", sizes={"tricky_bytes": 1500, "vocab_size": 380, "special_tokens": SPECIAL_TOKENS}),
        Case(
            id="overlapping", sizes={"tricky": 800, "vocab_size": 300, "special_tokens": pretoken_counter.OVERLAPPING}
        ),
        Case(id="one_letter", sizes={"text": "a", "repeat": 1000, "vocab_size": 300}),
        Case(id="runs", sizes={"text": "aaa aaaa aaaaa ababab abababa bababab -- --- -----", "vocab_size": 300}),
        Case(
            id="runs_smallest_ids",
            sizes={"text": "aaa aaaa aaaaa ababa babab ------- -- ---", "vocab_size": 300, "tie_break": "smallest_ids"},
        ),
        Case(id="until_no_pair_is_left", sizes={"text": "the cat sat on the mat", "vocab_size": 1000}),
        Case(
            id="no_pair_at_all",
            sizes={"text": "a<|pad|>", "repeat": 3, "vocab_size": 300, "special_tokens": SPECIAL_TOKENS},
        ),
        Case(id="files", sizes={"words": 200, "files": 3, "vocab_size": 320, "special_tokens": SPECIAL_TOKENS}),
    ),
    error_cases=(
        ErrorCase(
            id="missing_file",
            arguments=lambda make: {"input_path": "no/such/corpus.txt", "vocab_size": 300},
            error=FileNotFoundError,
            match="no file 'no/such/corpus.txt'",
        ),
        ErrorCase(
            id="empty_corpus",
            arguments=lambda make: {"input_path": make.file("", "empty.txt"), "vocab_size": 300},
            match="empty.txt' holds no text besides special tokens",
        ),
        ErrorCase(
            id="special_tokens_alone",
            arguments=lambda make: {
                "input_path": make.file("<|pad|>"),
                "vocab_size": 300,
                "special_tokens": ["<|pad|>"],
            },
            match="holds no text besides special tokens",
        ),
        ErrorCase(
            id="vocab_size_too_small",
            arguments=lambda make: {
                "input_path": make.file("a b"),
                "vocab_size": 257,
                "special_tokens": SPECIAL_TOKENS,
            },
            match="vocab_size is 257: it must be at least 258, for the 256 bytes and 2 special tokens",
        ),
        ErrorCase(
            id="vocab_size_is_no_integer",
            arguments=lambda make: {"input_path": make.file("a b"), "vocab_size": 300.5},
            error=TypeError,
            match="vocab_size is 300.5: it must be a whole number",
        ),
        ErrorCase(
            id="empty_special_token",
            arguments=lambda make: {"input_path": make.file("a b"), "vocab_size": 300, "special_tokens": [""]},
            match=r"special_tokens\[0\] is ''",
        ),
        ErrorCase(
            id="tie_break",
            arguments=lambda make: {"input_path": make.file("a b"), "vocab_size": 300, "tie_break": "first"},
            match="tie_break is 'first': choose one of greatest_bytes, smallest_ids",
        ),
    ),
    laws=(
        Law(
            id="prefix",
            statement="a smaller vocab_size gives the first of the same merges",
            check=a_shorter_training_is_a_prefix,
        ),
        Law(id="scale", statement="repeating or reordering the corpus changes nothing", check=only_ratios_count),
        Law(
            id="special",
            statement="no merge crosses or enters a special token",
            check=merges_stay_between_special_tokens,
        ),
        Law(id="vocab", statement="the vocab follows from special tokens and merges", check=vocab_follows_from_merges),
        Law(
            id="large_counts",
            statement="counts beyond 32 bits decide as exactly as small ones",
            check=large_counts_are_exact,
            features=("from_counts",),
        ),
        Law(id="known", statement="the paper's example gives the known merges", check=known_answer),
    ),
    workloads=(
        Workload(id="prose_20k_words_500", sizes={**_PROSE, "words": 20_000, "vocab_size": 500}, device="cpu"),
        Workload(id="prose_1m_words_4000", sizes={**_PROSE, "words": 1_000_000, "vocab_size": 4000}, device="cpu"),
    ),
    adapter="run_train_bpe",
)
