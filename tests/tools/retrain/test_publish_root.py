"""The folder: one start per date, and a link that always points at something."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tawin_nemo.tools.retrain.publish_root import EXPORT, PublishRoot
from tawin_nemo.util.errors import DataError


def exported(root: PublishRoot, day: str) -> None:
    folder = root.run_dir(day) / EXPORT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(day, encoding="utf-8")


@pytest.fixture
def root(tmp_path) -> PublishRoot:
    root = PublishRoot(tmp_path / "root")
    exported(root, "2018-01-01")
    root.publish("2018-01-01")
    return root


def test_publishing_moves_the_export_and_the_link(root):
    assert root.published() == root.version("2018-01-01").resolve()
    exported(root, "2018-01-02")
    assert (root.latest / "config.json").read_text(encoding="utf-8") == "2018-01-01"
    root.publish("2018-01-02")
    assert (root.latest / "config.json").read_text(encoding="utf-8") == "2018-01-02"
    assert (root.version("2018-01-01") / "config.json").is_file()
    assert sorted(path.name for path in root.folder.iterdir()) == ["latest", "runs", "versions"]


def test_a_nightly_run_killed_between_move_and_link_is_published_by_the_next_attempt(root):
    exported(root, "2018-01-02")
    (root.run_dir("2018-01-02") / EXPORT).rename(root.version("2018-01-02"))
    assert root.published() == root.version("2018-01-01").resolve()
    root.publish("2018-01-02")
    root.publish("2018-01-02")
    assert root.published() == root.version("2018-01-02").resolve()


def test_the_link_can_be_moved_with_the_whole_folder(root, tmp_path):
    root.folder.rename(tmp_path / "moved")
    assert (PublishRoot(tmp_path / "moved").latest / "config.json").is_file()


def test_a_nightly_run_keeps_what_it_began_from(root, tmp_path):
    def find(run_dir: Path) -> Path:
        found.append(run_dir)
        return tmp_path / "data"

    found: list[Path] = []
    begun = root.nightly_run("2018-01-02", find, warm=True)
    assert Path(begun.start) == root.version("2018-01-01").resolve()
    exported(root, "2018-01-03")
    root.publish("2018-01-03")  # another run comes first
    assert root.nightly_run("2018-01-02", find, warm=True) == begun
    assert found == [root.run_dir("2018-01-02")]
    assert root.nightly_run("2018-01-04", find, warm=False).start == ""


def test_a_link_to_nothing_is_not_taken_for_no_publication(root):
    shutil.rmtree(root.version("2018-01-01"))
    with pytest.raises(DataError, match="latest must be a symbolic link"):
        root.published()
