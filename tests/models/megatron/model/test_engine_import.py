"""A Transformer Engine that is installed in part: megatron-core cannot be imported beside it, which a run must say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tawin_nemo.models.megatron.model.precision import check_engine_import
from tawin_nemo.util.errors import ConfigError

UNDEFINED = "ImportError('transformer_engine_torch.so: undefined symbol: _ZN3c10')"


def install(folder: Path, core: str = "", torch: str = "") -> None:
    """A package whose core or torch extension raises; nothing raised = it imports."""
    package = folder / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    for path, error in ((package, core), (package / "pytorch", torch)):
        (path / "__init__.py").write_text(f"raise {error}\n" if error else "", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
            del sys.modules[name]

    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield tmp_path
    forget()


@pytest.mark.parametrize(
    ("core", "torch", "what"),
    [
        ("", UNDEFINED, r"import transformer_engine\.pytorch fails with ImportError: transformer_engine_torch\.so"),
        ("OSError('libcudart.so.12: cannot open')", "", r"import transformer_engine fails with OSError: libcudart"),
    ],
)
def test_the_error_names_module_cause_and_remedy(folder, core, torch, what):
    install(folder, core, torch)
    with pytest.raises(
        ConfigError, match=f"^Transformer Engine is installed in part: {what}.*install_gpu.sh.*uninstall"
    ):
        check_engine_import()


@pytest.mark.parametrize("core", ["", "ImportError('no core')"])  # megatron does without the second
def test_a_whole_one_or_none_passes(folder, core):
    check_engine_import()
    install(folder, core)
    check_engine_import()


def test_a_run_ends_with_that_message_and_exit_code_2(folder):
    install(folder, torch=UNDEFINED)
    words = [sys.executable, "-m", "tawin_nemo", "train", f"run_dir={folder / 'run'}", "data.dataset=synthetic"]
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("tawin-nemo train: Transformer Engine is installed in part: ")
    assert "Traceback" not in done.stderr
