"""A wheel in an environment of its own: the verbs work without the checkout, its recipes, results and tests.

The libraries are those of the environment that runs the tests, seen through a .pth file; of the product only the wheel
can be imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
#: Files of the package that are no Python modules.
RESOURCES = (
    "tawin_nemo/py.typed", "tawin_nemo/eval/report.html.j2", "tawin_nemo/serve/http/openapi.json",
    "tawin_nemo/serve/http/openapi_control.json", "tawin_nemo/serve/http/playground.html",
)  # fmt: skip
SOURCES = ("tawin_nemo", "data_prep", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Installed:
    """The environment and an empty working directory."""

    python: Path
    folder: Path

    def run(self, *words: str) -> str:
        """Standard output of ``tawin-nemo words``."""
        return self._output(str(self.python.with_name("tawin-nemo")), *words)

    def evaluate(self, program: str) -> str:
        """Standard output of ``python -c program``."""
        return self._output(str(self.python), "-c", program).strip()

    def _output(self, *command: str) -> str:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=500, cwd=self.folder,
            env={**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-build-isolation", "--no-index", "--wheel-dir", str(folder / "out"), str(folder)],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = (folder / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
         "--disable-pip-version-check", str(wheel)],
        check=True, timeout=500,
    )  # fmt: skip
    # A folder named in a .pth file is searched after the environment's own, and its .pth files (the editable install of
    # the checkout is one) are not read.
    packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    libraries = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    (packages / "libraries.pth").write_text("".join(f"{path}\n" for path in dict.fromkeys(libraries)))
    (folder / "work").mkdir()
    return Installed(python, folder / "work")


def test_it_holds_every_module_and_resource_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tawin_nemo").rglob("*.py") if path.is_file()
    }
    modules |= {f"tawin_nemo/data_prep/{path.name}" for path in (REPOSITORY / "data_prep").glob("*.py")}
    files = {name for name in names if ".dist-info/" not in name}
    assert files == modules | set(RESOURCES)


def test_the_installed_package_is_used(installed: Installed):
    program = "import tawin_nemo, tawin_nemo.data_prep as prep; print(tawin_nemo.__file__, prep.__file__)"
    for path in installed.evaluate(program).split():
        assert path.startswith(str(installed.python.parents[1])), path
    for module in ("tests", "recipes", "data_prep"):  # nemo_toolkit installs a package named tests
        program = f"import importlib.util; spec = importlib.util.find_spec({module!r}); print(spec and spec.origin)"
        assert not installed.evaluate(program).startswith(str(REPOSITORY / module)), module


def test_help(installed: Installed):
    assert "\n  prepare " in installed.run("--help")
    assert "tawin-nemo serve" in installed.run("serve", "--help")


def test_data_is_prepared_and_a_copied_recipe_checked(installed: Installed):
    recipe = installed.folder / "quickstart.yaml"
    shutil.copy(REPOSITORY / "recipes" / "quickstart.yaml", recipe)
    small = ["prepare.synthetic_items=150", "prepare.synthetic_users=500"]
    words = ["--recipe", str(recipe), *small, f"run_dir={installed.folder / 'run'}"]
    installed.run("prepare", *words)
    assert list(installed.folder.rglob("*.parquet"))
    planned = json.loads(installed.run("train", *words, "--dry-run").splitlines()[-1])
    assert planned["dry_run"] is True
    assert planned["run_dir"] == str(installed.folder / "run")
