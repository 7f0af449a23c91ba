"""Counting the pretokens of a corpus: the first half of training a byte-pair tokenizer."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..arguments import ArgumentMaker
from ..component import Arguments, Case, Component, ErrorCase, Law, Workload
from ..text import samples
from ..text.inputs import InputPath, expand
from ..text.patterns import CL100K_PATTERN, GPT2_PATTERN, check_pattern
from ..text.special_tokens import check_special_tokens

SPECIAL_TOKENS = (samples.END_OF_TEXT, "<|pad|>")
OVERLAPPING = ("<|endoftext|>", "<|endoftext|><|endoftext|>", "<|end", "text|>", "|>")


def pretoken_counter(
    input_path: InputPath, special_tokens: Sequence[str] = (), *, pattern: str = GPT2_PATTERN
) -> dict[bytes, int]:
    """Count how often each pretoken (as UTF-8 bytes) occurs in the text of `input_path`.

    The text is split on the special tokens (the longest where several match), which are not counted, and each part is
    cut into the matches of `pattern`. input_path: a path, or a sequence of paths; see `text/inputs.py` for the kinds of
    file. Malformed UTF-8 becomes U+FFFD; newlines are counted as they are. The order of the result is not specified.
    Raises FileNotFoundError for a missing file, ValueError or TypeError for a bad special token or pattern.
    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """
    raise NotImplementedError


def check(input_path: InputPath, special_tokens: Sequence[str], pattern: str) -> tuple[list[Path], tuple[str, ...]]:
    """The files and the special tokens, or the error that every backend raises for bad ones."""
    check_pattern(pattern)
    return expand(input_path), check_special_tokens(special_tokens)


def content(sizes: dict, seed: int) -> bytes:
    """The corpus of a case: its "text" or "bytes", repeated, or generated prose or tricky strings."""
    if "bytes" in sizes:
        return sizes["bytes"] * sizes.get("repeat", 1)
    if "text" in sizes:
        return sizes["text"].encode() * sizes.get("repeat", 1)
    if "tricky_bytes" in sizes:
        return samples.tricky_bytes(sizes["tricky_bytes"], seed=seed)
    if "tricky" in sizes:
        return samples.tricky(sizes["tricky"], seed=seed).encode()
    return samples.prose(sizes["words"], seed=seed, documents=sizes.get("documents", 1)).encode()


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = dict(case.sizes)
    parts = [content(sizes, seed=case.seed + make.seed + number) for number in range(sizes.get("files", 1))]
    paths = [make.file(part, f"{case.id}_{number}.txt") for number, part in enumerate(parts)]
    return {
        "input_path": paths if len(paths) > 1 else paths[0],
        "special_tokens": list(sizes.get("special_tokens", ())),
        "pattern": sizes.get("pattern", GPT2_PATTERN),
    }


def split_on_special_tokens(text: str, special_tokens: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The text in parts, each with whether it is a special token: one look at every position, longest token first."""
    start = position = 0
    while position < len(text):
        found = max((token for token in special_tokens if text.startswith(token, position)), key=len, default=None)
        if found is None:
            position += 1
            continue
        yield text[start:position], False
        yield found, True
        start = position = position + len(found)
    yield text[start:], False


def oracle(
    input_path: InputPath, special_tokens: Sequence[str] = (), *, pattern: str = GPT2_PATTERN
) -> dict[bytes, int]:
    """Each file read whole, split by hand, matched once."""
    import regex

    paths, tokens = check(input_path, special_tokens, pattern)
    counts: Counter[bytes] = Counter()
    for path in paths:
        for part, is_special in split_on_special_tokens(path.read_bytes().decode("utf-8", "replace"), tokens):
            if not is_special:
                counts.update(match[0].encode() for match in regex.finditer(pattern, part) if match[0])
    return dict(counts)


def nothing_is_lost(pretoken_counter, make: ArgumentMaker) -> None:
    text = samples.prose(800, seed=make.seed, documents=5) + samples.tricky(400, seed=make.seed)
    counts = pretoken_counter(make.file(text), SPECIAL_TOKENS)
    total = sum(len(pretoken) * count for pretoken, count in counts.items())
    kept = text.replace(SPECIAL_TOKENS[0], "").replace(SPECIAL_TOKENS[1], "")
    assert total == len(kept.encode()), f"{total} bytes were counted of {len(kept.encode())}"


def documents_add_up(pretoken_counter, make: ArgumentMaker) -> None:
    documents = samples.prose(600, seed=make.seed, documents=6).split(samples.END_OF_TEXT)
    files = [make.file(document, f"document_{number}.txt") for number, document in enumerate(documents)]
    separately: Counter[bytes] = Counter()
    for file in files:
        separately.update(pretoken_counter(file, SPECIAL_TOKENS))
    joined = make.file(samples.END_OF_TEXT.join(reversed(documents)), "joined.txt")
    assert pretoken_counter(joined, SPECIAL_TOKENS) == dict(separately), (
        "one file counts differently from its documents"
    )
    assert pretoken_counter(files, SPECIAL_TOKENS) == dict(separately), "a list of files is not the sum of its files"


def file_kinds_agree(pretoken_counter, make: ArgumentMaker) -> None:
    text = samples.prose(300, seed=make.seed)
    plain = pretoken_counter(make.file(text, "plain.txt"))
    assert pretoken_counter(make.file(gzip.compress(text.encode()), "packed.txt.gz")) == plain
    assert pretoken_counter(make.file(json.dumps({"text": text}) + "\n\n", "lines.jsonl")) == plain


def special_tokens_are_not_text(pretoken_counter, make: ArgumentMaker) -> None:
    text = "one<|pad|>two<|endoftext|><|pad|>"
    assert pretoken_counter(make.file(text), SPECIAL_TOKENS) == {b"one": 1, b"two": 1}
    assert pretoken_counter(make.file(text), ())[b"pad"] == 2, "without special tokens their text is ordinary"


contract = Component(
    signature=pretoken_counter,
    kind="algorithm",
    summary="how often each pretoken occurs in a corpus",
    formula="counts[p] = |{matches of pattern equal to p, between special tokens}|",
    paper="https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf",
    arguments=arguments,
    oracle=oracle,
    exact=True,
    cases=(
        Case(id="prose", sizes={"words": 1500, "documents": 7, "special_tokens": SPECIAL_TOKENS}),
        Case(id="no_special_tokens", sizes={"words": 500, "documents": 3}),
        Case(id="tricky", sizes={"tricky": 3000, "special_tokens": SPECIAL_TOKENS}),
        Case(id="tricky_cl100k", sizes={"tricky": 3000, "special_tokens": SPECIAL_TOKENS, "pattern": CL100K_PATTERN}),
        Case(id="invalid_utf8", sizes={"tricky_bytes": 2000, "special_tokens": SPECIAL_TOKENS}),
        Case(id="cut_at_the_end", sizes={"bytes": "naïve 🙂".encode()[:-1]}),
        Case(id="overlapping", sizes={"tricky": 800, "special_tokens": OVERLAPPING}),
        Case(
            id="special_at_borders", sizes={"text": "<|pad|><|endoftext|>a b<|pad|>", "special_tokens": SPECIAL_TOKENS}
        ),
        Case(
            id="spaces_around_special", sizes={"text": "a  <|pad|>  b \n<|pad|>\n c", "special_tokens": SPECIAL_TOKENS}
        ),
        Case(id="one_letter", sizes={"text": "a", "repeat": 5000}),
        Case(id="one_letter_words", sizes={"text": "a ", "repeat": 5000}),
        Case(id="whitespace_alone", sizes={"text": " \n\t", "repeat": 1000}),
        Case(id="carriage_returns", sizes={"text": "line\r\nnext\rlast\n\r", "repeat": 20}),
        Case(id="own_pattern", sizes={"words": 300, "pattern": r"(\p{L})+|\s*"}),
        Case(id="empty_file", sizes={"text": ""}),
        Case(id="files", sizes={"words": 300, "files": 3, "documents": 2, "special_tokens": SPECIAL_TOKENS}),
    ),
    error_cases=(
        ErrorCase(
            id="missing_file",
            arguments=lambda make: {"input_path": "no/such/corpus.txt"},
            error=FileNotFoundError,
            match="no file 'no/such/corpus.txt'",
        ),
        ErrorCase(id="no_files", arguments=lambda make: {"input_path": []}, match="input_path is empty: pass a path"),
        ErrorCase(
            id="empty_special_token",
            arguments=lambda make: {"input_path": make.file("a"), "special_tokens": ["<|pad|>", ""]},
            match=r"special_tokens\[1\] is ''",
        ),
        ErrorCase(
            id="repeated_special_token",
            arguments=lambda make: {"input_path": make.file("a"), "special_tokens": ["<|pad|>", "<|pad|>"]},
            match="'<|pad|>' is given twice".replace("|", r"\|"),
        ),
        ErrorCase(
            id="special_tokens_in_a_string",
            arguments=lambda make: {"input_path": make.file("a"), "special_tokens": "<|pad|>"},
            error=TypeError,
            match="put it in a list",
        ),
        ErrorCase(
            id="bad_pattern",
            arguments=lambda make: {"input_path": make.file("a"), "pattern": "(a"},
            match="is not a regular expression",
        ),
        ErrorCase(
            id="damaged_gzip",
            arguments=lambda make: {"input_path": make.file(gzip.compress(b"text " * 99)[:-9], "damaged.gz")},
            match=r"damaged.gz is damaged",
        ),
        ErrorCase(
            id="jsonl_without_text",
            arguments=lambda make: {"input_path": make.file('{"text": "a"}\n{"body": "b"}\n', "other.jsonl")},
            match='line 2: expected a JSON object with a string "text"',
        ),
    ),
    laws=(
        Law(id="conservation", statement="pretokens and special tokens make up the text", check=nothing_is_lost),
        Law(
            id="sum",
            statement="the counts of documents add up, in any order, in one file or many",
            check=documents_add_up,
        ),
        Law(id="kinds", statement="the same text counts the same from every kind of file", check=file_kinds_agree),
        Law(id="special", statement="special tokens are split on and not counted", check=special_tokens_are_not_text),
    ),
    workloads=tuple(
        Workload(
            id=f"prose_{words // 1000}k_words",
            sizes={"words": words, "documents": words // 500, "special_tokens": SPECIAL_TOKENS},
            device="cpu",
        )
        for words in (20_000, 1_000_000)
    ),
)
