"""Files are opened below the roots only: links are followed when a file is opened, not when its name is checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tawin_nemo.util.errors import UserError
from tawin_nemo.util.trusted import OutsideRoots, confined, open_trusted, read_text, refuse_pickles, trusted_name


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    (root / "inside.txt").write_text("inside")
    (tmp_path / "secret.txt").write_text("secret")
    return root


def test_links_are_followed_to_what_is_opened(roots: Path) -> None:
    (roots / "out.txt").symlink_to(roots.parent / "secret.txt")
    (roots / "in.txt").symlink_to(roots / "inside.txt")
    (roots / "folder").symlink_to(roots.parent)
    with confined([roots]):
        assert read_text(roots / "in.txt") == "inside"
        for name in ("out.txt", "folder/secret.txt", "../secret.txt"):
            with pytest.raises(OutsideRoots, match=r"outside of serve\.roots"):
                read_text(roots / name)
    assert read_text(roots / "out.txt") == "secret"  # what a user names on his command line is his own matter


def test_a_link_that_changes_after_the_check_is_seen(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is exchanged for a link between the check of its name and the opening of the file."""
    (roots / "weights").mkdir()
    (roots / "weights" / "secret.txt").write_text("harmless")
    original = Path.open

    def exchanging(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "secret.txt" and not (roots / "weights").is_symlink():
            (roots / "weights").rename(roots / "aside")
            (roots / "weights").symlink_to(roots.parent)
        return original(path, *args, **options)

    monkeypatch.setattr(Path, "open", exchanging)
    with confined([roots]), pytest.raises(OutsideRoots):
        read_text(roots / "weights" / "secret.txt")


def test_libraries_get_the_file_that_was_checked(roots: Path) -> None:
    link = roots / "link.txt"
    link.symlink_to(roots / "inside.txt")
    with confined([roots]), trusted_name(link) as name:
        link.unlink()
        link.symlink_to(roots.parent / "secret.txt")
        assert Path(name).read_text() == "inside"
    with trusted_name(link) as name:
        assert name == str(link)


def test_pipes_and_devices_are_no_files(roots: Path) -> None:
    os.mkfifo(roots / "pipe")
    with confined([roots, Path("/dev")]):
        for path in (roots / "pipe", Path("/dev/zero"), roots):
            with pytest.raises(UserError, match="is no file"), open_trusted(path):
                pass
        with pytest.raises(FileNotFoundError):
            read_text(roots / "absent")


def test_pickles_in_a_folder_are_named(roots: Path) -> None:
    refuse_pickles(roots)
    refuse_pickles(roots / "absent")
    (roots / "common.pt").touch()
    refuse_pickles(roots, known=("common.pt",))
    for name in ("a.PTH", "b.bin", "c.pkl", "d.ckpt"):
        (roots / name).touch()
        with pytest.raises(UserError, match=name):
            refuse_pickles(roots, known=("common.pt",))
        (roots / name).unlink()
