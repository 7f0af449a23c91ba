"""PyTorch's own fused operators behind the same contracts."""

from cs336_registry.plugin import Backend, Implementation, hookimpl

FLOATS = ("float32", "bfloat16", "float16", "float64")
WIDE = ("float32", "float64")
FSDP = ("tied_weights", "unused_parameters", "frozen_weights", "compute_dtype")


def _op(name: str, *features: str, **claims) -> Implementation:
    safe = {"deterministic": True, "thread_safe": True, "process_safe": True}
    claims = {"gradient": True, "compile": True, "dtypes": FLOATS, **safe} | claims
    target = claims.pop("target", name)
    return Implementation(
        component=name,
        target=f"cs336_torch.{name}:{target}",
        devices=("cpu", "cuda"),
        features=features,
        **claims,
    )


def _other(name: str, target: str = "", dtypes: tuple[str, ...] = (), features: tuple[str, ...] = ()) -> Implementation:
    claims = {"gradient": False, "compile": False, "thread_safe": False, "process_safe": False}
    return _op(name, *features, target=target or name, dtypes=dtypes, **claims)


@hookimpl
def cs336_backend() -> Backend:
    return Backend(
        name="torch",
        summary="PyTorch's own fused operators",
        requires=("torch",),
        cure="pip install torch",
        implementations=(
            _other("get_batch"),
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
            _other("gradient_clipping", dtypes=FLOATS),
            # PyTorch keeps its moments in the parameters' dtype, where the contract wants float32.
            _other("adamw", "AdamW", WIDE),
            _other("lr_cosine_schedule"),
            _other("save_checkpoint"),
            _other("load_checkpoint"),
            _other("generate"),
            _other("ddp", "DistributedDataParallel", WIDE),
            _other("fsdp", "FullyShardedDataParallel", ("float32",), FSDP),
            _other("sharded_optimizer", "ShardedOptimizer", WIDE, ("state_of_own_parameters",)),
        ),
    )
