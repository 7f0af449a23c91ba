"""Encoding with the compiled scanner and a table of pretokens that were met before."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cs336_registry.components.tokenizer import check, missing_byte, special_ids, text_ids, unknown_id
from cs336_registry.text import frequent_words
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import InputPath, byte_texts, decoded, expand, is_plain, utf8
from cs336_registry.text.patterns import GPT2_PATTERN, pretoken_finder
from cs336_registry.text.pretokens import safe_chunks
from cs336_registry.text.special_tokens import special_token_pattern
from cs336_registry.text.vocab_files import read_merges, read_vocab

from .corpus import COMPILED_PATTERNS, is_small
from .small import joined

if TYPE_CHECKING:
    import numpy as np

    from cs336_registry.text.training_cache import WordCounts

    from .byte_ranges import ByteRange
    from .encoder import EncoderVocab, EncodeTable
    from .text_buffer import TextBuffer

SEEDING_BYTES = 1 << 20
"""From this much text on, it pays to put the vocabulary's own tokens into the table first."""
STREAM_BYTES = 1 << 16
"""encode_iterable encodes this much text at a time."""
RANGE_BYTES = 1 << 20
"""What one of several threads encodes at a time: little enough for its ids to stay in a core's cache."""
SPARE_OUTPUT = 32
"""Bytes behind the last id that the encoder may write to."""
MAX_REMEMBERED = 1 << 14
MAX_COMPILED_ID = 2**31 - 1


class Tokenizer:
    """See the contract. Short texts are encoded by plain Python until compiled code pays."""

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str = GPT2_PATTERN,
        num_threads: int | None = None,
        seed_words: Iterable[bytes] = (),
        folder: StrPath | None = None,
    ) -> None:
        """seed_words: pretokens to expect. folder: the tokenizer's own, where `keep_frequent_words` may have left the
        training corpus's most frequent pretokens with their ids: with them, long texts are fast from the start."""
        self.vocab, self.merges, self.special_tokens = check(vocab, merges, special_tokens, pattern)
        self.pattern = pattern
        self.num_threads = num_threads
        self._seed_words, self._folder = tuple(seed_words), folder
        self._characters_seen = 0
        self._python = _PythonEncoder(self.vocab, self.merges, self.special_tokens, pattern)
        self._idle: list[tuple[EncodeTable, TextBuffer]] = []
        self._stream_tables: list[EncodeTable] = []
        self._is_compilable = pattern in COMPILED_PATTERNS and max(self.vocab, default=0) <= MAX_COMPILED_ID

    @classmethod
    def from_files(
        cls,
        vocab_filepath: StrPath,
        merges_filepath: StrPath,
        special_tokens: Sequence[str] | None = None,
        **options,
    ) -> Tokenizer:
        vocab = read_vocab(vocab_filepath, special_tokens or ())
        options.setdefault("folder", Path(vocab_filepath).parent)
        return cls(vocab, read_merges(merges_filepath), special_tokens, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made again when it is needed: compiled code and its tables stay in their process."""
        state = self.__dict__ | {"_idle": [], "_stream_tables": []}
        state.pop("_encoder_vocab", None)
        return state

    def keep_frequent_words(self, counts: WordCounts, folder: StrPath) -> None:
        """Keep the most frequent pretokens of a corpus (`counts`) with their ids in the tokenizer's folder, unless the
        corpus is so small that text like it is encoded before they are of use."""
        if not self._is_compilable or is_small(counts.num_bytes, ("encode",)):
            return
        from .encoder import EncodeTable

        words = frequent_words.most_frequent(counts)
        ids, starts = EncodeTable(self._encoder_vocab, seeded=False).ids_of_words(words)
        kept = frequent_words.FrequentWords.of(words, ids, starts)
        frequent_words.write(folder, kept, frequent_words.tokenizer_key(self.vocab, self.merges))

    def encode(self, text: str) -> list[int]:
        if not self._uses_compiled(len(text)):
            return self._python.encode(text)
        try:
            content = text.encode()
        except UnicodeEncodeError:  # lone surrogates, which no special token may match once they are U+FFFD
            return self._python.encode(text)
        return self._encode_bytes(content)

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        for chunk in safe_chunks(iterable, self.pattern, self.special_tokens, chunk_characters=STREAM_BYTES):
            yield from self.encode(chunk)

    def decode(self, ids: Iterable[int]) -> str:
        vocab = self.vocab
        try:
            return b"".join([vocab[token_id] for token_id in ids]).decode("utf-8", "replace")
        except KeyError as error:
            raise unknown_id(error.args[0]) from None

    def encode_to_array(self, input_path: InputPath, *, num_threads: int | None = None) -> np.ndarray:
        """The ids of all texts of `input_path`, one after another: uint16 where they fit, else uint32."""
        import numpy as np

        paths = expand(input_path)
        if len(paths) == 1 and self._is_compilable and is_plain(paths[0]):
            return self._encode_plain_file_to_array(paths[0], self._threads(num_threads))
        arrays = list(self.encode_arrays(paths, num_threads=num_threads))
        return np.concatenate(arrays) if arrays else np.empty(0, self.dtype)

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16, uint32 and uint64 that holds every id."""
        import numpy as np

        return (
            np.min_scalar_type(max(self.vocab, default=0)) if max(self.vocab, default=0) > 255 else np.dtype("uint16")
        )

    def encode_arrays(self, input_path: InputPath, *, num_threads: int | None = None) -> Iterator[np.ndarray]:
        """The same in parts, in order, as they are done; memory is bounded by a few parts for each thread."""
        import numpy as np

        for path in expand(input_path):
            if self._is_compilable and is_plain(path):
                yield from self._encode_plain_file(path, self._threads(num_threads))
                continue
            for blocks in byte_texts(path):
                for chunk in safe_chunks(decoded(blocks), self.pattern, self.special_tokens):
                    yield np.array(self.encode(chunk), self.dtype)

    def encode_range(self, path: StrPath, begin: int, end: int) -> np.ndarray:
        """The ids of bytes begin..end of a plain file, which may be cut there, on one thread."""
        if self._uses_compiled(end - begin):
            from .byte_ranges import ByteRange

            return self._encode_byte_range(ByteRange(os.fspath(path), begin, end), seeded=True)
        import numpy as np

        with open(path, "rb") as file:
            file.seek(begin)
            return np.array(self.encode(file.read(end - begin).decode("utf-8", "replace")), self.dtype)

    def _uses_compiled(self, num_characters: int) -> bool:
        """Compiled code pays for a long text, and for many short ones."""
        self._characters_seen += num_characters
        if not self._is_compilable:
            return False
        return bool(self._stream_tables) or not is_small(self._characters_seen, ("encode",))

    def prepare(self, num_threads: int = 1) -> None:
        """Load (or compile) what encoding long texts on so many threads needs, which the first of them would otherwise
        wait for."""
        if not self._is_compilable:
            return
        readers = []
        while (reader := self._idle_reader()) is not None:  # nobody else may use a table while it is copied
            if reader[0].seeded:
                readers.append(reader)
        while len(readers) < num_threads:
            readers.append(self._reader(readers[0][0].copy() if readers else None))
        self._idle.extend(readers)

    def _idle_reader(self) -> tuple[EncodeTable, TextBuffer] | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _reader(self, table: EncodeTable | None = None, *, seeded: bool = True) -> tuple[EncodeTable, TextBuffer]:
        """A table and the buffer that feeds it: what one thread needs to encode files."""
        from .encoder import EncodeTable
        from .text_buffer import TextBuffer

        table = table or EncodeTable(self._encoder_vocab, seeded=seeded)
        return table, TextBuffer(table, always_decode=self._encoder_vocab.special_tokens.need_decoded_text)

    @cached_property
    def _encoder_vocab(self) -> EncoderVocab:
        from .encoder import build_encoder_vocab

        pattern = COMPILED_PATTERNS[self.pattern]
        known = None
        if self._folder is not None:
            known = frequent_words.read(self._folder, frequent_words.tokenizer_key(self.vocab, self.merges))
        return build_encoder_vocab(self.vocab, self.merges, self.special_tokens, pattern, None, self._seed_words, known)

    def _encode_bytes(self, content: bytes) -> list[int]:
        """The ids of a text; each thread that is in here has a table of its own."""
        from .encoder import STREAM_SLOTS, EncodeTable
        from .text_buffer import TextBuffer

        try:
            table = self._stream_tables.pop()
        except IndexError:
            self._python.remembered.clear()
            table = EncodeTable(self._encoder_vocab, max_slots=STREAM_SLOTS)
        buffer = TextBuffer(table, block_bytes=max(1, len(content)))
        buffer.append(content)
        buffer.settle(True)
        ids = table.take().tolist()
        table.forget(buffer.array)
        self._stream_tables.append(table)
        return ids

    def _threads(self, num_threads: int | None) -> int:
        from .word_counter import available_cpus

        return num_threads or self.num_threads or available_cpus()

    def _encode_plain_file(self, path: Path, num_threads: int) -> Iterator[np.ndarray]:
        ranges = self._ranges(path)
        num_threads = min(num_threads, len(ranges))
        seeded = self._prepare_for(path, num_threads)
        yield from _in_order(partial(self._encode_byte_range, seeded=seeded), ranges, num_threads)

    def _encode_plain_file_to_array(self, path: Path, num_threads: int) -> np.ndarray:
        """All ids in one block of memory, long enough for an id of every byte: what is not written to costs nothing.
        One thread writes them there; several write to memory of their own and copy them when it is their turn."""
        import numpy as np

        from . import blocks
        from .byte_ranges import ByteRange

        dtype, size = self._encoder_vocab.dtype, path.stat().st_size
        try:
            block = np.frombuffer(blocks.zeros("B", size * dtype.itemsize + SPARE_OUTPUT), np.uint8)
        except OSError:  # more than the system lets anyone ask for, though much less would be written to
            return np.concatenate(list(self._encode_plain_file(path, num_threads)))
        ranges = self._ranges(path) if num_threads > 1 else [ByteRange(os.fspath(path), 0, size)]
        num_threads = min(num_threads, len(ranges))
        seeded = self._prepare_for(path, num_threads)
        if num_threads == 1:
            return self._encode_byte_range(ranges[0], block, seeded=seeded)
        gathered, waiting = _Gathered(block), deque(enumerate(ranges))

        def work() -> None:
            table, buffer = self._idle_reader() or self._reader(seeded=seeded)
            try:
                while waiting:
                    try:
                        index, byte_range = waiting.popleft()
                    except IndexError:  # another thread took the last one
                        break
                    gathered.put(index, _encode_range(table, buffer, byte_range))
            finally:
                waiting.clear()  # where one thread fails, the others stop
            self._idle.append((table, buffer))

        with ThreadPoolExecutor(num_threads - 1) as pool:
            others = [pool.submit(work) for _ in range(num_threads - 1)]
            work()
            for job in others:
                job.result()
        return gathered.bytes().view(dtype)

    def _ranges(self, path: Path) -> list[ByteRange]:
        from .byte_ranges import cut_into_ranges

        special = self._encoder_vocab.special_tokens
        range_bytes = path.stat().st_size + 1 if special.need_decoded_text else RANGE_BYTES
        return cut_into_ranges([path], self._encoder_vocab.pattern, special.tokens, range_bytes)

    def _prepare_for(self, path: Path, num_threads: int) -> bool:
        """Whether tables for the file begin with seeds; if so, they are made."""
        seeded = path.stat().st_size >= SEEDING_BYTES
        if seeded:
            self.prepare(num_threads)
        return seeded

    def _encode_byte_range(
        self, byte_range: ByteRange, output: np.ndarray | None = None, *, seeded: bool
    ) -> np.ndarray:
        """The ids of a range of a file: in `output`, if that is given and they fit, else in an array of their own."""
        import numpy as np

        table, buffer = self._idle_reader() or self._reader(seeded=seeded)
        own = table.output
        if output is None:
            output = np.empty(len(byte_range) * table.vocab.dtype.itemsize + SPARE_OUTPUT, np.uint8)
        table.output = output
        ids = _encode_range(table, buffer, byte_range)
        table.forget(output)
        table.output = own
        self._idle.append((table, buffer))
        return ids


def _encode_range(table: EncodeTable, buffer: TextBuffer, byte_range: ByteRange) -> np.ndarray:
    """The ids of a range of a file, in the table's output."""
    for _ in buffer.read_range(byte_range.path, byte_range.begin, byte_range.end):
        pass
    return table.take()


class _Gathered:
    """Arrays that several threads make, one after another in a block of bytes."""

    def __init__(self, block: np.ndarray) -> None:
        self.block, self.used, self.next = block, 0, 0
        self.early: dict[int, np.ndarray] = {}
        self.lock = threading.Lock()

    def put(self, index: int, array: np.ndarray) -> None:
        """Copy an array to its place, or keep a copy until those before it have come."""
        import numpy as np

        with self.lock:
            self.early[index] = array if index == self.next else array.copy()
            while (ready := self.early.pop(self.next, None)) is not None:
                if self.used + ready.nbytes > len(self.block):  # bytes that are not UTF-8 took more than an id each
                    larger = np.empty(2 * len(self.block) + ready.nbytes, np.uint8)
                    ctypes.memmove(larger.ctypes.data, self.block.ctypes.data, self.used)
                    self.block = larger
                ctypes.memmove(self.block.ctypes.data + self.used, ready.ctypes.data, ready.nbytes)
                self.used += ready.nbytes
                self.next += 1

    def bytes(self) -> np.ndarray:
        return self.block[: self.used]


def _in_order(
    function: Callable[[ByteRange], np.ndarray], ranges: Sequence[ByteRange], num_threads: int
) -> Iterator[np.ndarray]:
    """What `function` gives for each range, with a few ahead of the one that is waited for."""
    if num_threads == 1:
        yield from map(function, ranges)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: list[Future[np.ndarray]] = []
        for byte_range in ranges:
            waiting.append(pool.submit(function, byte_range))
            if len(waiting) > 2 * num_threads:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


class _PythonEncoder:
    """Encoding by `regex` and dictionaries."""

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str],
        pattern: str,
    ) -> None:
        id_of = text_ids(vocab)
        self.byte_ids = [id_of.get(bytes((byte,)), -1) for byte in range(256)]
        self.merges = {
            (id_of[left], id_of[right]): (rank, id_of[left + right]) for rank, (left, right) in enumerate(merges)
        }
        self.special_id_of = special_ids(vocab, special_tokens)
        self.special = special_token_pattern(special_tokens)
        self.find = pretoken_finder(pattern)
        self.remembered: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate([text] if self.special is None else self.special.split(text)):
            if place % 2:
                ids.append(self.special_id_of[part])
                continue
            for pretoken in self.find(part):
                found = self.remembered.get(pretoken)
                if found is None:
                    found = self._merge(utf8(pretoken))
                    if len(self.remembered) < MAX_REMEMBERED:
                        self.remembered[pretoken] = found
                ids += found
        return ids

    def _merge(self, pretoken: bytes) -> list[int]:
        ids = [self.byte_ids[byte] for byte in pretoken]
        if -1 in ids:
            place = ids.index(-1)
            raise missing_byte(pretoken[place : place + 1])
        while len(ids) > 1:
            pairs = [pair for pair in itertools.pairwise(ids) if pair in self.merges]
            if not pairs:
                break
            best = min(pairs, key=self.merges.__getitem__)
            ids = joined(ids, best, self.merges[best][1])
        return ids
