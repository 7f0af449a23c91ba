"""`cs336 warmup`: compiling ahead."""

from __future__ import annotations


def warmup() -> int:
    """Compile what backends would otherwise compile while somebody waits.

    The object code is kept for this CPU and this version of the source; a second call has nothing to do. Example:
    `cs336 warmup`, in an image that others start from.
    """
    import cs336_registry as registry

    status = registry.backends()["numba_bpe"]
    if status.state != "ok":
        raise ValueError(f"numba_bpe is {status.state}: {status.reason}")
    from cs336_numba_bpe.compile_cache import default_cache_folder, is_warm
    from cs336_numba_bpe.compile_cache import warmup as compile_all
    from cs336_numba_bpe.kernel_list import GROUPS

    cold = [group for group in GROUPS if not is_warm((group,))]
    seconds = compile_all(announce=print)
    folder = default_cache_folder()
    if cold:
        print(f"numba_bpe: compiled {', '.join(cold)} in {seconds:.1f} s, kept in {folder}")
    else:
        print(f"numba_bpe: all {len(GROUPS)} groups of kernels were compiled already, in {folder} ({seconds:.1f} s)")
    return 0
