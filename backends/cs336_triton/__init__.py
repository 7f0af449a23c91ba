"""Fused Triton kernels, forward and backward, on a GPU or in the interpreter on the CPU."""

from cs336_registry.plugin import Backend, Implementation, hookimpl

FLOATS = ("float32", "bfloat16", "float16")


def _op(name: str, *features: str, **claims) -> Implementation:
    target = claims.pop("target", name)
    claims = {"gradient": True, "compile": True, "deterministic": True, "process_safe": True} | claims
    return Implementation(
        component=name,
        target=f"cs336_triton.{name}:{target}",
        dtypes=FLOATS,
        devices=("cuda", "interpreter"),
        features=features,
        **claims,
    )


@hookimpl
def cs336_backend() -> Backend:
    return Backend(
        name="triton",
        summary="fused Triton kernels, forward and backward",
        requires=("torch", "triton"),
        cure="pip install triton (Linux)",
        environment=("CS336_TRITON_TUNE",),
        implementations=(
            _op("embedding"),
            _op("linear"),
            _op("rmsnorm"),
            _op("add_rmsnorm"),
            _op("silu"),
            _op("swiglu"),
            _op("rope"),
            _op("softmax"),
            _op("attention", "mask", "documents", "grouped_query", "value_dim", limits={"d_head": (1, 256)}),
            _op("cross_entropy"),
            _op("linear_cross_entropy"),
            _op("gradient_clipping", gradient=False, compile=False),
            _op("adamw", target="AdamW", gradient=False, compile=False),
        ),
    )


@hookimpl
def cs336_probe(machine) -> str | None:
    from .availability import probe

    return probe(machine)
