"""The suite that any backend is judged by: `pytest --pyargs cs336_registry.conformance --cs336-backend=NAME`."""

from __future__ import annotations

from cs336_registry.conformance.judge import judge, parameters


def pytest_generate_tests(metafunc):
    parameters(metafunc)


def test_signature(request, backend, check, tmp_path):
    """The callable takes the contract's parameters."""
    judge(request, backend, check, tmp_path)


def test_case(request, backend, check, tmp_path):
    """The result agrees with the oracle."""
    judge(request, backend, check, tmp_path)


def test_gradient(request, backend, check, tmp_path):
    """The gradients agree with the oracle's, whichever of them are wanted."""
    judge(request, backend, check, tmp_path)


def test_error(request, backend, check, tmp_path):
    """Bad arguments are refused with the contract's words."""
    judge(request, backend, check, tmp_path)


def test_law(request, backend, check, tmp_path):
    """A property of every correct implementation holds."""
    judge(request, backend, check, tmp_path)


def test_layout(request, backend, check, tmp_path):
    """Strides do not matter, in the arguments and in the upstream gradients."""
    judge(request, backend, check, tmp_path)


def test_poison(request, backend, check, tmp_path):
    """Nothing is left of uninitialised memory."""
    judge(request, backend, check, tmp_path)


def test_mutation(request, backend, check, tmp_path):
    """Arguments and upstream gradients come back as they were."""
    judge(request, backend, check, tmp_path)


def test_again(request, backend, check, tmp_path):
    """A second call does not remember the first."""
    judge(request, backend, check, tmp_path)


def test_repeat(request, backend, check, tmp_path):
    """The same arguments give the same bits."""
    judge(request, backend, check, tmp_path)


def test_threads(request, backend, check, tmp_path):
    """Several threads may call at once."""
    judge(request, backend, check, tmp_path)


def test_processes(request, backend, check, tmp_path):
    """Several processes may call at once."""
    judge(request, backend, check, tmp_path)
