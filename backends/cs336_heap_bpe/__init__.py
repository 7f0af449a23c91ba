"""regex, processes and heapq: no compiler needed."""

from cs336_registry.plugin import Backend, Implementation, hookimpl


def _text(name: str, target: str, *features: str) -> Implementation:
    return Implementation(
        component=name,
        target=f"cs336_heap_bpe.{name}:{target}",
        deterministic=True,
        thread_safe=True,
        process_safe=True,
        features=features,
    )


@hookimpl
def cs336_backend() -> Backend:
    return Backend(
        name="heap_bpe",
        summary="regex, processes and heapq: no compiler needed",
        requires=("numpy", "regex"),
        cure="uv sync",
        implementations=(
            _text("pretoken_counter", "pretoken_counter"),
            _text("bpe_trainer", "bpe_trainer", "from_counts"),
            _text("tokenizer", "Tokenizer", "any_pattern", "partial_bytes"),
        ),
    )
