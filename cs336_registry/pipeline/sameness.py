"""Whether a checkpoint may be continued: only by the same configuration, code and tokenizer."""

from __future__ import annotations

from .checkpoints import State
from .configuration import Configuration, differences
from .errors import MismatchError
from .resolved import Resolved
from .run_folder import RunFolder
from .tokenization import RunTokenizer


def check_same_run(
    state: State, configuration: Configuration, components: Resolved, tokenizer: RunTokenizer, folder: RunFolder
) -> None:
    """Raise MismatchError, naming every difference, where going on would be neither the old run nor a new one."""
    changed = [
        f"{key} was {before!r}, is now {now!r}"
        for key, before, now in differences(state["configuration"], configuration.to_dict())
        # Which code a selector stands for is what counts, and that is compared below.
        if key not in ("backend", "text_backend")
    ]
    if changed:
        raise MismatchError(
            f"{folder.path} is a run of another configuration ({'; '.join(changed)}): set it back, or choose another "
            f"--out"
        )
    if state["tokenizer"] != tokenizer.fingerprint:
        raise MismatchError(
            f"{folder.path} was trained with tokenizer {state['tokenizer']}, this is {tokenizer.fingerprint}: put the "
            f"old tokenizer back, or choose another --out"
        )
    now = components.fingerprints
    changed = [
        f"{name} was served by {old}, would be by {now.get(name)}"
        for name, old in state["components"].items()
        if now.get(name) != old
    ]
    if changed:
        raise MismatchError(
            f"{folder.path} was trained by other code ({'; '.join(changed)}): choose the old backends with --backend, "
            f"or another --out"
        )
