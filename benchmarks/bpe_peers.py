"""One library, one task, in a fresh process: what bpe_training.py and encoding.py start and measure from outside.

    python benchmarks/bpe_peers.py train  PEER CORPUS VOCAB_SIZE OUT
    python benchmarks/bpe_peers.py encode PEER CORPUS VOCABULARY OUT THREADS WARM_PASSES

train writes the merges (a pair of hex strings a line); encode writes the ids as a flat array. The last line of output
is a JSON object with the version of the library, the seconds of the phases that can be told apart, and (numba_bpe) how
many unique pretokens the text has.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

Merges = list[tuple[bytes, bytes]]
Phases = dict[str, float]


def documents(path: str) -> list[str]:
    return Path(path).read_bytes().decode().split(END)


def clock(phases: Phases, name: str, function: Callable[[], Any]) -> Any:
    """Call, and note the wall seconds; the processor seconds of all threads under another name beside them."""
    started, processor = time.perf_counter(), time.process_time()
    result = function()
    phases[name] = round(time.perf_counter() - started, 4)
    phases[f"{name}_processor"] = round(time.process_time() - processor, 4)
    return result


# Training


def train_numba_bpe(path: str, vocab_size: int, phases: Phases, tie_break: str = "greatest_bytes") -> Merges:
    from cs336_numba_bpe import bpe_trainer as trainer

    count = trainer.count_corpus

    def counted(*arguments: Any) -> Any:
        words = clock(phases, "pretokenise", lambda: count(*arguments))
        phases["unique_pretokens"] = len(words)
        return words

    trainer.count_corpus = counted
    return clock(phases, "train", lambda: trainer.bpe_trainer(path, vocab_size, [END], tie_break=tie_break))[1]


def train_numba_bpe_smallest_ids(path: str, vocab_size: int, phases: Phases) -> Merges:
    return train_numba_bpe(path, vocab_size, phases, "smallest_ids")


def train_heap_bpe(path: str, vocab_size: int, phases: Phases) -> Merges:
    from cs336_heap_bpe import bpe_trainer as trainer

    count = trainer.count_words
    trainer.count_words = lambda *arguments: clock(phases, "pretokenise", lambda: count(*arguments))
    return clock(phases, "train", lambda: trainer.bpe_trainer(path, vocab_size, [END]))[1]


def train_reference(path: str, vocab_size: int, phases: Phases) -> Merges:
    from cs336_reference.bpe_trainer import bpe_trainer

    return clock(phases, "train", lambda: bpe_trainer(path, vocab_size, [END]))[1]


def train_gigatoken(path: str, vocab_size: int, phases: Phases) -> Merges:
    import gigatoken

    source = gigatoken.TextFileSource([path], separator=END)
    return clock(phases, "train", lambda: gigatoken.train_bpe(source, vocab_size, [END]))[1]


def train_rustbpe(path: str, vocab_size: int, phases: Phases) -> Merges:
    """No special tokens: documents are handed over apart."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    texts = documents(path)
    clock(phases, "train", lambda: tokenizer.train_from_iterator(iter(texts), vocab_size - 1, pattern=GPT2_PATTERN))
    return merges_of_ranks({bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()})


def train_bpeasy(path: str, vocab_size: int, phases: Phases) -> Merges:
    """No special tokens either."""
    import bpeasy

    texts = documents(path)
    train = bpeasy.train_bpe_stream
    ranks = clock(phases, "train", lambda: train(iter(texts), GPT2_PATTERN, 128, vocab_size - 1, 1000))
    return merges_of_ranks({bytes(token): rank for token, rank in ranks.items()})


def train_tokenizers(path: str, vocab_size: int, phases: Phases) -> Merges:
    """Hugging Face tokenizers."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = documents(path)
    clock(phases, "train", lambda: tokenizer.train_from_iterator(iter(texts), trainer))
    characters = gpt2_characters()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return [tuple(bytes(characters[character] for character in part) for part in pair) for pair in pairs]  # type: ignore[misc]


def gpt2_characters() -> dict[str, int]:
    """GPT-2's visible character of each byte, the other way round."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def merges_of_ranks(ranks: dict[bytes, int]) -> Merges:
    """The merge that makes each token of more than one byte: its bytes joined by the merges before it."""
    merges: Merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[place] + parts[place + 1], len(ranks)) for place in range(len(parts) - 1)]
            best = pairs.index(min(pairs))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append((parts[0], parts[1]))
    return merges


TRAINERS: dict[str, Callable[[str, int, Phases], Merges]] = {
    "numba_bpe": train_numba_bpe,
    "numba_bpe_smallest_ids": train_numba_bpe_smallest_ids,
    "heap_bpe": train_heap_bpe,
    "reference": train_reference,
    "gigatoken": train_gigatoken,
    "rustbpe": train_rustbpe,
    "tokenizers": train_tokenizers,
    "bpeasy": train_bpeasy,
}


# Encoding: a function that makes a function from the text to flat ids; it is timed on the whole text twice.


def read_vocabulary(path: str) -> tuple[dict[int, bytes], Merges]:
    content = json.loads(Path(path).read_text())
    vocab = {int(token_id): bytes.fromhex(token) for token_id, token in content["vocab"].items()}
    return vocab, [(bytes.fromhex(left), bytes.fromhex(right)) for left, right in content["merges"]]


def encode_numba_bpe(path: str, vocabulary: str, num_threads: int) -> Callable[[], Any]:
    from cs336_numba_bpe.tokenizer import Tokenizer

    tokenizer = Tokenizer(*read_vocabulary(vocabulary), [END], folder=Path(vocabulary).parent)
    tokenizer.prepare(num_threads)
    return lambda: tokenizer.encode_to_array(path, num_threads=num_threads)


def gigatoken_tokenizer(vocabulary: str, num_threads: int) -> Any:
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    import awkward  # noqa: F401 - the library's batches need it, and would import it in their first pass
    import gigatoken

    return gigatoken.Tokenizer.from_json(hugging_face_tokenizer(vocabulary).to_str())


def flat(rows: Any) -> Any:
    """gigatoken's rows as one array; the text is one row, as only then its special tokens keep their ids."""
    import awkward
    import numpy as np

    return np.asarray(awkward.flatten(rows))


def encode_gigatoken(path: str, vocabulary: str, num_threads: int) -> Callable[[], Any]:
    """encode(): one thread, the text in memory."""
    tokenizer, content = gigatoken_tokenizer(vocabulary, num_threads), Path(path).read_bytes()
    return lambda: tokenizer.encode(content)


def encode_gigatoken_batch(path: str, vocabulary: str, num_threads: int) -> Callable[[], Any]:
    """encode_batch(): the text in memory."""
    tokenizer, content = gigatoken_tokenizer(vocabulary, num_threads), Path(path).read_bytes()
    return lambda: flat(tokenizer.encode_batch([content], parallel=num_threads > 1))


def encode_gigatoken_files(path: str, vocabulary: str, num_threads: int) -> Callable[[], Any]:
    """encode_files(): it reads the file itself."""
    import gigatoken

    tokenizer, source = gigatoken_tokenizer(vocabulary, num_threads), gigatoken.TextFileSource([path])
    return lambda: flat(tokenizer.encode_files(source, parallel=num_threads > 1))


def encode_tiktoken(path: str, vocabulary: str, num_threads: int) -> Callable[[], Any]:
    import numpy as np
    import tiktoken

    vocab, _ = read_vocabulary(vocabulary)
    ranks = {token: token_id for token_id, token in vocab.items() if token != END.encode()}
    encoding = tiktoken.Encoding("trained", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: 0})
    text = Path(path).read_bytes().decode()
    return lambda: np.array(encoding.encode(text, allowed_special="all"), np.uint32)


def encode_tokenizers(path: str, vocabulary: str, num_threads: int) -> Callable[[], Any]:
    """Hugging Face tokenizers; one long text runs on one thread."""
    import numpy as np

    tokenizer = hugging_face_tokenizer(vocabulary)
    text = Path(path).read_bytes().decode()
    return lambda: np.array(tokenizer.encode(text).ids, np.uint32)


def hugging_face_tokenizer(vocabulary: str) -> Any:
    import tokenizers

    vocab, merges = read_vocabulary(vocabulary)
    shown = {byte: character for character, byte in gpt2_characters().items()}
    text_of = {token: "".join(shown[byte] for byte in token) for token in vocab.values()} | {END.encode(): END}
    model = tokenizers.models.BPE(
        vocab={text_of[token]: token_id for token_id, token in vocab.items()},
        merges=[(text_of[left], text_of[right]) for left, right in merges],
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


ENCODERS: dict[str, Callable[[str, str, int], Callable[[], Any]]] = {
    "numba_bpe": encode_numba_bpe,
    "gigatoken": encode_gigatoken,
    "gigatoken_batch": encode_gigatoken_batch,
    "gigatoken_files": encode_gigatoken_files,
    "tiktoken": encode_tiktoken,
    "tokenizers": encode_tokenizers,
}


def version_of(peer: str) -> str:
    from importlib.metadata import version

    own = ("numba_bpe", "numba_bpe_smallest_ids", "heap_bpe", "reference")
    return version("cs336-registry" if peer in own else peer.partition("_")[0])


def main() -> None:
    task, peer, corpus, argument, out, *rest = sys.argv[1:]
    phases: Phases = {}
    if task == "train":
        merges = TRAINERS[peer](corpus, int(argument), phases)
        Path(out).write_text("".join(f"{left.hex()} {right.hex()}\n" for left, right in merges))
        print(json.dumps({"version": version_of(peer), "phases": phases, "merges": len(merges)}))
        return
    import numpy as np

    threads, passes = map(int, rest)
    encode = clock(phases, "load", lambda: ENCODERS[peer](corpus, argument, threads))
    ids = clock(phases, "first", encode)
    clock(phases, "write", lambda: ids.tofile(out))
    warm = []
    for _ in range(passes):
        clock(phases, "warm", encode)
        warm.append(phases["warm"])
    if warm:
        phases["warm"] = statistics.median(warm)
    ids.astype(np.uint32).tofile(out)
    print(json.dumps({"version": version_of(peer), "phases": phases, "ids": len(ids)}))


if __name__ == "__main__":
    main()
