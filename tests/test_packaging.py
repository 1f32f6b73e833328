"""What is installed is exactly the package, whatever else lies in the folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cache", "extract", "heads", "pipelines")
DATA = {"pipelines/recipes": "*.yaml", "cache": "*.md"}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy") / "some-folder"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "__init__.py", "cli.py"):
        shutil.copy(ROOT / name, copy / name)
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignore)
    (copy / "scratch.py").write_text("stray = True\n")
    code = "from setuptools.build_meta import build_wheel; build_wheel('out')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (wheel,) = (copy / "out").glob("mer-*.whl")
    return {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}


def test_the_wheel_holds_exactly_the_package(wheel_names):
    expected = {"mer/__init__.py", "mer/cli.py"}
    for package in PACKAGES:
        expected |= {f"mer/{p.relative_to(ROOT)}" for p in (ROOT / package).rglob("*.py")}
    for folder, pattern in DATA.items():
        expected |= {f"mer/{p.relative_to(ROOT)}" for p in (ROOT / folder).glob(pattern)}
    expected -= {name for name in expected if name.endswith("README.md")}
    assert {n for n in wheel_names if not n.endswith("README.md")} == expected


def test_version_is_stated_once_to_the_same_value():
    from mer import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__


def test_constraints_fit_the_declared_bounds():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    declared = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in map(Requirement, declared):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version), f"{requirement.name} {version}"
