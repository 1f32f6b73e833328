"""Imports point one way: cli → pipelines → {extract, heads} → cache."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "cache": {"cache"},
    "extract": {"extract", "cache"},
    "heads": {"heads"},
    "pipelines": {"pipelines", "extract", "heads", "cache"},
}
MODULES = sorted(p for package in MAY_IMPORT for p in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_only(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "mer" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in MAY_IMPORT[package], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_or_evaluates(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert not imported(tree) & {"pickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "numpy.load"}
            if call in {"torch.load", "np.load"}:
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True" or call == "np.load"
                assert keywords.get("allow_pickle", "False") == "False"
            assert all(
                ast.unparse(k.value) == "False"
                for k in node.keywords
                if k.arg == "trust_remote_code"
            )


@pytest.mark.parametrize("argv", [["--help"], ["extract", "--help"], ["train-head", "--help"]])
def test_help_imports_nothing_heavy(argv):
    code = (
        "import sys\nfrom mer.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit as e:\n    assert e.code == 0, e.code\n"
        "heavy = {'numpy', 'torch', 'transformers', 'zarr', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: mer" in done.stdout
