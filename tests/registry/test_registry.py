"""The registry as a script uses it: get, use, operations, explain, layers, environment, project file, threads."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch

import cs336_registry as registry
from cs336_registry.errors import (
    ConfigurationError,
    ContractError,
    FallbackWarning,
    SelectorError,
    TracingError,
    UnavailableError,
    UnknownNameError,
)
from cs336_registry.plugin import Implementation, hookimpl

from .conftest import FakeEntryPoint, backend_module, module_with


def rmsnorm_of(name: str):
    def rmsnorm(x, weight, eps=1e-5):
        return name

    return rmsnorm


@pytest.fixture
def two_backends(install, made_up_module):
    """Backends `alpha` (rmsnorm, silu) and `beta` (rmsnorm), whose functions say who they are."""
    made_up_module(alpha=rmsnorm_of("alpha"), beta=rmsnorm_of("beta"), silu=lambda x: "alpha")
    install(
        FakeEntryPoint(
            "alpha",
            backend_module(
                "alpha",
                Implementation(component="rmsnorm", target="made_up_backend:alpha"),
                Implementation(component="silu", target="made_up_backend:silu"),
            ),
        ),
        FakeEntryPoint(
            "beta", backend_module("beta", Implementation(component="rmsnorm", target="made_up_backend:beta"))
        ),
    )


def served_by(**options) -> str:
    found = registry.get("rmsnorm", **options)
    return found(None, None) if found.__module__ == __name__ else "reference"


def test_get_hands_out_the_function_itself(two_backends):
    import made_up_backend

    assert registry.get("rmsnorm", backend="alpha") is made_up_backend.alpha
    assert registry.get("rmsnorm", backend="alpha") is registry.get("rmsnorm", backend="alpha!")


def test_the_layers_in_their_order(two_backends, monkeypatch, tmp_path):
    assert served_by() == "reference"
    (tmp_path / "pyproject.toml").write_text('[tool.cs336]\nbackend = "alpha"\n')
    registry.refresh()
    assert served_by() == "alpha"
    monkeypatch.setenv("CS336_BACKEND", "beta")
    assert served_by() == "beta", "the environment goes before the project, and is read when resolving"
    registry.set_command_line("alpha")
    assert served_by() == "alpha"
    with registry.use("beta"):
        assert served_by() == "beta"
        with registry.use("rmsnorm=alpha"):
            assert served_by() == "alpha"
            assert served_by(backend="beta") == "beta"
        assert served_by() == "beta"
    assert served_by() == "alpha"
    monkeypatch.setenv("CS336_BACKEND", "")
    registry.set_command_line(None)
    assert served_by() == "alpha", "an empty variable is an unset one"


def test_the_project_file_is_found_from_a_folder_below(two_backends, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[tool.cs336]\nbackend = "alpha"\n')
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    registry.refresh()
    assert served_by() == "alpha"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[tool.cs336]\nbakend = "alpha"', "unknown key 'bakend' .*did you mean 'backend'"),
        ("[tool.cs336]\nbackend = 3", "backend = 3 .*expected a str"),
        ("[tool.cs336", "can't be read"),
    ],
)
def test_a_wrong_project_file_is_an_error(tmp_path, text, message):
    (tmp_path / "pyproject.toml").write_text(text)
    registry.refresh()
    with pytest.raises(ConfigurationError, match=message):
        registry.resolve("rmsnorm")


def test_an_unknown_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("CS336_BAKEND", "torch")
    with pytest.raises(ConfigurationError, match="CS336_BAKEND: did you mean 'CS336_BACKEND'"):
        registry.resolve("rmsnorm")


def test_wrong_names_are_errors_at_once(monkeypatch):
    with pytest.raises(UnknownNameError, match="unknown component 'rmsnrom': did you mean 'rmsnorm'"):
        registry.get("rmsnrom")
    with pytest.raises(UnknownNameError, match="did you mean 'reference'"), registry.use("referense"):
        pass
    with pytest.raises(SelectorError), registry.use(""):
        pass
    with pytest.raises(UnknownNameError, match=r"backend \(from --backend\) 'none'"):
        registry.set_command_line("none")
    monkeypatch.setenv("CS336_BACKEND", "nonesuch")
    with pytest.raises(UnknownNameError, match=r"backend \(from CS336_BACKEND\) 'nonesuch'"):
        registry.get("rmsnorm")


def test_a_preference_that_is_not_met_warns_once_with_the_cure(two_backends):
    with pytest.warns(
        FallbackWarning, match=r"softmax: beta was preferred \(it does not provide softmax\).*'softmax=beta'"
    ):
        registry.get("softmax", backend="beta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.get("softmax", backend="beta")
        with registry.use("beta"):
            registry.get("softmax")


def test_a_demand_that_is_not_met_raises(two_backends):
    with pytest.raises(UnavailableError, match="'beta' was demanded for 'softmax'"):
        registry.get("softmax", backend="beta!")


def test_blocking_by_name(two_backends, monkeypatch, tmp_path):
    monkeypatch.setenv("CS336_BLOCK", "alpha")
    (tmp_path / "pyproject.toml").write_text('[tool.cs336]\nblock = ["beta"]\n')
    registry.refresh()
    assert {name: registry.backends()[name].state for name in ("alpha", "beta")} == {
        "alpha": "blocked",
        "beta": "blocked",
    }
    with pytest.raises(UnavailableError, match="blocked: blocked by name"):
        registry.get("rmsnorm", backend="alpha!")


def test_installing_a_backend_changes_nothing(two_backends):
    assert registry.resolve("rmsnorm").backend == "reference"
    assert registry.get("rmsnorm").__module__ == "cs336_reference.rmsnorm"


def test_a_broken_plugin_changes_nothing_but_its_row(install):
    before = dict(registry.backends())
    install(FakeEntryPoint("bad", RuntimeError("boom")))
    after = dict(registry.backends())
    assert after.pop("bad").state == "broken"
    assert {name: status.state for name, status in after.items()} == {
        name: status.state for name, status in before.items()
    }
    assert registry.get("silu")(torch.zeros(1)) == 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, eps=1e-5: x, "parameter 'weight' is missing"),
        (lambda x, weight, eps=1e-6: x, "parameter 'eps' has default 1e-06, the contract's is 1e-05"),
        (lambda x, weight, eps: x, "parameter 'eps' has no default"),
        (lambda weight, x, eps=1e-5: x, r"positional parameters are \['weight', 'x', 'eps'\]"),
        (lambda x, weight, eps=1e-5, fast=True: x, "parameter 'fast' is not in the contract and is not keyword-only"),
        (lambda x, weight, eps=1e-5, *, fast: x, "parameter 'fast' is not in the contract and has no default"),
        (lambda x, /, weight, eps=1e-5: x, "parameter 'x' is positional-only"),
    ],
)
def test_a_wrong_signature_is_refused(install, made_up_module, function, reason):
    made_up_module(rmsnorm=function)
    implementation = Implementation(component="rmsnorm", target="made_up_backend:rmsnorm")
    install(FakeEntryPoint("mine", backend_module("mine", implementation)))
    with pytest.raises(ContractError, match=reason):
        registry.get("rmsnorm", backend="mine!")
    with pytest.warns(FallbackWarning, match="broken: ContractError"):
        assert registry.get("rmsnorm", backend="mine").__module__ == "cs336_reference.rmsnorm"


def test_extra_keywords_with_defaults_are_allowed(install, made_up_module):
    made_up_module(rmsnorm=lambda x, weight, eps=1e-5, *, fast=True: "extra")
    implementation = Implementation(component="rmsnorm", target="made_up_backend:rmsnorm")
    install(FakeEntryPoint("mine", backend_module("mine", implementation)))
    assert registry.get("rmsnorm", backend="mine!")(None, None) == "extra"


def test_an_implementation_that_does_not_import(install):
    implementation = Implementation(component="rmsnorm", target="no_such_module_here:rmsnorm")
    install(FakeEntryPoint("mine", backend_module("mine", implementation)))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        registry.get("rmsnorm", backend="mine!")
    with pytest.warns(FallbackWarning, match="broken: ModuleNotFoundError"):
        registry.get("rmsnorm", backend="mine")


def test_every_decision_is_told_to_the_watchers_once(install, two_backends):
    seen = []

    @hookimpl
    def cs336_decision(decision):
        seen.append((decision.component, decision.backend))

    install(FakeEntryPoint("watcher", module_with(cs336_decision=cs336_decision)))
    registry.get("rmsnorm")
    registry.get("rmsnorm")
    with registry.use("torch"):
        registry.get("rmsnorm")
    assert seen == [("rmsnorm", "reference"), ("rmsnorm", "torch")]


def test_dtype_and_device_may_be_torch_objects():
    assert registry.resolve("rmsnorm", dtype=torch.bfloat16, device=torch.device("cpu")).backend == "reference"
    assert registry.get("rmsnorm", dtype=torch.bfloat16) is registry.get("rmsnorm", dtype="bfloat16")


def test_a_composite_comes_with_its_parts(two_backends):
    block = registry.get("transformer_block", backend="rmsnorm=alpha")
    import made_up_backend

    assert block.keywords["ops"]["rmsnorm"] is made_up_backend.alpha
    assert block.keywords["ops"]["silu" if "silu" in block.keywords["ops"] else "attention"]
    decision = registry.resolve("transformer_block", backend="rmsnorm=alpha")
    assert decision.backend == "composed"
    assert {part.component: part.backend for part in decision.parts}["rmsnorm"] == "alpha"


def test_explain_names_layers_reasons_and_the_machine(two_backends, monkeypatch):
    monkeypatch.setenv("CS336_BACKEND", "beta")
    text = registry.explain("softmax", device="cuda")
    assert "softmax: reference (serves instead, decided by default)" in text
    assert "not beta: it does not provide softmax" in text
    assert "CS336_BACKEND: beta" in text
    assert "an error would be raised" in registry.explain("softmax", backend="beta!")


def test_operations_are_immutable():
    operations = registry.operations(["silu", "softmax"])
    with pytest.raises(TypeError):
        operations["silu"] = None


def test_threads_see_their_own_use(two_backends):
    barrier, seen = threading.Barrier(2), {}

    def work(name: str) -> None:
        with registry.use(name):
            barrier.wait()
            seen[name] = served_by()
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("alpha", "beta")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"alpha": "alpha", "beta": "beta"}
    assert served_by() == "reference"


def test_the_first_load_happens_once_however_many_threads_ask(install, monkeypatch):
    loads = []
    entry = FakeEntryPoint("mine", backend_module("mine"))

    class Slow(FakeEntryPoint):
        def load(self):
            loads.append(threading.get_ident())
            time.sleep(0.05)
            return entry.found

    install(Slow("mine", None))
    found = []
    threads = [threading.Thread(target=lambda: found.append(registry.backends())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert all(one is found[0] for one in found)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_get_while_compiling_is_a_clear_error(fullgraph):
    def step(x):
        return registry.get("silu")(x)

    registry.get("silu")
    compiled = torch.compile(step, backend="eager", fullgraph=fullgraph)
    with pytest.raises(RuntimeError, match=r"TracingError: registry.get was called while torch.compile traces"):
        compiled(torch.randn(2))
    torch.compiler.reset()


def test_get_while_something_else_traces_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(TracingError, match=r"registry.get\('silu'\)"):
        registry.get("silu")


def test_resolve_knows_what_get_could_not_load(install):
    implementation = Implementation(component="rmsnorm", target="no_such_module_here:rmsnorm")
    install(FakeEntryPoint("mine", backend_module("mine", implementation)))
    assert registry.resolve("rmsnorm", backend="mine").backend == "mine"
    with pytest.warns(FallbackWarning, match="broken: ModuleNotFoundError"):
        registry.get("rmsnorm", backend="mine")
    decision = registry.resolve("rmsnorm", backend="mine")
    assert (decision.backend, decision.preferred) == ("reference", "mine")


def test_a_part_that_does_not_load_is_passed_over(install):
    implementation = Implementation(component="rmsnorm", target="no_such_module_here:rmsnorm")
    install(FakeEntryPoint("mine", backend_module("mine", implementation)))
    with pytest.warns(FallbackWarning, match="rmsnorm: mine was preferred"):
        block = registry.get("transformer_block", backend="rmsnorm=mine?")
    assert block.keywords["ops"]["rmsnorm"].__module__ == "cs336_reference.rmsnorm"
