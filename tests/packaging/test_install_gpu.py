"""``recipes/install_gpu.sh`` on made-up machines: which torch, which commands, and what it says when it cannot work."""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "recipes" / "install_gpu.sh"


def machine(folder: Path, driver: str = "580.65.06", toolkit: str = "13.0") -> dict[str, str]:
    """An environment whose nvidia-smi and nvcc report these versions; an empty one: the command is missing."""
    for name, text in (("nvidia-smi", driver), ("nvcc", f"Cuda compilation tools, release {toolkit}, V1")):
        code = 0 if (driver if name == "nvidia-smi" else toolkit) else 127
        (folder / name).write_text(f"#!/bin/bash\necho '{text if not code else ''}'\nexit {code}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TAWIN", "CUDA", "CPATH"))}
    return {**kept, "PATH": f"{folder}:{os.environ['PATH']}", "TAWIN_DRY_RUN": "1"}


def dry_run(environment: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT], env={**environment, **more}, capture_output=True, text=True, timeout=60)


def pinned_torch() -> str:
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def test_the_extension_is_compiled_against_the_installed_torch(tmp_path):
    done = dry_run(machine(tmp_path))
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    (engine,) = [words for words in commands if "requirements-gpu.txt" in words]
    assert "--no-build-isolation" in engine
    assert [word for word in engine if word.startswith("torch==")] == [pinned_torch()]
    tools = commands[commands.index(engine) - 1]
    assert {"setuptools>=70.1", "wheel", "ninja"} <= set(tools)  # without isolation nobody else installs them
    assert any("import transformer_engine.pytorch" in word for word in commands[commands.index(engine) + 1])
    assert commands[-1][-2:] == ["doctor", "--quick"]
    assert not any("amp_C" in word for words in commands for word in words)


@pytest.mark.parametrize(
    ("driver", "toolkit", "index"),
    [
        ("580.65.06", "13.0", ""),
        ("595.1", "13.2", ""),
        ("550.54.15", "12.6", "https://download.pytorch.org/whl/cu126"),
        ("535.104.05", "12.4", "https://download.pytorch.org/whl/cu126"),
    ],
)
def test_torch_is_chosen_by_the_driver(tmp_path, driver, toolkit, index):
    done = dry_run(machine(tmp_path, driver, toolkit))
    assert done.returncode == 0, done.stderr
    assert f"TAWIN_TORCH_INDEX={index} " in done.stdout
    chosen = dry_run(machine(tmp_path, driver, toolkit), TAWIN_TORCH_INDEX="https://mirror/simple")
    assert "TAWIN_TORCH_INDEX=https://mirror/simple " in chosen.stdout


@pytest.mark.parametrize(
    ("driver", "toolkit", "remedy"),
    [
        ("", "13.0", "run this on a GPU node"),
        ("470.82", "11.4", "update the NVIDIA driver"),
        ("580.65.06", "", "install the CUDA 13 toolkit"),
        ("550.54.15", "13.0", "set CUDA_HOME to a toolkit of CUDA 12"),
    ],
)
def test_a_machine_where_it_cannot_work_is_told_why(tmp_path, driver, toolkit, remedy):
    done = dry_run(machine(tmp_path, driver, toolkit))
    assert (done.returncode, done.stdout) == (2, "")
    assert remedy in done.stderr


def test_an_image_is_built_where_there_is_no_gpu(tmp_path):
    """The driver of the machines that will run it is named; what needs a driver is left to them."""
    done = dry_run(machine(tmp_path, "", "12.6"), TAWIN_DRIVER="550.54")
    assert done.returncode == 0, done.stderr
    assert "TAWIN_TORCH_INDEX=https://download.pytorch.org/whl/cu126 " in done.stdout
    assert "requirements-gpu.txt" in done.stdout
    assert "doctor" not in done.stdout
    assert "import transformer_engine" not in done.stdout


def test_apex_comes_from_its_source_only(tmp_path):
    done = dry_run(machine(tmp_path), TAWIN_APEX="/src/apex")
    (apex,) = [words for line in done.stdout.splitlines() if "/src/apex" in (words := shlex.split(line))]
    assert {"APEX_CPP_EXT=1", "APEX_CUDA_EXT=1", "--no-build-isolation"} <= set(apex)


def test_headers_of_the_nvidia_packages_are_found(tmp_path):
    for name in ("cudnn/include/cudnn.h", "cu13/include/cusparse.h", "nccl/include/nccl.h", "empty/include/README"):
        path = tmp_path / "nvidia" / name
        path.parent.mkdir(parents=True)
        path.touch()
    folders = runpy.run_path(str(REPOSITORY / "recipes" / "nvidia_headers.py"))["include_folders"](tmp_path)
    assert [folder.parent.name for folder in folders] == ["cu13", "cudnn", "nccl"]


def test_the_remedy_named_anywhere_is_the_script():
    """``pip install -r requirements-gpu.txt`` alone compiles against the wrong torch; only comments may mention it."""
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "recipes").rglob("*.md"), *(REPOSITORY / "slurm").rglob("*.md")]
    product = list((REPOSITORY / "tawin_nemo").rglob("*.py"))
    for path in [*pages, *product, REPOSITORY / "recipes" / "install.sh", REPOSITORY / "tests" / "gpu" / "README.md"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "install -r requirements-gpu.txt" not in line or line.startswith("#"), path
    assert "install_gpu.sh" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
