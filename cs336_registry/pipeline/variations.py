"""The runs of a sweep: every combination of the values that are varied, as settings of a configuration.

    variations("quickstart", ["optimizer.lr=1e-4,1e-3", "model.norm=rms,none"], [])   # four of them

What a comparison needs to be fair goes with a value: another feed-forward network gets as many parameters, and, where
it is asked for, another batch size as many tokens.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from ..errors import ConfigurationError
from .configuration import Configuration, load


@dataclass(frozen=True)
class Variation:
    """One run. values: (key, value) as typed; added: settings that keep the comparison fair."""

    name: str
    values: tuple[tuple[str, str], ...]
    added: tuple[str, ...]

    @property
    def settings(self) -> list[str]:
        return [*(f"{key}={value}" for key, value in self.values), *self.added]


def variations(
    source: str, vary: Sequence[str], settings: Sequence[str], *, same_tokens: bool = False
) -> list[Variation]:
    """Every combination of `vary` ("section.key=value,value,…") around the configuration `source` with `settings`.

    Raises ConfigurationError for a key or value that a configuration does not take, before anything is trained.
    """
    if not vary:
        raise ConfigurationError(
            "nothing is varied: pass --vary section.key=value,value, such as optimizer.lr=1e-4,1e-3"
        )
    axes = [_axis(text) for text in vary]
    keys = [key for key, _ in axes]
    if len({*keys}) < len(keys):
        raise ConfigurationError(f"a key is varied twice ({', '.join(keys)}): list all its values in one --vary")
    base = load(source, settings)
    found = []
    for chosen in product(*([(key, value) for value in values] for key, values in axes)):
        name = "_".join(f"{_short(key, keys)}={_file_name(value)}" for key, value in chosen)
        added = [*_matched(base, dict(chosen)), *(_same_tokens(base, dict(chosen)) if same_tokens else ())]
        one = Variation(name, chosen, tuple(added))
        load(source, [*settings, *one.settings])
        found.append(one)
    names = [one.name for one in found]
    if len({*names}) < len(names):
        raise ConfigurationError(f"two variations have one name ({', '.join(names)}): leave out values that are equal")
    return found


def feed_forward_width(d_ff: int, before: str, after: str) -> int:
    """The inner width that gives a feed-forward network of kind `after` as many parameters as one of kind `before`.

    swiglu has three matrices of d_model · d_ff, silu two: rounding leaves a difference of at most d_model parameters a
    layer (one part in 3 d_ff) on the way to silu, and of 3/2 d_model on the way back.
    """
    matrices = {"swiglu": 3, "silu": 2}
    return max(1, round(d_ff * matrices[before] / matrices[after]))


def at_equal_tokens(configuration: Configuration, batch_size: int) -> tuple[str, ...]:
    """Settings for another batch size with as many tokens; intervals shrink or grow with the number of steps."""
    training = configuration.training
    steps = max(1, training.steps * training.batch_size // batch_size)
    factor = steps / training.steps
    return (
        f"training.batch_size={batch_size}",
        f"training.steps={steps}",
        f"schedule.warmup_steps={min(round(configuration.schedule.warmup_steps * factor), steps - 1)}",
        f"evaluation.every={max(1, round(configuration.evaluation.every * factor))}",
        f"checkpoint.every={max(1, round(configuration.checkpoint.every * factor))}",
        "training.gradient_accumulation=1",
    )


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, listed = text.partition("=")
    key, listed = key.strip(), listed.strip()
    if not equals or not key or not listed:
        raise ConfigurationError(
            f"can't read --vary {text!r}: write section.key=value,value, such as model.norm=rms,none"
        )
    try:
        values = [_text(value) for value in tomllib.loads(f"values = [{listed}]")["values"]]
    except tomllib.TOMLDecodeError:
        # Bare words, such as rms,none,post.
        values = [value.strip() for value in listed.split(",")]
    if len(values) < 2 or not all(values):
        raise ConfigurationError(f"--vary {text!r} needs two values or more, separated by commas")
    return key, values


def _text(value: object) -> str:
    """A value as --set takes it."""
    if isinstance(value, float):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value)


def _file_name(value: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", value).strip("-")


def _short(key: str, keys: Sequence[str]) -> str:
    """The key without its section, where that is clear."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _matched(base: Configuration, chosen: dict[str, str]) -> tuple[str, ...]:
    after = chosen.get("model.ffn", base.model.ffn)
    if after == base.model.ffn or "model.d_ff" in chosen or after not in ("swiglu", "silu"):
        return ()
    return (f"model.d_ff={feed_forward_width(base.model.d_ff, base.model.ffn, after)}",)


def _same_tokens(base: Configuration, chosen: dict[str, str]) -> tuple[str, ...]:
    size = chosen.get("training.batch_size", "")
    if not size.isdecimal() or not int(size) or "training.steps" in chosen:
        return ()
    return tuple(one for one in at_equal_tokens(base, int(size)) if not one.startswith("training.batch_size"))
