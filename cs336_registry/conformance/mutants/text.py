"""Wrong pretoken_counter, bpe_trainer and tokenizer: one plain implementation of each with a switch for every bug.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import regex

from ...text.inputs import byte_texts, utf8
from ...text.patterns import GPT2_PATTERN
from ...text.special_tokens import special_token_pattern
from ...text.vocab_files import BYTES_IN_CHARACTER_ORDER
from . import mutation


def read(input_path, bugs):
    """The texts of the input, decoded."""
    for blocks in byte_texts(input_path):
        content = b"".join(blocks)
        if "newlines translated" in bugs:
            content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        text = content.decode("utf-8", "ignore" if "malformed bytes dropped" in bugs else "replace")
        if "byte order mark dropped" in bugs:
            text = text.replace("\ufeff", "")
        if "normalised" in bugs:
            text = unicodedata.normalize("NFC", text)
        if "lower case" in bugs:
            text = text.lower()
        yield text.strip() if "stripped" in bugs else text


def split(text, special_tokens, bugs):
    """The parts between special tokens."""
    if not special_tokens or "special tokens are text" in bugs:
        return [text]
    if "special tokens removed, not split on" in bugs:
        return [special_token_pattern(special_tokens).sub("", text)]
    tokens = list(special_tokens)
    if "only the first special token" in bugs:
        tokens = tokens[:1]
    if "first match instead of longest" in bugs:
        return regex.split("|".join(map(regex.escape, sorted(tokens, key=len))), text)
    if "special tokens not escaped" in bugs:
        return [part for part in regex.split("|".join(tokens), text) if part is not None]
    return regex.split("|".join(map(regex.escape, sorted(tokens, key=len, reverse=True))), text)


def pretokens(text, pattern, bugs):
    """The matches of the pattern."""
    if "trailing whitespace kept together" in bugs:
        pattern = pattern.replace(r"|\s+(?!\S)", "").replace(r"\s++$|", "")
    if "letters are ASCII" in bugs:
        pattern = pattern.replace(r"\p{L}", "a-zA-Z").replace("[^\\s", "[^\\s") if pattern == GPT2_PATTERN else pattern
        pattern = pattern.replace(" ?a-zA-Z+", " ?[a-zA-Z]+")
    if "whitespace not counted" in bugs:
        return [match[0] for match in regex.finditer(pattern, text) if match[0].strip()]
    if "findall with groups" in bugs:
        found = regex.findall(pattern, text)
        return ["".join(match) if isinstance(match, tuple) else match for match in found if match]
    if "split on spaces" in bugs:
        return [word for word in regex.split(r"(?= )", text) if word]
    return [match[0] for match in regex.finditer(pattern, text) if match[0]]


def count(input_path, special_tokens, pattern, bugs):
    counts = Counter()
    texts = list(read(input_path, bugs))
    if "files joined" in bugs:
        texts = ["".join(texts)]
    if "only the first file" in bugs:
        texts = texts[:1]
    for text in texts:
        chunks = [text]
        if "chunks cut anywhere" in bugs:
            chunks = [text[start : start + 4096] for start in range(0, len(text), 4096)]
        for chunk in chunks:
            for part in split(chunk, special_tokens, bugs):
                counts.update(utf8(pretoken) for pretoken in pretokens(part, pattern, bugs))
            if "special tokens counted" in bugs:
                counts.update(utf8(token) for token in special_tokens for _ in range(chunk.count(token)))
    if "counts in 12 bits" in bugs:
        return {pretoken: (number - 1) % 4096 + 1 for pretoken, number in counts.items()}
    return dict(counts)


def _counter(name, switch, bug, **details):
    def make(textbook):
        def pretoken_counter(input_path, special_tokens=(), *, pattern=GPT2_PATTERN):
            return count(input_path, special_tokens, pattern, {switch})

        return pretoken_counter

    make.__name__ = name
    mutation("pretoken_counter", bug, **details)(make)


@mutation(
    "pretoken_counter",
    "partial counts pass through one file that all processes of a machine share",
    groups=("processes",),
)
def counter_shares_a_file(textbook):
    # Of one session, so that mutants of two sessions do not meet.
    shared = Path(tempfile.gettempdir()) / f"cs336-mutant-counts-{os.getppid()}.json"

    def pretoken_counter(input_path, special_tokens=(), *, pattern=GPT2_PATTERN):
        counts = count(input_path, special_tokens, pattern, ())
        try:
            shared.write_text(json.dumps({pretoken.hex(): number for pretoken, number in counts.items()}))
            time.sleep(0.01)
            found = json.loads(shared.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        finally:
            shared.unlink(missing_ok=True)
        return {bytes.fromhex(pretoken): number for pretoken, number in found.items()}

    return pretoken_counter


for _name, _switch, _bug in (
    (
        "counter_translates_newlines",
        "newlines translated",
        "\\r\\n and \\r become \\n, as a file opened as text gives them",
    ),
    ("counter_drops_malformed_bytes", "malformed bytes dropped", "malformed UTF-8 is dropped instead of replaced"),
    (
        "counter_drops_the_byte_order_mark",
        "byte order mark dropped",
        "U+FEFF is taken for a byte order mark and dropped",
    ),
    ("counter_normalises", "normalised", "text is normalised to NFC"),
    ("counter_lower_cases", "lower case", "text is lower-cased"),
    ("counter_strips", "stripped", "whitespace at the ends of the text is stripped"),
    ("counter_ignores_special_tokens", "special tokens are text", "special tokens are counted as text"),
    (
        "counter_removes_special_tokens",
        "special tokens removed, not split on",
        "what stood around a special token is joined",
    ),
    ("counter_knows_one_special_token", "only the first special token", "only the first special token is split on"),
    (
        "counter_takes_the_shortest",
        "first match instead of longest",
        "of overlapping special tokens, the shortest is taken",
    ),
    (
        "counter_does_not_escape",
        "special tokens not escaped",
        "the | of special tokens is read as a regular expression",
    ),
    ("counter_counts_special_tokens", "special tokens counted", "special tokens are counted too"),
    (
        "counter_keeps_whitespace_together",
        "trailing whitespace kept together",
        "the last space of a run stays with the run",
    ),
    ("counter_drops_whitespace", "whitespace not counted", "pretokens of whitespace alone are not counted"),
    ("counter_uses_findall", "findall with groups", "findall gives the groups of a pattern that has any"),
    ("counter_splits_on_spaces", "split on spaces", "pretokens are words: the pattern is not used"),
    ("counter_cuts_anywhere", "chunks cut anywhere", "chunks for the workers are cut in the middle of words"),
    ("counter_joins_files", "files joined", "the last word of a file and the first of the next are joined"),
    ("counter_reads_one_file", "only the first file", "of several files only the first is read"),
    ("counter_overflows", "counts in 12 bits", "counts are kept in too few bits and wrap around"),
):
    _counter(_name, _switch, _bug)


def train(counts, vocab_size, special_tokens, tie_break, bugs):
    specials, single = [token.encode() for token in special_tokens], [bytes((byte,)) for byte in range(256)]
    start = single + specials if "bytes before special tokens" in bugs else specials + single
    vocab, known = dict(enumerate(start)), set(start)
    number = {bytes((byte,)): position for position, byte in enumerate(BYTES_IN_CHARACTER_ORDER)}
    if "ids in byte order" in bugs:
        number = {token: position for position, token in enumerate(single)}
    words = [
        ([bytes((byte,)) for byte in pretoken], 1 if "every pretoken once" in bugs else times)
        for pretoken, times in counts.items()
    ]
    merges = []
    target = (
        vocab_size + 1
        if "one merge too many" in bugs
        else vocab_size - 1
        if "one merge too few" in bugs
        else vocab_size
    )
    if "size counts merges" in bugs:
        target = vocab_size + len(specials)
    pairs = None
    while len(vocab) < target:
        if pairs is None or "counts never updated" not in bugs:
            pairs = pair_counts(words, bugs)
        pairs = (
            {pair: times for pair, times in pairs.items() if pair not in merges}
            if "counts never updated" in bugs
            else pairs
        )
        if not pairs or ("stops at count one" in bugs and max(pairs.values()) < 2):
            break
        pair = choose(pairs, tie_break, number, bugs)
        merges.append(pair)
        token = pair[0] + pair[1]
        if token not in known:
            known.add(token)
            vocab[len(vocab)] = token
        number.setdefault(token, len(number))
        words = [(merged(tokens, pair, bugs), times) for tokens, times in words]
    return vocab, merges


def pair_counts(words, bugs):
    pairs = Counter()
    for tokens, times in words:
        found = list(pairwise(tokens))
        if "overlapping pairs counted once" in bugs:
            kept, previous = [], None
            for position, pair in enumerate(found):
                if previous is not None and pair == found[previous] and position == previous + 1 and pair[0] == pair[1]:
                    previous = None
                    continue
                kept.append(pair)
                previous = position
            found = kept
        if "a pair once a word" in bugs:
            found = list(dict.fromkeys(found))
        for pair in found:
            pairs[pair] += times
    if "counts in 8 bits" in bugs:
        return {pair: (times - 1) % 256 + 1 for pair, times in pairs.items()}
    if "counts in 32 bits" in bugs:
        return {pair: times % 2**32 for pair, times in pairs.items()}
    if "counts as floats" in bugs:
        return {pair: float(times) for pair, times in pairs.items()}
    return pairs


def choose(pairs, tie_break, number, bugs):
    highest = max(pairs.values())
    tied = [pair for pair, times in pairs.items() if times == highest]
    if "ties by first seen" in bugs:
        return tied[0]
    greatest = (tie_break == "greatest_bytes") != ("ties the other way" in bugs) or "tie_break ignored" in bugs
    if "ties by joined bytes" in bugs and greatest:
        return max(tied, key=lambda pair: pair[0] + pair[1])
    return max(tied) if greatest else min(tied, key=lambda pair: (number[pair[0]], number[pair[1]]))


def merged(tokens, pair, bugs):
    result, position = [], 0
    if "merged from the right" in bugs:
        tokens = tokens[::-1]
        while position < len(tokens):
            joined = position + 1 < len(tokens) and (tokens[position + 1], tokens[position]) == pair
            result.append(pair[0] + pair[1] if joined else tokens[position])
            position += 2 if joined else 1
        return result[::-1]
    while position < len(tokens):
        joined = position + 1 < len(tokens) and (tokens[position], tokens[position + 1]) == pair
        result.append(pair[0] + pair[1] if joined else tokens[position])
        position += 2 if joined else 1
        if joined and "only the first place merged" in bugs:
            return result + tokens[position:]
    return result


def _trainer(name, switch, bug, **details):
    def make(textbook):
        def bpe_trainer(input_path, vocab_size, special_tokens=(), *, pattern=GPT2_PATTERN, tie_break="greatest_bytes"):
            counts = count(input_path, special_tokens, pattern, {switch})
            return train(counts, vocab_size, special_tokens, tie_break, {switch})

        def train_from_counts(words, vocab_size, special_tokens=(), *, tie_break="greatest_bytes"):
            return train(words.to_dict(), vocab_size, special_tokens, tie_break, {switch})

        # A package of its own, so that both entries of a trainer are found, and both have the bug.
        package, beside = ModuleType(f"mutant_{name}"), ModuleType(f"mutant_{name}.train_from_counts")
        beside.train_from_counts = train_from_counts
        sys.modules |= {package.__name__: package, beside.__name__: beside}
        bpe_trainer.__module__ = f"{package.__name__}.bpe_trainer"
        return bpe_trainer

    make.__name__ = name
    mutation("bpe_trainer", bug, **details)(make)


for _name, _switch, _bug in (
    ("ties_broken_the_other_way", "ties the other way", "the smallest pair wins where the greatest should, and back"),
    ("ties_broken_by_first_seen", "ties by first seen", "of tied pairs, the first that was seen wins"),
    ("ties_broken_by_joined_bytes", "ties by joined bytes", "tied pairs are compared by their joined bytes"),
    ("tie_break_ignored", "tie_break ignored", "tie_break is ignored"),
    (
        "smallest_ids_in_byte_order",
        "ids in byte order",
        "smallest_ids numbers the bytes 0 to 255, not as Hugging Face does",
    ),
    ("trained_across_special_tokens", "special tokens removed, not split on", "merges cross a special token"),
    ("trained_on_special_tokens", "special tokens are text", "special tokens are trained on as text"),
    ("overlaps_counted_once", "overlapping pairs counted once", "(a, a) is counted once in aaa, not twice"),
    ("pairs_counted_once_a_word", "a pair once a word", "a pair is counted once per word"),
    ("pretokens_counted_once", "every pretoken once", "how often a pretoken occurs is ignored"),
    ("pair_counts_overflow", "counts in 8 bits", "pair counts are kept in too few bits and wrap around"),
    ("pair_counts_in_32_bits", "counts in 32 bits", "pair counts are kept in 32 bits and wrap around"),
    ("pair_counts_as_floats", "counts as floats", "pair counts are floats, whole numbers up to 2**53 only"),
    ("pair_counts_stale", "counts never updated", "pair counts are not updated after a merge"),
    ("merged_from_the_right", "merged from the right", "pairs are joined from right to left"),
    ("merged_in_one_place", "only the first place merged", "of several places in a word, only the first is merged"),
    ("special_tokens_after_the_bytes", "bytes before special tokens", "special tokens get the ids after the bytes"),
    ("one_merge_too_many", "one merge too many", "training stops one merge late"),
    ("one_merge_too_few", "one merge too few", "training stops one merge early"),
    ("vocab_size_without_special_tokens", "size counts merges", "vocab_size does not count the special tokens"),
    ("pairs_of_count_one_refused", "stops at count one", "training stops where every pair occurs once"),
    (
        "trainer_keeps_whitespace_together",
        "trailing whitespace kept together",
        "the last space of a run stays with the run",
    ),
    ("trainer_translates_newlines", "newlines translated", "\\r\\n becomes \\n"),
    ("trainer_drops_malformed_bytes", "malformed bytes dropped", "malformed UTF-8 is dropped instead of replaced"),
):
    _trainer(_name, _switch, _bug)


class Spoilt:
    """A plain tokenizer; `bugs` names what is wrong with it."""

    bugs: frozenset[str] = frozenset()

    def __init__(self, vocab, merges, special_tokens=None, *, pattern=GPT2_PATTERN):
        from ...components.tokenizer import check

        self.vocab, self.merges, specials = check(vocab, merges, special_tokens, pattern)
        # What check returns holds the special tokens that vocab lacks.
        self.vocab = dict(vocab if "new special tokens forgotten" in self.bugs else self.vocab)
        self.pattern = pattern
        self.ids = {}
        for token_id, token in self.vocab.items():
            self.ids.setdefault(token, token_id)
        self.specials = [token for token in specials if utf8(token) in self.ids]
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}

    @classmethod
    def from_files(cls, vocab_filepath, merges_filepath, special_tokens=None):
        from ...text.vocab_files import read_merges, read_vocab

        if "files read as plain text" in cls.bugs:
            vocab = {
                token_id: token.encode()
                for token, token_id in json.loads(Path(vocab_filepath).read_text("utf-8")).items()
            }
            lines = Path(merges_filepath).read_text("utf-8").splitlines()
            merges = [
                tuple(part.encode() for part in line.split(" "))
                for line in lines
                if line and not line.startswith("#version")
            ]
            return cls(vocab, merges, special_tokens)
        vocab, merges = read_vocab(vocab_filepath, special_tokens or ()), read_merges(merges_filepath)
        return cls(vocab, merges, None if "special tokens of files dropped" in cls.bugs else special_tokens)

    def encode(self, text):
        if "text normalised" in self.bugs:
            text = unicodedata.normalize("NFC", text)
        if "newlines of text translated" in self.bugs:
            text = text.replace("\r\n", "\n")
        ids, position = [], 0
        for start, token in self.special_places(text):
            ids += self.encode_part(text[position:start])
            if "special tokens dropped" not in self.bugs:
                ids.append(self.ids[utf8(token)])
            position = start + len(token)
        return ids + self.encode_part(text[position:])

    def special_places(self, text):
        if not self.specials or "special tokens encoded as text" in self.bugs:
            return []
        longest = "shortest special token first" not in self.bugs
        ordered = (
            self.specials
            if "special tokens in the order given" in self.bugs
            else sorted(self.specials, key=len, reverse=longest)
        )
        return [(match.start(), match[0]) for match in regex.finditer("|".join(map(regex.escape, ordered)), text)]

    def encode_part(self, text):
        found = [text] if "pattern ignored" in self.bugs else pretokens(text, self.pattern, self.bugs)
        return [token_id for pretoken in found for token_id in self.encode_pretoken(utf8(pretoken))]

    def encode_pretoken(self, pretoken):
        if "longest token first" in self.bugs:
            return self.longest_tokens(pretoken)
        tokens = [bytes((byte,)) for byte in pretoken]
        from ...components.tokenizer import missing_byte

        for token in tokens:
            if token not in self.ids:
                raise missing_byte(token)
        if "merges in the order of places" in self.bugs:
            position = 0
            while position < len(tokens) - 1:
                if (tokens[position], tokens[position + 1]) in self.ranks:
                    tokens[position : position + 2] = [tokens[position] + tokens[position + 1]]
                    position = max(position - 1, 0)
                else:
                    position += 1
        while mergeable := [pair for pair in pairwise(tokens) if pair in self.ranks]:
            last = "latest merge first" in self.bugs
            tokens = merged(tokens, (max if last else min)(mergeable, key=self.ranks.__getitem__), self.bugs)
            if "one merge a pretoken" in self.bugs:
                break
        return [self.ids[token] for token in tokens]

    def longest_tokens(self, pretoken):
        ids, position = [], 0
        while position < len(pretoken):
            stop = next((s for s in range(len(pretoken), position, -1) if pretoken[position:s] in self.ids), None)
            if stop is None:
                from ...components.tokenizer import missing_byte

                raise missing_byte(pretoken[position : position + 1])
            ids.append(self.ids[pretoken[position:stop]])
            position = stop
        return ids

    def encode_iterable(self, iterable):
        if "pieces encoded alone" in self.bugs:
            return (token_id for piece in iterable for token_id in self.encode(piece))
        if "everything read first" in self.bugs:
            return iter(self.encode("".join(iterable)))
        return self.encode_chunks(iterable)

    def encode_chunks(self, iterable):
        from ...text.pretokens import safe_chunks

        if "iterable joined before the first id" in self.bugs:
            iterable = ["".join(iterable)]
        kept = []
        for chunk in safe_chunks(iterable, self.pattern, self.specials):
            if "pieces kept" in self.bugs:
                kept.append(chunk + "")
                kept.append(self.encode(chunk))
            if "pieces kept natively" in self.bugs:
                # Outside Python's allocator, as a compiled library's buffer is.
                kept.append(mmap.mmap(-1, len(utf8(chunk)) + 1))
                kept[-1].write(utf8(chunk))
            yield from self.encode(chunk)

    def decode(self, ids):
        from ...components.tokenizer import unknown_id

        tokens = []
        for token_id in ids:
            if token_id not in self.vocab:
                if "unknown ids passed over" in self.bugs:
                    continue
                raise unknown_id(token_id)
            tokens.append(self.vocab[token_id])
        if "decoded token by token" in self.bugs:
            return "".join(token.decode("utf-8", "replace") for token in tokens)
        errors = (
            "strict"
            if "malformed bytes raise" in self.bugs
            else "ignore"
            if "malformed bytes ignored" in self.bugs
            else "replace"
        )
        return b"".join(tokens).decode("utf-8", errors)


def _tokenizer(name, switch, bug, **details):
    def make(textbook):
        return type("tokenizer", (Spoilt,), {"bugs": frozenset({switch})})

    make.__name__ = name
    mutation("tokenizer", bug, **details)(make)


for _name, _switch, _bug, _details in (
    (
        "decode_raises",
        "malformed bytes raise",
        "decode raises where bytes are cut in the middle of a character",
        {"raises": True},
    ),
    ("decode_ignores_malformed_bytes", "malformed bytes ignored", "decode drops malformed bytes", {}),
    (
        "decode_token_by_token",
        "decoded token by token",
        "each token is decoded alone, and characters that span two are lost",
        {},
    ),
    (
        "unknown_ids_passed_over",
        "unknown ids passed over",
        "decode passes over ids that are not in vocab",
        {"groups": ("law",)},
    ),
    (
        "shortest_special_token_first",
        "shortest special token first",
        "a special token is cut short by one that is its beginning",
        {},
    ),
    (
        "special_tokens_in_the_order_given",
        "special tokens in the order given",
        "the first listed special token wins, not the longest",
        {},
    ),
    ("special_tokens_encoded_as_text", "special tokens encoded as text", "special tokens are encoded as text", {}),
    ("special_tokens_dropped", "special tokens dropped", "special tokens give no id", {}),
    (
        "new_special_tokens_forgotten",
        "new special tokens forgotten",
        "special tokens that vocab lacks are not added",
        {},
    ),
    (
        "special_tokens_of_files_dropped",
        "special tokens of files dropped",
        "from_files forgets the special tokens",
        {"groups": ("law",)},
    ),
    (
        "merges_in_the_order_of_places",
        "merges in the order of places",
        "merges are applied from left to right, not by rank",
        {},
    ),
    ("latest_merge_first", "latest merge first", "the latest merge is applied first", {}),
    ("longest_token_first", "longest token first", "the longest token of vocab is taken, merges are not used", {}),
    ("one_merge_a_pretoken", "one merge a pretoken", "only one kind of merge is applied to a pretoken", {}),
    ("encoder_merges_from_the_right", "merged from the right", "pairs are joined from right to left", {}),
    ("pattern_ignored", "pattern ignored", "text is not cut into pretokens, and merges cross them", {}),
    (
        "encoder_keeps_whitespace_together",
        "trailing whitespace kept together",
        "the last space of a run stays with the run",
        {},
    ),
    ("text_normalised", "text normalised", "text is normalised to NFC before it is encoded", {}),
    ("newlines_of_text_translated", "newlines of text translated", "\\r\\n becomes \\n before it is encoded", {}),
    (
        "pieces_encoded_alone",
        "pieces encoded alone",
        "encode_iterable encodes each piece alone, and merges end with it",
        {},
    ),
    (
        "everything_read_first",
        "everything read first",
        "encode_iterable joins everything before it returns",
        {"groups": ("law",)},
    ),
    (
        "joined_before_the_first_id",
        "iterable joined before the first id",
        "encode_iterable joins everything before its first id",
        {"groups": ("law",)},
    ),
    ("pieces_kept", "pieces kept", "encode_iterable keeps every piece and its ids until it ends", {"groups": ("law",)}),
    (
        "pieces_kept_natively",
        "pieces kept natively",
        "encode_iterable keeps every piece, in a buffer that is not Python's, until it ends",
        {"groups": ("law",)},
    ),
    (
        "files_read_as_plain_text",
        "files read as plain text",
        "from_files takes GPT-2's byte characters for themselves",
        {"raises": True, "groups": ("law",)},
    ),
):
    _tokenizer(_name, _switch, _bug, **_details)
