"""Text to token ids and back, with a trained byte-pair vocabulary."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

from ..arguments import ArgumentMaker
from ..component import Arguments, Case, Component, ErrorCase, Law, Workload
from ..text import samples
from ..text.inputs import utf8
from ..text.patterns import CL100K_PATTERN, GPT2_PATTERN, check_pattern
from ..text.special_tokens import check_special_tokens
from ..text.vocab_files import Merges, Vocab, write_merges, write_vocab
from . import bpe_trainer, pretoken_counter

SPECIAL_TOKENS = pretoken_counter.SPECIAL_TOKENS


class Tokenizer(Protocol):
    """What an implementation of `tokenizer` has: a class whose objects encode and decode."""

    vocab: Vocab
    merges: Merges
    special_tokens: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`."""
        ...

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        """The ids of the joined strings, lazily and in bounded memory."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; malformed UTF-8 becomes U+FFFD."""
        ...

    @classmethod
    def from_files(
        cls, vocab_filepath: str, merges_filepath: str, special_tokens: Sequence[str] | None = None
    ) -> Tokenizer:
        """A tokenizer from GPT-2's vocab.json and merges.txt."""
        ...


def tokenizer(
    vocab: Mapping[int, bytes],
    merges: Sequence[tuple[bytes, bytes]],
    special_tokens: Sequence[str] | None = None,
    *,
    pattern: str = GPT2_PATTERN,
) -> Tokenizer:
    """Encode text as token ids and decode them: the text is split on special tokens, each part into pretokens (matches
    of `pattern`), each pretoken into bytes, which are joined by the merges.

    Within a pretoken, the neighbouring pair that comes first in `merges` is joined wherever it stands, from left to
    right, until no neighbours are in `merges`; a pair listed twice counts from its last place. special_tokens: strings
    encoded to a single id wherever they stand, the longest where several match; those that vocab lacks get new ids
    after the largest. Where two ids have the same bytes, text takes the larger and special tokens the smaller. A lone
    surrogate is encoded as U+FFFD. The arguments are not changed; the object's own `vocab` has the added ids.
    Raises ValueError for a merge whose parts or result vocab lacks, for a byte of the text that vocab lacks, and for an
    id to decode that is not in vocab.
    Source: Radford et al. 2019 and https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    raise NotImplementedError


def check(
    vocab: Mapping[int, bytes],
    merges: Sequence[tuple[bytes, bytes]],
    special_tokens: Sequence[str] | None,
    pattern: str,
) -> tuple[Vocab, Merges, tuple[str, ...]]:
    """The vocab with the special tokens added, the merges and the special tokens; or the error for bad arguments."""
    check_pattern(pattern)
    tokens = check_special_tokens(special_tokens)
    if not isinstance(vocab, Mapping):
        raise TypeError(f"tokenizer: vocab is a {type(vocab).__name__}: it must map ids to bytes")
    for token_id, token in vocab.items():
        if not isinstance(token_id, int) or token_id < 0 or not isinstance(token, bytes):
            raise TypeError(f"tokenizer: vocab maps {token_id!r} to {token!r}: it must map ids from 0 on to bytes")
    known = set(vocab.values())
    for number, merge in enumerate(merges):
        if len(merge) != 2 or not all(isinstance(part, bytes) for part in merge):
            raise TypeError(f"tokenizer: merge {number} is {merge!r}: it must be a pair of bytes")
        for token in (*merge, merge[0] + merge[1]):
            if token not in known:
                raise ValueError(
                    f"tokenizer: merge {number} is {merge!r}, but vocab has no token {token!r}: "
                    f"pass the vocab and the merges of the same training"
                )
    added = [token.encode() for token in tokens if token.encode() not in known]
    complete = {**vocab, **dict(enumerate(added, start=max(vocab, default=-1) + 1))}
    return complete, [(left, right) for left, right in merges], tokens


def text_ids(vocab: Mapping[int, bytes]) -> dict[bytes, int]:
    """The id that text takes for each token: the larger where two are the same bytes."""
    return {vocab[token_id]: token_id for token_id in sorted(vocab)}


def special_ids(vocab: Mapping[int, bytes], special_tokens: Sequence[str]) -> dict[str, int]:
    """The id of each special token: the smaller where two are the same bytes."""
    smallest = {vocab[token_id]: token_id for token_id in sorted(vocab, reverse=True)}
    return {token: smallest[token.encode()] for token in special_tokens}


def missing_byte(byte: bytes) -> ValueError:
    return ValueError(f"tokenizer: vocab has no token for the byte {byte!r}: add the 256 bytes to vocab")


def unknown_id(token_id: object) -> ValueError:
    return ValueError(f"tokenizer: there is no token with id {token_id!r} in vocab: decode ids of this tokenizer")


class NaiveTokenizer:
    """The definition, without any table, cache or stream: the oracle."""

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str = GPT2_PATTERN,
    ) -> None:
        self.vocab, self.merges, self.special_tokens = check(vocab, merges, special_tokens, pattern)
        self.pattern = pattern

    def encode(self, text: str) -> list[int]:
        import regex

        ids: list[int] = []
        for part, is_special in pretoken_counter.split_on_special_tokens(text, self.special_tokens):
            if is_special:
                ids.append(min(token_id for token_id, token in self.vocab.items() if token == part.encode()))
                continue
            for match in regex.finditer(self.pattern, part):
                ids.extend(self.encode_pretoken(utf8(match[0])))
        return ids

    def encode_pretoken(self, pretoken: bytes) -> list[int]:
        tokens = [pretoken[position : position + 1] for position in range(len(pretoken))]
        while True:
            neighbours = set(pairwise(tokens))
            ranks = [rank for rank, merge in enumerate(self.merges) if merge in neighbours]
            # A pair that is listed twice has its last place only.
            ranks = [rank for rank in ranks if self.merges[rank] not in self.merges[rank + 1 :]]
            if not ranks:
                break
            left, right = self.merges[min(ranks)]
            position = 0
            while position < len(tokens) - 1:
                if tokens[position] == left and tokens[position + 1] == right:
                    tokens[position : position + 2] = [left + right]
                position += 1
        return [max(token_id for token_id, known in self.vocab.items() if known == token) for token in tokens]

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        yield from self.encode("".join(iterable))

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.vocab[token_id] for token_id in ids).decode("utf-8", "replace")


def trained(sizes: Mapping[str, Any], seed: int, make: ArgumentMaker) -> tuple[Vocab, Merges]:
    """A small vocabulary, learned from prose and tricky strings by the trainer's own oracle."""
    corpus = make.file(samples.prose(400, seed=seed) + samples.tricky(300, seed=seed), "vocabulary_corpus.txt")
    return bpe_trainer.oracle(
        corpus,
        sizes.get("vocab_size", 400),
        sizes.get("trained_special_tokens", SPECIAL_TOKENS),
        pattern=sizes.get("pattern", GPT2_PATTERN),
    )


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = dict(case.sizes)
    vocab, merges = sizes["vocab_and_merges"] if "vocab_and_merges" in sizes else trained(sizes, case.seed, make)
    special_tokens = sizes.get("special_tokens")
    return {
        "vocab": dict(vocab),
        "merges": list(merges),
        "special_tokens": None if special_tokens is None else list(special_tokens),
        "pattern": sizes.get("pattern", GPT2_PATTERN),
        "text": pretoken_counter.content(sizes, seed=case.seed + make.seed).decode("utf-8", "replace"),
    }


def observe(implementation: Callable[..., Tokenizer], arguments: Arguments) -> dict[str, Any]:
    """The ids of a text, of the same text in pieces, what they decode to, and the tokenizer's vocab."""
    options = {name: value for name, value in arguments.items() if name != "text"}
    text = arguments["text"]
    built = implementation(**options)
    ids = list(built.encode(text))
    pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
    return {
        "ids": ids,
        "ids_in_pieces": list(built.encode_iterable(pieces)),
        "text": built.decode(ids),
        "cut_characters": built.decode(ids[1:-1]),
        "vocab": dict(built.vocab),
    }


def timed(implementation: Callable[..., Tokenizer], arguments: Arguments) -> Callable[[], Any]:
    """Encoding the text with a tokenizer that is built already."""
    wanted = dict(arguments)
    text = wanted.pop("text")
    built = implementation(**wanted)
    return lambda: built.encode(text)


def round_trip(tokenizer, make: ArgumentMaker) -> None:
    vocab, merges = trained({}, 1, make)
    built = tokenizer(vocab, merges, SPECIAL_TOKENS)
    for seed in range(20):
        text = samples.tricky(120, seed=1000 * make.seed + seed)
        assert built.decode(built.encode(text)) == text, f"{text!r} does not come back"
    assert built.encode("") == [] and built.decode([]) == ""


def pieces_do_not_matter(tokenizer, make: ArgumentMaker) -> None:
    _pieces_do_not_matter(tokenizer, make, GPT2_PATTERN)


def pieces_do_not_matter_to_any_pattern(tokenizer, make: ArgumentMaker) -> None:
    _pieces_do_not_matter(tokenizer, make, CL100K_PATTERN, r"\S+|\s+(?=\S)|\s")


def _pieces_do_not_matter(tokenizer, make: ArgumentMaker, *patterns: str) -> None:
    for pattern in patterns:
        vocab, merges = trained({"pattern": pattern}, 2, make)
        built = tokenizer(vocab, merges, pretoken_counter.OVERLAPPING, pattern=pattern)
        for size in (1, 3, 1000, 70_000):
            text = samples.tricky(200 if size < 1000 else 20_000, seed=make.seed + size)
            pieces = [text[start : start + size] for start in range(0, len(text), size)]
            assert list(built.encode_iterable(pieces)) == built.encode(text), (
                f"pieces of {size} characters give other ids"
            )
        assert list(built.encode_iterable([])) == []
        assert list(built.encode_iterable(["", "a", ""])) == built.encode("a")


def iterating_is_lazy(tokenizer, make: ArgumentMaker) -> None:
    vocab, merges = trained({}, 3, make)
    built = tokenizer(vocab, merges, SPECIAL_TOKENS)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            # Raised inside an implementation that reads ahead: an endless text would fill the machine's memory.
            assert taken < 10_000, "encode_iterable reads on without end before it gives its ids"
            yield samples.END_OF_TEXT.join(["some words of a line\n"] * 50)

    ids = built.encode_iterable(endless())
    assert taken == 0, "encode_iterable reads before its result is asked for"
    assert len(list(islice(ids, 10_000))) == 10_000


def iterating_needs_little_memory(tokenizer, make: ArgumentMaker) -> None:
    """Four times as much text, whose ids and characters would fill megabytes, leaves the peak where it was."""
    vocab, merges = trained({}, 4, make)
    built = tokenizer(vocab, merges, SPECIAL_TOKENS)
    # Mostly special tokens: many characters and few pretokens, so that tracing every allocation takes seconds.
    line = samples.prose(20, seed=make.seed) + samples.END_OF_TEXT * 100

    def peak(characters: int) -> int:
        tracemalloc.start()
        try:
            start, _ = tracemalloc.get_traced_memory()
            for _ in built.encode_iterable(line for _ in range(characters // len(line))):
                pass
            return tracemalloc.get_traced_memory()[1] - start
        finally:
            tracemalloc.stop()

    short, long = peak(750_000), peak(3_000_000)
    assert long < short + 1_500_000, f"peak {long} bytes for 3 MB of text, {short} bytes for 0.75 MB"
    assert long < 40_000_000, f"peak {long} bytes while 3 MB of text went through"


def iterating_needs_little_native_memory(tokenizer, make: ArgumentMaker) -> None:
    """The process does not grow while the ids are drawn: what compiled code keeps, tracemalloc does not see.

    The first quarter fills tables and arenas; the rest, 4.5 MB of characters and more of ids, must leave no half of it
    behind. Where the system does not tell a process's size (/proc), nothing is asked.
    """
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return
    vocab, merges = trained({}, 4, make)
    built = tokenizer(vocab, merges, SPECIAL_TOKENS)
    line = samples.prose(20, seed=make.seed) + samples.END_OF_TEXT * 100
    page = os.sysconf("SC_PAGE_SIZE")
    sizes = [
        page * int(statistics.read_text().split()[1])
        for number, _ in enumerate(built.encode_iterable(line for _ in range(6_000_000 // len(line))))
        if number % 2000 == 0
    ]
    start = sizes[len(sizes) // 4]
    assert max(sizes) - start < 2_250_000, f"the process grew by {max(sizes) - start} bytes over 4.5 MB of text"


def files_give_the_same_tokenizer(tokenizer, make: ArgumentMaker) -> None:
    vocab, merges = trained({}, 5, make)
    folder = make.file("", "marker").parent
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    write_vocab(vocab, vocab_path)
    write_merges(merges, merges_path)
    text = samples.tricky(300, seed=make.seed) + "<|new|>"
    built = tokenizer.from_files(os.fspath(vocab_path), os.fspath(merges_path), [*SPECIAL_TOKENS, "<|new|>"])
    direct = tokenizer(vocab, merges, [*SPECIAL_TOKENS, "<|new|>"])
    assert built.encode(text) == direct.encode(text)
    assert built.encode("<|new|>") == [max(vocab) + 1], "a special token that vocab lacks takes the next id"


def unknown_ids_are_refused(tokenizer, make: ArgumentMaker) -> None:
    vocab, merges = trained({}, 7, make)
    for token_id in (max(vocab) + 1, -1):
        try:
            text = tokenizer(vocab, merges).decode([token_id])
        except ValueError as error:
            assert f"no token with id {token_id}" in str(error), f"the message does not name the id: {error}"
        else:
            raise AssertionError(f"id {token_id}, which vocab does not have, was decoded as {text!r}")


def merges_follow_training(tokenizer, make: ArgumentMaker) -> None:
    """Encoding the training text gives every merged token its place: no two neighbours of a pretoken are in merges."""
    vocab, merges = trained({}, 6, make)
    built, pairs = tokenizer(vocab, merges), set(merges)
    for word in samples.prose(200, seed=make.seed).split():
        if not word.isalpha():
            continue
        tokens = [vocab[token_id] for token_id in built.encode(word)]
        assert not pairs.intersection(pairwise(tokens)), f"{word!r} could be merged further: {tokens}"


def _tiny(**extra: Any) -> Arguments:
    return {"vocab": {0: b"a", 1: b"b", 2: b"ab"}, "merges": [(b"a", b"b")], **extra}


# "bcd" has two ways to be reached, and (b, cd) is listed twice: ranks decide, not bytes.
_TWO_WAYS = (
    dict(enumerate([b"a", b"b", b"c", b"d", b"bc", b"cd", b"bcd", b"abcd", b"aa", b"aaa"])),
    [
        (b"b", b"cd"),
        (b"c", b"d"),
        (b"b", b"c"),
        (b"bc", b"d"),
        (b"a", b"bcd"),
        (b"b", b"cd"),
        (b"a", b"a"),
        (b"a", b"aa"),
    ],
)

contract = Component(
    signature=tokenizer,
    kind="algorithm",
    summary="text to token ids and back",
    formula="ids = merges applied to the bytes of each pretoken, first merge first",
    paper="https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf",
    arguments=arguments,
    oracle=NaiveTokenizer,
    observe=observe,
    timed=timed,
    exact=True,
    # any_pattern: another pattern than GPT-2's; partial_bytes: a vocab that lacks some of the 256 bytes.
    features=("any_pattern", "partial_bytes"),
    cases=(
        Case(id="prose", sizes={"words": 400, "documents": 4, "special_tokens": SPECIAL_TOKENS}),
        Case(id="tricky", sizes={"tricky": 500, "special_tokens": SPECIAL_TOKENS}),
        Case(
            id="tricky_cl100k",
            sizes={"tricky": 500, "special_tokens": SPECIAL_TOKENS, "pattern": CL100K_PATTERN},
            features=("any_pattern",),
        ),
        Case(id="no_special_tokens", sizes={"tricky": 200}),
        Case(id="empty_special_tokens", sizes={"tricky": 200, "special_tokens": ()}),
        Case(id="overlapping", sizes={"tricky": 300, "special_tokens": pretoken_counter.OVERLAPPING}),
        Case(
            id="new_special_tokens",
            sizes={"text": "a<new>b< old >", "special_tokens": ("<new>", "< old >"), "vocab_size": 300},
        ),
        Case(
            id="special_at_borders",
            sizes={"text": "<|pad|><|endoftext|>a  <|pad|> b<|pad|>", "special_tokens": SPECIAL_TOKENS},
        ),
        Case(
            id="special_letter",
            sizes={"text": "banana band", "special_tokens": ("a",), "trained_special_tokens": ("a",)},
        ),
        Case(id="invalid_utf8", sizes={"tricky_bytes": 300, "special_tokens": SPECIAL_TOKENS}),
        Case(id="one_letter", sizes={"text": "a", "repeat": 300}),
        Case(id="empty", sizes={"text": "", "special_tokens": SPECIAL_TOKENS}),
        Case(id="no_merges", sizes={"tricky": 100, "vocab_size": 258}),
        Case(
            id="two_ways",
            sizes={"text": "abcdbcdaaaaaaabcd bcd".replace(" ", ""), "vocab_and_merges": _TWO_WAYS},
            features=("partial_bytes",),
        ),
        Case(
            id="gaps_between_ids",
            sizes={
                "text": "abba",
                "vocab_and_merges": ({7: b"a", 90_000: b"b", 3_000_000: b"ab"}, [(b"a", b"b")]),
                "special_tokens": ("bb",),
            },
            features=("partial_bytes",),
        ),
    ),
    error_cases=(
        ErrorCase(
            id="merge_without_token",
            arguments=lambda make: _tiny(merges=[(b"a", b"b"), (b"b", b"a")]),
            match=r"merge 1 is \(b'b', b'a'\), but vocab has no token b'ba'",
        ),
        ErrorCase(
            id="vocab_of_strings",
            arguments=lambda make: _tiny(vocab={0: "a"}),
            error=TypeError,
            match="vocab maps 0 to 'a': it must map ids from 0 on to bytes",
        ),
        ErrorCase(
            id="vocab_the_wrong_way_round",
            arguments=lambda make: _tiny(vocab={b"a": 0}),
            error=TypeError,
            match="vocab maps b'a' to 0",
        ),
        ErrorCase(
            id="merge_of_three",
            arguments=lambda make: _tiny(merges=[(b"a", b"b", b"a")]),
            error=TypeError,
            match="merge 0 is .* it must be a pair of bytes",
        ),
        ErrorCase(
            id="empty_special_token",
            arguments=lambda make: _tiny(special_tokens=["<|pad|>", ""]),
            match=r"special_tokens\[1\] is ''",
        ),
        ErrorCase(
            id="byte_without_token",
            arguments=lambda make: _tiny(text="abc"),
            match="vocab has no token for the byte b'c'",
            features=("partial_bytes",),
        ),
    ),
    laws=(
        Law(id="round_trip", statement="decode(encode(text)) is text", check=round_trip),
        Law(id="pieces", statement="encode_iterable of any pieces is encode of the join", check=pieces_do_not_matter),
        Law(
            id="pieces_any_pattern",
            statement="encode_iterable of any pieces is encode of the join, whatever the pattern",
            check=pieces_do_not_matter_to_any_pattern,
            features=("any_pattern",),
        ),
        Law(id="lazy", statement="encode_iterable reads only what its ids need", check=iterating_is_lazy),
        Law(
            id="memory",
            statement="encode_iterable's memory does not grow with the text",
            check=iterating_needs_little_memory,
        ),
        Law(
            id="native_memory",
            statement="nor does what its compiled code keeps outside Python",
            check=iterating_needs_little_native_memory,
        ),
        Law(
            id="files",
            statement="from_files gives the tokenizer of the same vocab and merges",
            check=files_give_the_same_tokenizer,
        ),
        Law(id="unknown_id", statement="decode refuses an id outside vocab, naming it", check=unknown_ids_are_refused),
        Law(id="merged", statement="no neighbours within a pretoken are left to merge", check=merges_follow_training),
    ),
    workloads=tuple(
        Workload(
            id=f"prose_{words // 1000}k_words",
            sizes={"words": words, "documents": words // 500, "special_tokens": SPECIAL_TOKENS},
            device="cpu",
        )
        for words in (20_000, 200_000)
    ),
    adapter="get_tokenizer",
)
