"""The `cs336` command.

The overview is printed from the table below, and only the module of the command that was typed is imported: `cs336
--help` answers at once, and no command pays for another's libraries. cyclopts parses a command's own arguments and
writes its help.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Start here": {
        "quickstart": (
            "quickstart:quickstart",
            "From real text to a trained model and an HTML report, in under three minutes.",
        ),
    },
    "Train": {
        "train": ("train:train", "Train as a configuration says, and continue after any interruption."),
        "sweep": (
            "sweep:sweep",
            "Train every combination of the values that are varied, and compare them on one page.",
        ),
        "resume-check": (
            "resume_check:resume_check",
            "Prove that a run killed at random steps ends with the losses and weights of one left alone.",
        ),
        "report": ("report:report", "Draw one run, or several side by side, as one self-contained HTML page."),
        "generate": ("generate:generate", "Let a trained model write, streamed token by token."),
        "export": (
            "export:export",
            "Write a trained model as a Hugging Face Llama folder, proven by comparing logits.",
        ),
        "import": ("import_:import_", "Make a run of a Hugging Face Llama folder, proven by comparing logits."),
        "handout": (
            "handout:handout",
            "Make the course's deliverables that fit this machine, on one page, each with its command.",
        ),
        "doctor": ("doctor:doctor", "Hold this machine against a configuration and say what to do."),
    },
    "Data": {
        "data download": (
            "data:download",
            "Fetch a corpus: tinystories, owt, or a recipe of your own; continued where it was cut off, and checked.",
        ),
        "data encode": ("tokenizer:encode", "Write the token ids of text to a file that can be memory-mapped."),
    },
    "Tokenizers": {
        "tokenizer train": ("tokenizer:train", "Learn a byte-pair vocabulary from text, or from counts."),
        "tokenizer encode": ("tokenizer:encode", "Write the token ids of text to a file that can be memory-mapped."),
        "tokenizer decode": ("tokenizer:decode", "Write the text of token ids."),
        "tokenizer inspect": (
            "tokenizer:inspect",
            "Show what a tokenizer learnt, how well it packs text, and how fast it is.",
        ),
        "tokenizer export": (
            "tokenizer:export",
            "Write a tokenizer for other libraries, each result held against that library.",
        ),
        "tokenizer import": ("tokenizer:import_", "Take over a tokenizer from another library's files."),
        "counts build": (
            "counts:build",
            "Count the pretokens of text files, for merging and for cs336 tokenizer train --from-counts.",
        ),
        "counts merge": ("counts:merge", "Add up files of counts into one, in bounded memory."),
        "warmup": ("warmup:warmup", "Compile what backends would otherwise compile while somebody waits."),
    },
    "The registry": {
        "backends": ("backends:backends", "Show which backend provides which component, and why one is not available."),
        "components": ("components:components", "List the components, or show the contract of one."),
        "explain": (
            "explain:explain",
            "Say which backend would serve a component, who decided it, and why not another.",
        ),
    },
    "Proof and speed": {
        "conformance": (
            "conformance:conformance",
            "Judge backends by the contracts of what they claim: cases, gradients, laws, errors, layouts, determinism.",
        ),
        "mutants": (
            "conformance:mutants",
            "Judge the kit itself: every wrong backend of a shipped set must be caught, and by which check.",
        ),
        "matrix": (
            "conformance:matrix",
            "Show what each backend claims and what was proven of it, from the committed rows, with its speed.",
        ),
        "new": (
            "new:new",
            "Write a working plugin distribution: one component, its conformance test and its benchmark.",
        ),
        "bisect": ("bisect:bisect", "Find the one component whose swap from a good to a bad backend breaks a command."),
        "bench": (
            "bench:bench",
            "Time components on several backends, each judged for correctness before it is timed.",
        ),
        "bench report": ("bench:report", "Draw every committed result row into one self-contained HTML page."),
        "bench tables": (
            "bench:tables",
            "Render the tables in README.md from the result rows, or check that they are fresh.",
        ),
    },
}
"""Group -> command -> (module:function in this package, one line that equals the function's docstring's first)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `cs336` with `arguments` (default: the command line's) and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words[:1]
    words = words[1:] if debug else words
    from ..errors import RegistryError

    try:
        with _fallbacks_in_a_line():
            sys.exit(_answer(words))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (`cs336 ... | head`) went away; there is nobody to tell.
        sys.stderr.close()
        sys.exit(141)
    except (
        RegistryError,
        ValueError,
        OSError,
        MemoryError,
        OverflowError,
        ModuleNotFoundError,
        NotImplementedError,
    ) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _fallbacks_in_a_line() -> Iterator[None]:
    """A fallback is told without the line of ours that asked for the component: it is no error in there."""
    from ..errors import FallbackWarning

    as_python_does = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *where: Any) -> str:
        is_fallback = issubclass(category, FallbackWarning)
        return f"warning: {message}\n" if is_fallback else as_python_does(message, category, *where)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = as_python_does


def _answer(words: Sequence[str]) -> int:
    if not words or words[0] in ("--help", "-h"):
        return _print(overview())
    if words[0] == "--version":
        from importlib.metadata import version

        return _print(f"cs336-registry {version('cs336-registry')}")
    name = _find(words)
    return _unknown(words) if name is None else _run(name, words[len(name.split()) :])


def commands() -> dict[str, tuple[str, str]]:
    """Every command, by its words: "tokenizer train" -> (module:function, one line)."""
    return {name: entry for group in COMMANDS.values() for name, entry in group.items()}


def overview(prefix: str = "") -> str:
    """The help page of `cs336`, or of one family of commands such as `cs336 tokenizer`."""
    lines = [f"Usage: cs336 {prefix + ' ' if prefix else ''}COMMAND [OPTIONS]", ""]
    if not prefix:
        lines += ["Train, measure and compare the parts of small language models, on interchangeable backends.", ""]
    width = max(len(name) for name in commands()) + 2
    for group, entries in COMMANDS.items():
        rows = [f"  {name:<{width}}{line}" for name, (_, line) in entries.items() if name.startswith(prefix)]
        lines += [f"{group}:", *rows, ""] if rows else []
    lines.append("cs336 COMMAND --help shows a command's options and examples; cs336 --debug COMMAND shows tracebacks.")
    return "\n".join(lines)


def load(name: str) -> Callable[..., Any]:
    """The function behind a command."""
    from importlib import import_module

    module, _, function = commands()[name][0].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), function)


def _find(words: Sequence[str]) -> str | None:
    """The command that `words` begin with, the longest first."""
    known = commands()
    return next((name for length in (2, 1) if (name := " ".join(words[:length])) in known), None)


def _run(name: str, arguments: Sequence[str]) -> int:
    import cyclopts

    app = cyclopts.App(name=f"cs336 {name}", help_format="markdown", version_flags=[])
    app.default(load(name))
    app["--help"].show = False
    # cyclopts takes a lone hyphen, which stands for standard input, for an option.
    words = ["./-" if word == "-" else word for word in arguments]
    result = app(words, result_action="return_value", exit_on_error=True)
    return result if isinstance(result, int) else 0


def _unknown(words: Sequence[str]) -> int:
    family = words[0]
    if any(name.startswith(f"{family} ") for name in commands()):
        if words[1:2] in ([], ["--help"], ["-h"]):
            return _print(overview(family))
        family = " ".join(words[:2])
    from ..errors import suggestion

    print(f"error: unknown command {family!r}: {suggestion(family, commands())}", file=sys.stderr)
    return 2


def _print(text: str) -> int:
    print(text)
    return 0
