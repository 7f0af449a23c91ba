"""The textbook: every component in plain Python and PyTorch, one file each, readable beside the paper. Never fused."""

from cs336_registry.plugin import Backend, Implementation, hookimpl

FLOATS = ("float32", "bfloat16", "float16", "float64")
WIDE = ("float32", "float64")
TENSORS = ("cpu", "cuda")
FSDP = ("tied_weights", "unused_parameters", "frozen_weights", "compute_dtype")


def _text(name: str, target: str, *features: str) -> Implementation:
    return Implementation(
        component=name,
        target=f"cs336_reference.{name}:{target}",
        deterministic=True,
        thread_safe=True,
        process_safe=True,
        features=features,
    )


def _op(name: str, *features: str) -> Implementation:
    return Implementation(
        component=name,
        target=f"cs336_reference.{name}:{name}",
        dtypes=FLOATS,
        devices=TENSORS,
        gradient=True,
        compile=True,
        deterministic=True,
        thread_safe=True,
        process_safe=True,
        features=features,
        requires=("torch",),
    )


def _other(
    name: str, target: str = "", dtypes: tuple[str, ...] = FLOATS, features: tuple[str, ...] = ()
) -> Implementation:
    return Implementation(
        component=name,
        target=f"cs336_reference.{name}:{target or name}",
        dtypes=dtypes,
        devices=TENSORS,
        deterministic=True,
        features=features,
        requires=("torch",),
    )


@hookimpl
def cs336_backend() -> Backend:
    return Backend(
        name="reference",
        summary="the textbook in plain Python and PyTorch",
        cure="uv sync",
        implementations=(
            _text("pretoken_counter", "pretoken_counter"),
            _text("bpe_trainer", "bpe_trainer", "from_counts"),
            _text("tokenizer", "Tokenizer", "any_pattern", "partial_bytes"),
            _other("get_batch", dtypes=()),
            _op("embedding"),
            _op("linear"),
            _op("rmsnorm"),
            _op("add_rmsnorm"),
            _op("silu"),
            _op("swiglu"),
            _op("rope"),
            _op("softmax"),
            _op("attention", "mask", "documents", "grouped_query", "value_dim"),
            _op("cross_entropy"),
            _op("linear_cross_entropy"),
            _other("gradient_clipping"),
            _other("adamw", "AdamW"),
            _other("lr_cosine_schedule", dtypes=()),
            _other("save_checkpoint", dtypes=()),
            _other("load_checkpoint", dtypes=()),
            _other("generate", dtypes=()),
            _other("ddp", "DistributedDataParallel", WIDE, ("unused_parameters",)),
            _other("fsdp", "FullyShardedDataParallel", ("float32",), FSDP),
            _other("sharded_optimizer", "ShardedOptimizer", WIDE, ("state_of_own_parameters",)),
        ),
    )
