"""counting a corpus on a Ray cluster."""

from cs336_registry.plugin import Backend, Implementation, hookimpl


@hookimpl
def cs336_backend() -> Backend:
    return Backend(
        name="ray",
        summary="counting a corpus on a Ray cluster",
        requires=("ray", "numpy", "regex"),
        cure="pip install 'cs336-registry[ray]'",
        implementations=(
            Implementation(
                component="pretoken_counter",
                target="cs336_ray.pretoken_counter:pretoken_counter",
                deterministic=True,
            ),
        ),
    )
