"""Full disks and paths that cannot be used: what every verb says, with which exit code, and what is left behind."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest

from tawin_nemo import cli
from tests.train.runs import SMALL, called, command, environment

FULL = [
    OSError(errno.ENOSPC, "No space left on device", "x"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("4672 requested and 4064 written"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:30])
def test_a_full_disk_is_one_whatever_the_library_calls_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for raised in (error, _wrapped(error)):

        def fails(*_: object, raised: Exception = raised) -> int:
            raise raised

        monkeypatch.setattr(cli, "_dispatch", fails)
        assert cli.main(["convert"]) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert "free space there, then run the same command again" in last
        assert str(raised) in last


def _wrapped(error: Exception) -> Exception:
    wrapped = RuntimeError("it was not written")
    wrapped.__cause__ = error
    return wrapped


def test_other_errors_are_no_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("4672 rows"), ValueError("error 28"), OSError(errno.ENOENT, "No such file", "x")):

        def fails(*_: object, raised: Exception = error) -> int:
            raise raised

        monkeypatch.setattr(cli, "_dispatch", fails)
        with pytest.raises(type(error)):
            cli.main(["convert"])


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR])
def test_a_path_that_cannot_be_used_is_named_without_a_traceback(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> int:
        raise OSError(number, os.strerror(number), "/some/where")

    monkeypatch.setattr(cli, "_dispatch", fails)
    assert cli.main(["train"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == (
        f"tawin-nemo train: /some/where cannot be used: {os.strerror(number)}; name another path, or change that one"
    )


LONG = "n" * 300


@pytest.mark.slow
def test_outputs_that_cannot_be_written_end_with_2_and_their_path(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe", f"{LONG}", "file/below"):
        done = called(f"checkpoint={finished_run / 'sft'}", f"convert.output={tmp_path / name}", verb="convert")
        assert done.returncode == 2, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert str(tmp_path / name) in done.stderr or str(tmp_path / name.split("/")[0]) in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "prepare", "tokenize"])
@pytest.mark.parametrize("where", ["file", "below a file", "too long", "device"])
def test_run_directories_that_cannot_be_used_end_with_2_and_their_path(
    tmp_path: Path, small_dataset: Path, verb: str, where: str
) -> None:
    (tmp_path / "file").write_text("kept")
    folder = {
        "file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "too long": tmp_path / LONG,
        "device": Path("/dev/null"),
    }[where]  # fmt: skip
    data = ["data.dataset=synthetic"] if verb == "prepare" else [f"data.root={small_dataset}"]
    done = called(*SMALL, *data, f"run_dir={folder}", verb=verb)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "cannot be used" in done.stderr.strip().splitlines()[-1]
    assert str(folder) in done.stderr
    assert (tmp_path / "file").read_text() == "kept"
    assert Path("/dev/null").is_char_device()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_directory_ends_with_2_and_its_path(tmp_path: Path, small_dataset: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        done = called(*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert str(tmp_path) in done.stderr
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.slow
def test_convert_removes_what_a_kill_left_behind(finished_run: Path, tmp_path: Path) -> None:
    for name in (".hf.tmpab12cd_9", ".hf.ab12cd_9.tmp.json"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, 1))
    done = called(f"checkpoint={finished_run / 'sft'}", f"convert.output={tmp_path / 'hf'}", verb="convert")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def limited(size: int, *words: str, verb: str) -> subprocess.CompletedProcess[str]:
    """The verb where no file can become larger than ``size`` bytes, as on a disk that is full at that point."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return subprocess.run(
        command(*words, verb=verb), capture_output=True, text=True, env=environment(), preexec_fn=limit, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("size", [1_000, 20_000, 100_000])
def test_convert_on_a_full_disk_says_what_to_do(finished_run: Path, tmp_path: Path, size: int) -> None:
    words = (f"checkpoint={finished_run / 'sft'}", f"convert.output={tmp_path / 'hf'}")
    done = limited(size, *words, verb="convert")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "free space there, then run the same command again" in done.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
    assert called(*words, verb="convert").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [700, 2_000, 6_000, 20_000])
def test_tokenize_on_a_full_disk_says_what_to_do(small_dataset: Path, tmp_path: Path, size: int) -> None:
    words = (f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}", "semantic_ids.codes=8")
    done = limited(size, *words, verb="tokenize")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "free space there, then run the same command again" in done.stderr.strip().splitlines()[-1]
    done = called(*words, verb="tokenize")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in (tmp_path / "run").rglob(".*")] == []
