"""A file or folder is whole or not there, whatever interrupts its writing."""

import os
import signal
import subprocess
import sys

import pytest

from tawin_nemo.util.files import atomic_directory, atomic_path, remove_leftovers, sha256, write_json


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


def test_a_device_or_a_folder_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(IsADirectoryError, match=f"is no regular file: '{tmp_path / name}'"):
            write_json(tmp_path / name, 1)
    (tmp_path / "file").touch()
    for name in ("pipe", "file"):
        with pytest.raises(NotADirectoryError, match=name), atomic_directory(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]


def test_leftovers_of_one_output_are_removed_and_nothing_else(tmp_path):
    for name in (".out.tmpab12cd_9", ".out.ab12cd_9.tmp.json", ".out.old", ".other.tmpab12cd_9", ".out.tmp", ".outer"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".out.tmpyoung123").mkdir()
    remove_leftovers(tmp_path, before=2.0, name="out")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".other.tmpab12cd_9", ".out.old", ".out.tmp", ".out.tmpyoung123", ".outer"]
    (tmp_path / "out").mkdir()
    remove_leftovers(tmp_path, before=2.0, name="out")
    assert ".out.old" not in [path.name for path in tmp_path.iterdir()]
