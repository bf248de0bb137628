"""``recipes/wheelhouse.sh`` with the real pip over a folder as the index: its result can be installed without one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "wheelhouse.sh"
#: What building the project needs, besides what is required.
TOOLS = ("setuptools-80.0", "wheel-0.45", "ninja-1.13", "pybind11-3.0", "packaging-24.2", "pip-25.0")


def add_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    """A package of one module, which says its version."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": f"VERSION = '{version}'\n",
        f"{info}/METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)


@pytest.mark.full
def test_what_is_collected_can_be_checked_and_installed_without_an_index(tmp_path: Path):
    index, wheels, target = tmp_path / "index", tmp_path / "wheels", tmp_path / "target"
    index.mkdir()
    add_wheel(index, "torch", "2.13.0")
    add_wheel(index, "shop", "1.5", requires="shelf>=2")
    for version in ("1.0", "2.0"):
        add_wheel(index, "shelf", version)
    for tool in TOOLS:
        add_wheel(index, *tool.split("-"))
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\nshop==1.5\n")
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "TAWIN_PYTHON": sys.executable}
    env |= {"TAWIN_REQUIREMENTS": str(tmp_path / "requirements.txt"), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(["bash", SCRIPT, wheels], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sums = dict(line.split()[::-1] for line in (wheels / "SHA256SUMS").read_text().splitlines())
    names = {file.name for file in wheels.glob("*.whl")}
    assert names == sums.keys()
    assert {"torch-2.13.0-py3-none-any.whl", "shop-1.5-py3-none-any.whl", "shelf-2.0-py3-none-any.whl"} <= names
    assert len(names) == 3 + len(TOOLS)
    assert all(hashlib.sha256((wheels / name).read_bytes()).hexdigest() == sum_ for name, sum_ in sums.items())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), "shop"]
    subprocess.run(install, env=env | {"PIP_FIND_LINKS": str(wheels)}, check=True, timeout=300)
    assert "2.0" in (target / "shelf.py").read_text()


def test_without_a_folder_it_says_how_it_is_used():
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: bash recipes/wheelhouse.sh FOLDER\n")
