"""``te.sh`` without Transformer Engine: parts are split, moved, joined and checked; what lacks is named; a build on a
made-up machine."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CORE, SOURCE = (
    "transformer_engine_cu13-2.11.0-py3-none-manylinux_2_28_x86_64.whl",
    "transformer_engine_torch-2.11.0.tar.gz",
)
FILES = {
    CORE: 2500,
    SOURCE: 900,
    "transformer_engine-2.11.0-py3-none-any.whl": 30,
    "ninja-1.13.0-py3-none-any.whl": 1000,
}


@pytest.fixture
def sent(tmp_path):
    """A folder as ``fetch`` leaves it before it is split."""
    folder, draw = tmp_path / "sent", random.Random(3)
    folder.mkdir()
    for name, size in FILES.items():
        (folder / name).write_bytes(draw.randbytes(size))
    return folder


@pytest.fixture
def machine(tmp_path):
    """An environment whose python says that its torch is for CUDA 13, as nvcc does."""
    tools = tmp_path / "tools"
    tools.mkdir()
    toolkit(tools, "13.0")
    python(tools, "13.0")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TAWIN", "CUDA", "CPATH"))}
    return {
        **kept, "PATH": f"{tools}:{os.environ['PATH']}", "TAWIN_TE_STORE": str(tmp_path / "store"),
        "TAWIN_TE_PART": "1000", "TAWIN_DRY_RUN": "1", "TAWIN_PYTHON": str(tools / "python3"),
    }  # fmt: skip


def toolkit(tools, version):
    (tools / "nvcc").write_text(f"#!/bin/bash\necho 'Cuda compilation tools, release {version}, V1'\n")
    (tools / "nvcc").chmod(0o755)


def python(tools, cuda):
    text = f'#!/bin/bash\n[[ "$*" == *torch.version.cuda* ]] && echo {cuda} && exit\nexec {sys.executable} "$@"\n'
    (tools / "python3").write_text(text)
    (tools / "python3").chmod(0o755)


def te(environment, *words):
    command = ["bash", "tests/gpu/te.sh", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)


def done(environment, *words):
    ended = te(environment, *words)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def refused(environment, *words):
    ended = te(environment, *words)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    return ended.stderr


def test_parts_are_small_and_become_the_same_files_again(sent, machine, tmp_path):
    before = {path.name: path.read_bytes() for path in sent.iterdir()}
    assert "4 files, 3 parts" in done(machine, "split", str(sent))
    assert max(path.stat().st_size for path in sent.iterdir()) <= 1000
    assert sorted(path.name for path in sent.glob(f"{CORE}.part-*")) == [
        f"{CORE}.part-0{number}" for number in range(3)
    ]
    assert not (sent / CORE).exists()
    done(machine, "store", str(sent))
    assert not list(sent.iterdir())
    done(machine, "build")
    store = tmp_path / "store"
    assert {name: (store / name).read_bytes() for name in before} == before
    assert not list(store.glob("*.part-*"))
    done(machine, "build")  # nothing is left to join


def test_parts_may_come_one_after_the_other(sent, machine, tmp_path):
    done(machine, "split", str(sent))
    last = (sent / f"{CORE}.part-02").rename(tmp_path / f"{CORE}.part-02")
    done(machine, "store", str(sent))
    said = refused(machine, "build")
    assert f"not in {tmp_path}/store yet: {CORE}.part-02" in said
    assert "part-01" not in said
    last.rename(sent / last.name)
    done(machine, "store", str(sent))
    done(machine, "build")


@pytest.mark.parametrize("broken", [f"{CORE}.part-01", SOURCE])
def test_a_changed_byte_is_found_and_mended_by_sending_again(broken, sent, machine, tmp_path):
    done(machine, "split", str(sent))
    right = (sent / broken).read_bytes()
    (sent / broken).write_bytes(bytes([right[0] ^ 1]) + right[1:])
    done(machine, "store", str(sent))
    said = refused(machine, "build")
    assert f"{broken.removesuffix('.part-01')}: FAILED" in said
    assert "send it, or its parts, again" in said
    (sent / broken).write_bytes(right)
    done(machine, "store", str(sent))
    assert "te_store" not in done(machine, "build")


def test_a_build_compiles_first_and_installs_all_wheels_in_one_call(sent, machine, tmp_path):
    store = tmp_path / "store"
    done(machine, "split", str(sent))
    done(machine, "store", str(sent))
    commands = [shlex.split(line) for line in done(machine).splitlines()]
    tools, settings, compiled, installed, imported, parts = commands
    assert {"NVTE_CUDA_ARCHS=90", "MAX_JOBS=8"} <= set(settings)
    assert [Path(word).name for word in tools if word.endswith(".whl")] == ["ninja-1.13.0-py3-none-any.whl"]
    assert {"--no-build-isolation", "--no-deps", "--no-index", str(store / SOURCE)} <= set(compiled)
    assert f"PYTHONPATH={store}/tools" in compiled
    assert {str(store / CORE), str(store / "site")} <= set(installed)
    assert any("import transformer_engine" in word for word in imported)
    assert parts[-2] == "--parts"
    chosen = parts[-1].split(",")
    assert {"train_bf16", "train_fp8-blockwise", "mismatch_fp8-delayed", "pytest"} <= set(chosen)
    built = store / "built" / "transformer_engine_torch-2.11.0-cp312-cp312-linux_x86_64.whl"
    built.parent.mkdir()
    built.touch()
    again = done(machine, "build")
    assert "--no-build-isolation" not in again, "what was compiled is used again"
    assert str(built) in again


def test_fetch_downloads_for_the_other_python_and_the_source_beside_any_torch(machine, tmp_path):
    commands = [shlex.split(line) for line in done(machine, "fetch", str(tmp_path / "new")).splitlines()]
    wheels, imports, _, source = commands
    for words in (wheels, imports):
        assert words[words.index("--python-version") + 1] == "3.12"
    assert {"transformer_engine_cu13==2.11.0", "transformer_engine==2.11.0", "--no-deps"} <= set(wheels)
    assert {"pydantic", "einops", "onnxscript"} <= set(imports)
    assert "--no-deps" not in imports
    assert {"transformer_engine_torch==2.11.0", "--no-build-isolation"} <= set(source)
    assert any(word.startswith("PYTHONPATH=") for word in source)


def test_parts_are_those_of_run_sh(sent, machine):
    done(machine, "split", str(sent))
    done(machine, "store", str(sent))
    from tests.gpu.run import NAMES

    words = shlex.split(done(machine, "run", "--limit-s", "100").splitlines()[-1])
    assert set(words[words.index("--parts") + 1].split(",")) <= set(NAMES)
    assert words[-2:] == ["--limit-s", "100"]


@pytest.mark.parametrize(
    ("cuda", "nvcc", "reason"),
    [
        ("none", "13.0", "is a CPU build: set TAWIN_PYTHON"),
        ("12.6", "13.0", "nvcc is CUDA 13.0, torch is for CUDA 12.6: set CUDA_HOME"),
        ("12.6", "12.6", "no transformer_engine_cu12 in"),
        ("13.0", "", "no nvcc: set CUDA_HOME"),
    ],
)
def test_machines_that_cannot_compile_are_refused(cuda, nvcc, reason, sent, machine, tmp_path):
    done(machine, "split", str(sent))
    done(machine, "store", str(sent))
    python(tmp_path / "tools", cuda)
    toolkit(tmp_path / "tools", nvcc)
    assert reason in refused(machine, "build")


def test_what_is_missing_is_named(sent, machine, tmp_path):
    assert "no SHA256SUMS and PARTS" in refused(machine, "build")
    assert "no folder" in refused(machine, "split", str(tmp_path / "nowhere"))
    assert "no folder" in refused(machine, "store", str(tmp_path / "nowhere"))
    assert "there are fetch, split, store, build, run" in refused(machine, "joined")
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(machine, "split", str(tmp_path / "empty"))
    done(machine, "split", str(sent))
    assert "holds parts already" in refused(machine, "split", str(sent))
    del machine["TAWIN_DRY_RUN"]
    assert "Transformer Engine is not built" in refused(machine, "run")
