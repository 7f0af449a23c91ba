"""Plugins are found one by one: a bad one is a row with a sentence, and nothing else changes."""

from __future__ import annotations

import pytest

from cs336_registry.plugin import Backend, Implementation, discover, hookimpl

from .conftest import PLAIN, FakeEntryPoint, backend_module, module_with

RMSNORM = Implementation(component="rmsnorm", target="somewhere:rmsnorm")


def found(*entries, blocked=(), machine=PLAIN):
    return discover(machine, blocked, entries)


def only(*entries, **options):
    return found(*entries, **options).plugins[entries[0].name]


def test_a_good_plugin_is_ok():
    status = only(FakeEntryPoint("mine", backend_module("mine", RMSNORM), distribution="mine-dist"))
    assert (status.state, status.distribution, status.version) == ("ok", "mine-dist", "1.0")
    assert status.backend.implementation("rmsnorm") == RMSNORM


@pytest.mark.parametrize("error", [ImportError("no module named x"), RuntimeError("boom"), ValueError("bad")])
def test_a_plugin_whose_import_raises_is_broken_and_the_others_work(error):
    discovery = found(FakeEntryPoint("bad", error), FakeEntryPoint("good", backend_module("good", RMSNORM)))
    assert discovery.plugins["bad"].state == "broken"
    assert str(error) in discovery.plugins["bad"].reason
    assert type(error).__name__ in discovery.plugins["bad"].traceback
    assert discovery.plugins["good"].state == "ok"
    assert discovery.manager.get_plugin("bad") is None


def test_a_missing_package_is_unavailable_with_its_cure():
    module = backend_module("mine", RMSNORM, requires=("no_such_package_at_all",), cure="pip install mine[all]")
    status = only(FakeEntryPoint("mine", module))
    assert (status.state, status.reason) == (
        "unavailable",
        "no_such_package_at_all is not installed; pip install mine[all]",
    )
    assert status.backend is not None, "the grid still shows what it would provide"


def test_a_probes_sentence_makes_it_unavailable():
    status = only(FakeEntryPoint("mine", backend_module("mine", RMSNORM, probe="no card; buy one")))
    assert (status.state, status.reason) == ("unavailable", "no card; buy one")


def test_a_probe_that_raises_is_broken():
    @hookimpl
    def cs336_probe(machine):
        raise OSError("the driver hangs")

    module = backend_module("mine", RMSNORM)
    module.cs336_probe = cs336_probe
    status = only(FakeEntryPoint("mine", module))
    assert status.state == "broken"
    assert "the driver hangs" in status.reason


def test_a_blocked_plugin_is_not_imported():
    status = only(FakeEntryPoint("mine", RuntimeError("was imported")), blocked=("mine",))
    assert (status.state, status.reason) == ("blocked", "blocked by name")
    assert found(blocked=("absent",)).plugins["absent"].reason == "blocked by name; not installed"


def test_a_misspelt_hook_is_refused_with_its_name():
    @hookimpl
    def cs336_bakcend():
        return None

    discovery = found(FakeEntryPoint("mine", module_with(cs336_bakcend=cs336_bakcend)))
    assert (
        "implements hook 'cs336_bakcend', which does not exist: did you mean 'cs336_backend'"
        in discovery.plugins["mine"].reason
    )
    assert discovery.manager.get_plugin("mine") is None


def test_a_hook_without_its_marker_is_refused():
    status = only(FakeEntryPoint("mine", module_with(cs336_backend=lambda: None)))
    assert status.reason == "defines 'cs336_backend' without @hookimpl: add the marker, or rename it"


def test_a_hook_with_a_wrong_argument_is_refused():
    @hookimpl
    def cs336_probe(hardware):
        return None

    status = only(FakeEntryPoint("mine", module_with(cs336_probe=cs336_probe)))
    assert status.state == "broken"
    assert "hardware" in status.reason


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (backend_module("other", RMSNORM), "calls itself 'other' but its entry point is named 'mine'"),
        (backend_module("mine", RMSNORM, api_version=99), "was written for plugin API 99, this is 1"),
        (backend_module("mine", RMSNORM, RMSNORM), "claims component 'rmsnorm' twice"),
        (
            backend_module("mine", Implementation(component="rmsnrom", target="a:b")),
            "claims unknown component 'rmsnrom': did you mean 'rmsnorm'",
        ),
        (
            backend_module("mine", Implementation(component="rmsnorm", target="a:b", dtypes=("float23",))),
            "claims unknown dtype 'float23' for 'rmsnorm': did you mean 'float32'",
        ),
        (
            backend_module("mine", Implementation(component="rmsnorm", target="a:b", devices=("CPU",))),
            "claims unknown device 'CPU' for 'rmsnorm': known: cpu, cuda, interpreter",
        ),
        (backend_module("mine", Implementation(component="rmsnorm", target="a.b")), "gives 'a.b' for 'rmsnorm': write"),
        (module_with(cs336_backend=hookimpl(lambda: "text")), "cs336_backend returned a str: return a cs336_registry"),
    ],
    ids=["name", "api", "twice", "unknown_component", "dtype", "device", "target", "type"],
)
def test_a_wrong_manifest_is_refused_whole(module, reason):
    discovery = found(FakeEntryPoint("mine", module))
    assert discovery.plugins["mine"].state == "broken"
    assert reason in discovery.plugins["mine"].reason
    assert discovery.plugins["mine"].backend is None
    assert discovery.manager.get_plugin("mine") is None


@pytest.mark.parametrize("name", ["auto", "Mine", "1st", "my-backend"])
def test_a_name_the_grammar_cannot_say_is_refused(name):
    assert "is not allowed" in only(FakeEntryPoint(name, backend_module(name, RMSNORM))).reason


def test_the_same_plugin_found_twice_counts_once():
    module = backend_module("mine", RMSNORM)
    discovery = found(
        FakeEntryPoint("mine", module, distribution="d"), FakeEntryPoint("mine", module, distribution="d")
    )
    assert [status.state for status in discovery.plugins.values()] == ["ok"]


def test_two_distributions_of_one_name_are_both_refused():
    one = FakeEntryPoint("mine", backend_module("mine", RMSNORM), value="one", distribution="one-dist")
    two = FakeEntryPoint("mine", backend_module("mine", RMSNORM), value="two", distribution="two-dist")
    status = only(one, two)
    assert status.state == "broken"
    assert "2 distributions provide backend 'mine': one-dist (one) and two-dist (two); uninstall one" in status.reason


def test_a_stranger_cannot_take_a_name_of_ours():
    ours = FakeEntryPoint("reference", backend_module("reference", RMSNORM), "ours", "cs336-registry")
    theirs = FakeEntryPoint("reference", RuntimeError("was imported"), "theirs", "a-stranger")
    plugins = found(theirs, ours).plugins
    assert plugins["reference"].state == "ok"
    assert plugins["reference (a-stranger)"].state == "broken"


def test_a_plugin_may_add_components_and_claim_them():
    @hookimpl
    def cs336_components():
        return {"convolution": "elsewhere:contract"}

    module = backend_module("mine", Implementation(component="convolution", target="elsewhere:convolution"))
    module.cs336_components = cs336_components
    discovery = found(FakeEntryPoint("mine", module))
    assert discovery.plugins["mine"].state == "ok"
    assert list(discovery.components)[-1] == "convolution"


def test_a_plugin_may_not_redefine_a_component():
    module = backend_module("mine", RMSNORM)
    module.cs336_components = hookimpl(lambda: {"rmsnorm": "elsewhere:contract"})
    vars(module)["cs336_components"].__name__ = "cs336_components"
    assert "adds component 'rmsnorm', which exists already" in only(FakeEntryPoint("mine", module)).reason


def test_what_was_found_cannot_be_changed():
    discovery = found(FakeEntryPoint("mine", backend_module("mine", RMSNORM)))
    with pytest.raises(TypeError):
        discovery.plugins["mine"] = None
    with pytest.raises(TypeError):
        discovery.components["mine"] = ""
    assert isinstance(discovery.plugins["mine"].backend, Backend)
