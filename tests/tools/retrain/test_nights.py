"""The folder: one start per date, and a link that always points at something."""

from __future__ import annotations

from pathlib import Path

import pytest

from tawin_nemo.tools.retrain.nights import EXPORT, Place, checked_date
from tawin_nemo.util.errors import ConfigError, DataError


def exported(place: Place, day: str) -> None:
    folder = place.run_dir(day) / EXPORT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(day, encoding="utf-8")


@pytest.fixture
def place(tmp_path) -> Place:
    place = Place(tmp_path / "root")
    exported(place, "2018-01-01")
    place.publish("2018-01-01")
    return place


def test_publishing_moves_the_export_and_the_link(place):
    assert place.published() == place.version("2018-01-01").resolve()
    exported(place, "2018-01-02")
    assert (place.latest / "config.json").read_text(encoding="utf-8") == "2018-01-01"
    place.publish("2018-01-02")
    assert (place.latest / "config.json").read_text(encoding="utf-8") == "2018-01-02"
    assert (place.version("2018-01-01") / "config.json").is_file()
    assert sorted(path.name for path in place.root.iterdir()) == ["latest", "runs", "versions"]


def test_a_night_killed_between_move_and_link_is_published_by_the_next_attempt(place):
    exported(place, "2018-01-02")
    (place.run_dir("2018-01-02") / EXPORT).rename(place.version("2018-01-02"))
    assert place.published() == place.version("2018-01-01").resolve()
    place.publish("2018-01-02")
    place.publish("2018-01-02")
    assert place.published() == place.version("2018-01-02").resolve()


def test_the_link_can_be_moved_with_the_whole_folder(place, tmp_path):
    place.root.rename(tmp_path / "moved")
    assert (Place(tmp_path / "moved").latest / "config.json").is_file()


def test_a_night_keeps_what_it_began_from(place, tmp_path):
    def find(run_dir: Path) -> Path:
        found.append(run_dir)
        return tmp_path / "data"

    found: list[Path] = []
    begun = place.night("2018-01-02", find, warm=True)
    assert Path(begun.start) == place.version("2018-01-01").resolve()
    exported(place, "2018-01-03")
    place.publish("2018-01-03")  # another night comes first
    assert place.night("2018-01-02", find, warm=True) == begun
    assert found == [place.run_dir("2018-01-02")]
    assert place.night("2018-01-04", find, warm=False).start == ""


def test_a_link_to_nothing_is_not_taken_for_no_publication(place):
    (place.version("2018-01-01") / "config.json").unlink()
    place.version("2018-01-01").rmdir()
    with pytest.raises(DataError, match="latest must be a symbolic link"):
        place.published()


def test_dates():
    assert checked_date("2018-02-28") == "2018-02-28"
    assert len(checked_date("")) == 10
    for wrong in ("2018-02-30", "yesterday", "18-2-3"):
        with pytest.raises(ConfigError, match=r"retrain\.date"):
            checked_date(wrong)
