"""The pytest plugin, as the author of a backend uses it: options, claims, audit, strict, records."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

MANIFEST = """
from cs336_registry.plugin import Backend, Implementation, hookimpl

@hookimpl
def cs336_backend():
    return Backend(name="toy", summary="a toy", implementations=(
        Implementation(component="silu", target="cs336_toy_ops:silu", dtypes=("float32",), {claims}),
    ))

@hookimpl
def cs336_conformance_mark(component, case, dtype):
    return "the toy has no sense of odd" if case == "odd" else None
"""
RIGHT = """
import torch
from cs336_registry.components.silu import check

def silu(x):
    check(x)
    return torch.nn.functional.silu(x)
"""


@pytest.fixture
def toy(pytester, monkeypatch):
    """A backend that is found as an installed distribution is; `toy(claims, operators)` writes it."""

    def write(claims="gradient=True", operators=RIGHT):
        metadata = pytester.mkdir("toy-0.1.dist-info")
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 0.1\n")
        (metadata / "entry_points.txt").write_text("[cs336_registry]\ntoy = cs336_toy\n")
        (pytester.path / "cs336_toy.py").write_text(MANIFEST.format(claims=claims))
        (pytester.path / "cs336_toy_ops.py").write_text(operators)

    monkeypatch.setenv("PYTHONPATH", str(pytester.path))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    return write


def conformance(pytester, *options):
    return pytester.runpytest_subprocess(
        "--pyargs", "cs336_registry.conformance", "--cs336-components=silu", "-rs", "-p", "no:cacheprovider", *options
    )


def record(pytester):
    return json.loads((pytester.path / "record.json").read_text())


def test_claimed_checks_pass_and_the_others_are_skipped_with_the_reason(pytester, toy):
    toy()
    result = conformance(pytester, "--cs336-backend=toy", "--cs336-json=record.json", "--junitxml=junit.xml")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*dtype bfloat16 is not among float32*", "*the toy has no sense of odd*"])
    result.stdout.fnmatch_lines(["toy: * passed, * skipped", "record: record.json"])
    found = record(pytester)
    rows = {row["check"]: row for row in found["checks"]}
    assert list(rows) == sorted(rows)
    assert rows["test_case[silu-course-float32]"]["outcome"] == "passed"
    assert rows["test_case[silu-course-float32]"]["decision"]
    assert rows["test_case[silu-course-float16]"]["outcome"] == "skipped"
    assert rows["test_threads[silu]"]["unclaimed"] == ["it does not claim thread_safe=True"]
    assert found["backends"] == ["toy"] and found["totals"]["passed"] > 20 and "failed" not in found["totals"]
    assert "test_case[silu-course-float32]" in (pytester.path / "junit.xml").read_text()


def test_audit_names_the_claims_that_could_be_made(pytester, toy):
    toy("gradient=False")
    result = conformance(pytester, "--cs336-backend=toy", "--cs336-audit", "--cs336-json=record.json")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["toy: silu passes * (it does not claim deterministic=True): you support this, claim it"]
    )
    assert any("bfloat16" in line for line in record(pytester)["claimable"])


def test_audit_does_not_suggest_what_fails(pytester, toy):
    toy(operators=RIGHT.replace("return torch", "assert x.dtype == torch.float32, 'float32 alone'\n    return torch"))
    result = conformance(pytester, "--cs336-backend=toy", "--cs336-audit", "--cs336-json=record.json")
    assert result.ret == 0
    found = record(pytester)
    assert found["totals"]["unsupported"] > 0
    assert not any("bfloat16" in line for line in found["claimable"])


def test_strict_turns_skips_into_failures(pytester, toy):
    toy()
    result = conformance(pytester, "--cs336-backend=toy", "--cs336-strict")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*skipped checks are failures under --cs336-strict: dtype bfloat16*"])


def test_a_wrong_backend_fails(pytester, toy):
    toy(operators=RIGHT.replace("functional.silu(x)", "functional.gelu(x)"))
    result = conformance(pytester, "--cs336-backend=toy", "--cs336-json=record.json")
    assert result.ret == 1
    failed = [row for row in record(pytester)["checks"] if row["outcome"] == "failed"]
    assert any("error" in row and row["check"].startswith("test_case[silu-course") for row in failed)


def test_nothing_falls_back(pytester, toy):
    toy()
    result = pytester.runpytest_subprocess(
        "--pyargs", "cs336_registry.conformance", "--cs336-backend=toy", "--cs336-components=rmsnorm", "-rs"
    )
    result.assert_outcomes(skipped=result.parseoutcomes()["skipped"])
    result.stdout.fnmatch_lines(["*toy does not provide rmsnorm*"])


def test_several_backends_are_told_apart(pytester, toy):
    toy()
    result = conformance(pytester, "--cs336-backend=toy,reference", "-k", "test_case and course", "-v")
    result.stdout.fnmatch_lines_random(
        ["*test_case?reference-silu-course-float32? PASSED*", "*test_case?toy-silu-course-float32? PASSED*"]
    )


def test_several_seeds_repeat_what_depends_on_the_numbers(pytester, toy):
    toy()
    options = ("--cs336-backend=toy", "--cs336-json=record.json", "--cs336-seed=3", "--cs336-seeds=2")
    assert conformance(pytester, *options, "-k", "course-float32 or signature or law").ret == 0
    seeds = {row["check"]: row["seeds"] for row in record(pytester)["checks"] if row["outcome"] == "passed"}
    assert seeds["test_case[silu-course-float32]"] == 2 and seeds["test_signature[silu]"] == 1


def test_the_seed_of_a_failure_is_named(pytester, toy):
    """Right where the first number is positive, as it is with some seeds and not with others."""
    toy(operators=RIGHT.replace("silu(x)\n", "silu(x) * (x.flatten()[0] > 0)\n"))
    result = conformance(pytester, "--cs336-backend=toy", "--cs336-seeds=8", "-k", "test_case and course-float32")
    assert result.ret == 1
    result.stdout.re_match_lines([r".*again with: --cs336-seed=[0-7]"])


def test_by_default_the_components_are_those_that_the_backend_provides(pytester, toy):
    toy()
    options = ("--cs336-backend=toy", "--cs336-json=record.json", "-k", "signature")
    result = pytester.runpytest_subprocess("--pyargs", "cs336_registry.conformance", "-p", "no:cacheprovider", *options)
    assert result.ret == 0
    assert {row["component"] for row in record(pytester)["checks"]} == {"silu"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cs336-backend=toi",), "*unknown backend 'toi': did you mean 'toy'*"),
        (("--cs336-backend=toy", "--cs336-components=silo"), "*unknown component 'silo': did you mean 'silu'*"),
        (("--cs336-backend=toy", "--cs336-dtypes=float31"), "*unknown dtype 'float31': did you mean 'float32'*"),
        (
            ("--cs336-backend=toy", "--cs336-seeds=0"),
            "*--cs336-seeds is 0: give the number of seeds to try, 1 or more*",
        ),
    ],
)
def test_names_that_do_not_exist_are_refused(pytester, toy, options, message):
    toy()
    result = pytester.runpytest_subprocess("--pyargs", "cs336_registry.conformance", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_an_unavailable_backend_is_refused_with_its_reason(pytester, toy):
    toy()
    manifest = pytester.path / "cs336_toy.py"
    manifest.write_text(
        manifest.read_text().replace('summary="a toy"', 'summary="a toy", requires=("no_such_package",)')
    )
    result = conformance(pytester, "--cs336-backend=toy")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*backend 'toy' can't be judged: unavailable: no_such_package is not installed*"])


def test_fixtures_give_the_backend_under_test(pytester, toy):
    toy()
    pytester.makepyfile(
        test_mine="""
        def test_callable(implementation_of):
            assert implementation_of("silu").__module__ == "cs336_toy_ops"

        def test_skipped(implementation_of):
            implementation_of("rmsnorm")
        """
    )
    result = pytester.runpytest_subprocess("test_mine.py", "--cs336-backend=toy", "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    both = pytester.runpytest_subprocess("test_mine.py", "--cs336-backend=toy,reference", "-v", "-k", "callable")
    both.stdout.fnmatch_lines(["*test_callable?reference? FAILED*", "*test_callable?toy? PASSED*"])


def test_workers_report_to_one_record(pytester, toy):
    toy()
    result = conformance(pytester, "--cs336-backend=toy", "-n", "2", "--cs336-json=record.json")
    assert result.ret == 0
    assert len(record(pytester)["checks"]) > 60


def test_a_session_as_a_function(pytester, toy):
    toy()
    code = (
        "from cs336_registry.conformance.session import run_conformance; "
        "report = run_conformance('toy', components=['silu'], dtypes=['float32']); "
        "print(report.exit_code, report.record['totals']['passed'] > 10)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "0 True"


def test_the_plugin_loads_nothing_until_it_is_used(pytester, monkeypatch):
    # Alone: other plugins of this environment import numpy.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(
        """
        import sys

        def test_modules():
            heavy = {"torch", "triton", "numba", "numpy", "cs336_registry.conformance.checks"}
            assert "cs336_registry.conformance.plugin" in sys.modules
            assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess("-p", "cs336_registry.conformance.plugin").assert_outcomes(passed=1)


def test_the_session_tells_each_failure_in_a_line(tmp_path):
    code = (
        "import cs336_torch.silu as module; right = module.silu; module.silu = lambda x: right(x) * 1.01; "
        "from cs336_registry.conformance.session import run_conformance; "
        "run_conformance('torch', components=['silu'], dtypes=['float32'], pytest_arguments=['-k', 'course'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "FAILED test_case[silu-course-float32]: AssertionError: result: error 0.0" in run.stdout, run.stdout
    assert "Traceback" not in run.stdout and len(run.stdout.splitlines()) < 20
    assert '--cs336-backend=torch -k "test_case and silu and course and float32"' in run.stdout
