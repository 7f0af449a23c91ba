"""What must not be imported: each statement runs in a fresh interpreter that then lists its modules."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "triton", "numba", "numpy")
CLI = "import sys; sys.argv[0] = 'cs336'\nfrom cs336_registry.cli import main\ntry: main({!r})\nexcept SystemExit: pass"


def imported(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('MODULES', *(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.rsplit("MODULES", 1)[1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "import cs336_registry",
        "import cs336_registry as r; [r.contract(name) for name in r.components()]",
        "import cs336_registry as r; r.backends()",
        "import cs336_registry as r; r.explain('attention', device='cuda', dtype='bfloat16', backend='triton')",
        CLI.format(["--help"]),
        CLI.format(["backends"]),
        CLI.format(["components"]),
        CLI.format(["explain", "transformer_lm"]),
    ],
    ids=["package", "contracts", "discovery", "explain", "cli_help", "cli_backends", "cli_components", "cli_explain"],
)
def test_looking_around_imports_nothing_heavy(statement):
    assert imported(statement) == set()


@pytest.mark.parametrize("backend", ["reference", "heap_bpe", "numba_bpe"])
@pytest.mark.parametrize("component", ["bpe_trainer", "pretoken_counter", "tokenizer"])
def test_text_needs_no_torch(component, backend):
    assert "torch" not in imported(f"import cs336_registry as r; r.get({component!r}, backend={backend + '!'!r})")


def test_training_and_encoding_text_needs_no_torch(tmp_path):
    (tmp_path / "corpus.txt").write_text("low lower lowest newest widest " * 20)
    statement = (
        "import cs336_registry as r\n"
        f"vocab, merges = r.get('bpe_trainer')({str(tmp_path / 'corpus.txt')!r}, 270, ['<|endoftext|>'])\n"
        "tokenizer = r.get('tokenizer')(vocab, merges, ['<|endoftext|>'])\n"
        "assert tokenizer.decode(tokenizer.encode('lowest new')) == 'lowest new'"
    )
    assert "torch" not in imported(statement)


def test_training_imports_sharded_checkpoints_only_for_several_processes():
    statement = (
        "import sys, cs336_registry.pipeline.training, cs336_registry.pipeline.report\n"
        "assert 'torch.distributed.checkpoint' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", statement], check=True)


def test_backends_do_not_import_one_another():
    backends = Path(__file__).parents[2] / "backends"
    names = sorted(folder.name for folder in backends.iterdir() if (folder / "__init__.py").is_file())
    assert "cs336_reference" in names
    for path in backends.rglob("*.py"):
        own = path.relative_to(backends).parts[0]
        imported = re.findall(r"^\s*(?:from|import) (cs336_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not set(imported) & {*names} - {own}, f"{path} imports another backend"
