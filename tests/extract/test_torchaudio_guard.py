"""A torchaudio that cannot be loaded must not take transformers with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

USE = "from transformers import HubertModel"
IMPORT = "from mer.extract.torchaudio_guard import neutralise_broken_torchaudio as guard;"
GUARD = f"{IMPORT} hidden = guard();"


@pytest.fixture
def broken_torchaudio(tmp_path: Path) -> dict[str, str]:
    """Environment in which torchaudio is installed and fails as a CUDA build does without CUDA."""
    package = tmp_path / "torchaudio"
    package.mkdir()
    package.joinpath("__init__.py").write_text(
        "import torchaudio.part\nraise OSError('libcudart.so.13: cannot open shared object file')\n"
    )
    package.joinpath("part.py").touch()
    metadata = tmp_path / "torchaudio-2.11.0.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.11.0\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def python(code: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )


def test_a_broken_torchaudio_is_hidden_and_transformers_works(broken_torchaudio):
    code = (
        f"{GUARD} import sys; assert hidden; assert guard();"
        "assert not [n for n in sys.modules if n.startswith('torchaudio.')];"
        f"{USE}"
    )
    result = python(code, broken_torchaudio)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_fault_is_real_without_the_guard(broken_torchaudio):
    result = python(USE, broken_torchaudio)
    assert result.returncode != 0
    assert "libcudart" in result.stderr


def test_a_working_torchaudio_is_left_alone(tmp_path, broken_torchaudio):
    (tmp_path / "torchaudio" / "__init__.py").write_text("")
    code = f"{GUARD} import torchaudio; assert not hidden"
    result = python(code, broken_torchaudio)
    assert result.returncode == 0, result.stderr


def test_no_torchaudio_is_no_matter(monkeypatch):
    from mer.extract import torchaudio_guard

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    monkeypatch.setattr(torchaudio_guard.importlib, "import_module", absent)
    assert torchaudio_guard.neutralise_broken_torchaudio() is False
    assert "torchaudio" not in sys.modules


def test_a_dependency_that_torchaudio_misses_counts_as_broken(monkeypatch):
    from mer.extract import torchaudio_guard

    def incomplete(name):
        raise ModuleNotFoundError("No module named 'torchaudio_lib'", name="torchaudio_lib")

    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    monkeypatch.setattr(torchaudio_guard.importlib, "import_module", incomplete)
    assert torchaudio_guard.neutralise_broken_torchaudio() is True
    assert sys.modules.pop("torchaudio") is None
