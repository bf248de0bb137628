"""A file or folder is whole or not there, whatever interrupts its writing."""

import os
import signal
import subprocess
import sys

import pytest

from tawin_nemo.util.files import atomic_directory, atomic_path, sha256, write_json


def test_an_error_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    before = sha256(path)

    def fail_half_way() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert sha256(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "folder") as temporary:
            (temporary / text).write_text(text)
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_sigkill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.txt"
    path.write_text("old")
    program = (
        "import os, signal, sys; from pathlib import Path; from tawin_nemo.util.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=os.environ, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
