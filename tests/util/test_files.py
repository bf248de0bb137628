"""A file or folder is whole or not there, whatever interrupts its writing."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

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


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=["022", "077", "002"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_and_directories_have_the_rights_that_the_umask_leaves(tmp_path: Path, umask: int):
    """Whoever wrote them: safetensors creates files for their owner alone, and copies bring rights of their own."""
    write_json(tmp_path / "new" / "value.json", {"a": 1})
    with atomic_path(tmp_path / "weights.safetensors") as temporary:
        save_file({"a": np.zeros(3)}, temporary)
    with atomic_directory(tmp_path / "folder") as folder:
        save_file({"a": np.zeros(3)}, folder / "weights.safetensors")
        (folder / "inner").mkdir(mode=0o700)
        (folder / "inner" / "wide.txt").write_text("wide")
        (folder / "inner" / "wide.txt").chmod(0o777)
    for path in tmp_path.rglob("*"):
        assert rights(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert not list(tmp_path.rglob(".*"))


def test_a_file_that_is_replaced_gets_the_rights_of_a_new_one(tmp_path: Path, umask: int):
    path = tmp_path / "value.json"
    path.write_text("{}")
    path.chmod(0o600)
    write_json(path, {"a": 1})
    assert rights(path) == 0o666 & ~umask


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
