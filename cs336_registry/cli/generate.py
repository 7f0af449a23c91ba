"""`cs336 generate`: text from a trained model."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | dict.fromkeys(
    (0x7F, *range(0x80, 0xA0)), "�"
)
"""A model may write anything; in a terminal, control characters are shown instead of obeyed."""


def generate(
    run: Path,
    /,
    *,
    prompt: Annotated[Sequence[str], Parameter(negative=())] = ("",),
    samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    stop: Annotated[Sequence[str], Parameter(negative=())] = (),
    seed: int = 0,
    checkpoint: str = "last",
    backend: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    cache: bool = True,
    json: bool = False,
    quiet: bool = False,
) -> int:
    """Let a trained model write, streamed token by token.

    The texts go to standard output, the speed to standard error. Beyond the context length the model sees its last
    window of tokens, and each token costs a whole window.

    Example: `cs336 generate runs/quickstart --prompt "def main" --temperature 0.7`.

    Parameters
    ----------
    run
        The folder of a run.
    prompt
        Text to continue; may be given several times. Without it, a new document is begun.
    samples
        Continuations of each prompt, computed as one batch.
    max_new_tokens
        The most tokens to write; the end-of-text token ends a text earlier.
    temperature
        0 takes the most probable token always, 1 samples as the model says.
    top_k
        Choose among the k most probable tokens only.
    top_p
        Choose among the most probable tokens that together have this share.
    stop
        A single token's text that ends a continuation; may be given several times.
    seed
        The same seed gives the same texts.
    checkpoint
        last, best, or the number of a step.
    backend
        A selector for the model's components, such as "torch".
    device
        cpu, cuda, or whichever is there.
    cache
        --no-cache computes the whole window for every token; the texts are the same.
    json
        Print one JSON object a text instead.
    quiet
        Print the texts alone.
    """
    from ..pipeline.completion import complete
    from ..pipeline.decoding import Sampling, Speed
    from ..pipeline.trained import load

    trained = load(run, checkpoint=checkpoint, backend=backend, device=device)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    sampling.check()
    speed = Speed()
    several = samples > 1 or len(prompt) > 1
    streaming = samples == 1 and not json
    if isinstance(sys.stdout, TextIOWrapper):
        # A terminal that knows no UTF-8 gets a question mark, not an error in the middle of a text.
        sys.stdout.reconfigure(errors="replace")
    batches = complete(
        trained,
        prompt,
        sampling,
        samples=samples,
        stop=stop,
        use_cache=cache,
        watch=_show if streaming else None,
        speed=speed,
    )
    for text in prompt:
        if streaming:
            _show((_heading(text, 0) if several else "") + text)
        for one in next(batches):
            if json:
                print(json_module.dumps(one.to_dict(), ensure_ascii=False), flush=True)
            elif not streaming:
                _show(_heading(text, one.sample) + text + one.text + "\n")
        if streaming:
            _show("\n")
    if not quiet:
        print(speed, file=sys.stderr)
    return 0


def _heading(prompt: str, sample: int) -> str:
    return f"--- {prompt!r}, sample {sample + 1} ---\n"


def _show(text: str) -> None:
    print(text.translate(CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)
