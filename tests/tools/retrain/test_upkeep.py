"""List, rollback and prune of published versions, by the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tawin_nemo.cli import main
from tawin_nemo.run.published import check_version, read_version
from tawin_nemo.run.run_lock import run_lock
from tawin_nemo.tools.retrain.publish_root import EXPORT, NightlyRun, PublishRoot
from tawin_nemo.tools.retrain.verb import finished
from tawin_nemo.util.errors import CheckpointError, ConfigError
from tawin_nemo.util.files import write_json

DATES = ("2018-01-01", "2018-01-02", "2018-01-03", "2018-01-04")


def export(root: PublishRoot, day: str, *, against: str = "", start: str = "") -> None:
    """A nightly run with an export that passed the gate."""
    folder = root.run_dir(day) / EXPORT
    (folder / "index").mkdir(parents=True)
    (folder / "config.json").write_text(day, encoding="utf-8")
    (folder / "index" / "codes.npy").write_text(day, encoding="utf-8")
    verdict = {"metric": "recall@50", "candidate": {"mean": 0.25}}
    gate = {"passed": True, "against": against, "reasons": [], "verdicts": [verdict], "data": {"items": 7}}
    for place in (folder, root.run_dir(day)):
        write_json(place / "gate.json", gate)
    write_json(root.run_dir(day) / "night.json", vars(NightlyRun(day, start, "data")))


@pytest.fixture
def root(tmp_path) -> PublishRoot:
    """Four versions, each judged against the one before."""
    root, before = PublishRoot(tmp_path / "root"), ""
    for day in DATES:
        export(root, day, against=before)
        root.publish(day, against=before)
        before = day
    return root


def called(root: PublishRoot, action: str, capsys, *words: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["retrain", action, f"retrain.root={root.folder}", *words]) == code
    shown = capsys.readouterr()
    return json.loads(shown.out.splitlines()[-1]) if code == 0 else {"error": shown.err}


def live(root: PublishRoot) -> str:
    return (root.folder / "latest").resolve().name


def test_a_version_is_sealed_with_everything_in_it(root):
    about = check_version(root.version(DATES[1]))
    assert (about["date"], about["against"]) == (DATES[1], DATES[0])
    assert sorted(about["files"]) == ["config.json", "gate.json", "index/codes.npy"]
    (root.version(DATES[1]) / "index" / "codes.npy").write_text("other", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index/codes.npy is damaged"):
        check_version(root.version(DATES[1]))
    (root.version(DATES[1]) / "index" / "codes.npy").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_version(root.version(DATES[1]))
    assert read_version(root.version(DATES[2]))["against"] == DATES[1]


def test_list_shows_what_is_live_and_what_was_refused(root, capsys):
    write_json(root.run_dir("2018-01-05") / "gate.json", {"passed": False, "reasons": ["recall@50: worse"]})
    result = called(root, "list", capsys)
    assert result["live"] == DATES[3]
    assert [(one["date"], one["live"], one["before"]) for one in result["versions"]] == [
        (DATES[0], False, ""), (DATES[1], False, DATES[0]), (DATES[2], False, DATES[1]), (DATES[3], True, DATES[2]),
    ]  # fmt: skip
    assert result["versions"][3]["metrics"] == {"recall@50": 0.25}
    assert result["versions"][3]["data"] == {"items": 7}
    assert result["refused"] == [{"date": "2018-01-05", "reasons": ["recall@50: worse"]}]


def test_rollback_makes_the_version_before_live_and_the_next_night_starts_from_it(root, capsys):
    assert called(root, "rollback", capsys)["rolled_back"] == DATES[3]
    assert live(root) == DATES[2]
    assert [one["rolled_back"] for one in called(root, "list", capsys)["versions"]] == [False, False, False, True]
    with pytest.raises(ConfigError, match=f"version of retrain.date={DATES[3]} was taken back"):
        finished(root, DATES[3])  # a requeued job must not publish it again
    assert finished(root, "2018-01-05") is None
    run = root.nightly_run("2018-01-05", lambda folder: folder, warm=True)
    assert Path(run.start).name == DATES[2]
    export(root, "2018-01-05", against=DATES[2])
    root.publish("2018-01-05", against=DATES[2])
    assert called(root, "rollback", capsys)["latest"].endswith(DATES[2])  # not the one that was taken back
    assert called(root, "rollback", capsys, f"retrain.date={DATES[3]}")["latest"].endswith(DATES[3])
    assert finished(root, DATES[3])["published"]
    for _ in range(3):
        called(root, "rollback", capsys)
    assert live(root) == DATES[0]
    assert "there is no version before 2018-01-01" in called(root, "rollback", capsys, code=2)["error"]
    assert "no such version" in called(root, "rollback", capsys, "retrain.date=2017-01-01", code=2)["error"]
    assert live(root) == DATES[0]


def test_a_broken_version_is_not_gone_back_to(root, capsys):
    (root.version(DATES[2]) / "config.json").write_text("edited", encoding="utf-8")
    assert "config.json is damaged" in called(root, "rollback", capsys, code=1)["error"]
    assert live(root) == DATES[3]
    called(root, "rollback", capsys, f"retrain.date={DATES[1]}")
    assert live(root) == DATES[1]


def test_a_rollback_does_not_wait_for_a_night_that_trains_but_for_one_that_publishes(root, capsys):
    with run_lock(root.folder, "retrain"):
        called(root, "rollback", capsys)
    assert live(root) == DATES[2]
    with root.changing("retrain"):
        assert "retrain" in called(root, "rollback", capsys, code=2)["error"]
    assert live(root) == DATES[2]


def test_prune_keeps_the_newest_the_live_one_and_the_one_before_it(root, capsys):
    assert called(root, "prune", capsys, "retrain.keep=3") == {"kept": list(DATES[1:]), "removed": [DATES[0]]}
    assert not root.run_dir(DATES[0]).exists()
    assert called(root, "prune", capsys, "retrain.keep=1")["kept"] == list(DATES[2:])
    called(root, "rollback", capsys)
    called(root, "prune", capsys, "retrain.keep=1")
    assert root.dates() == list(DATES[2:])  # the live one is older than the newest
    assert (root.run_dir(DATES[2]) / "night.json").is_file()


def test_prune_keeps_what_an_unfinished_night_started_from(root, capsys):
    write_json(
        root.run_dir("2018-01-05") / "night.json", vars(NightlyRun("2018-01-05", str(root.version(DATES[0])), "data"))
    )
    write_json(root.run_dir("2018-01-03T") / "night.json", {})  # an old refused one, of a date without a version
    result = called(root, "prune", capsys, "retrain.keep=1")
    assert result == {"kept": [DATES[0], *DATES[2:]], "removed": ["2018-01-02", "2018-01-03T"]}
    assert root.run_dir("2018-01-05").is_dir()


def test_a_removal_that_was_killed_leaves_no_version_and_is_finished(root, capsys):
    root.version(DATES[0]).rename(root.version(DATES[0]).with_name(f".removed.{DATES[0]}"))
    assert root.dates() == list(DATES[1:])
    called(root, "prune", capsys)
    assert sorted(os.listdir(root.folder / "versions")) == list(DATES[1:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["undo"], "no such action; use one of list, rollback, prune"),
        (["list"], "retrain.root= is no folder"),
        (["list", "retrain.root=nowhere"], "retrain.root=nowhere is no folder"),
        (["prune", "retrain.kep=3"], "did you mean"),
    ],
)
def test_mistakes_are_told(words, said, capsys):
    assert main(["retrain", *words]) == 2
    assert said in capsys.readouterr().err


def test_there_is_nothing_to_go_back_from_before_the_first_publication(tmp_path, capsys):
    root = PublishRoot(tmp_path)
    assert "nothing is published" in called(root, "rollback", capsys, code=2)["error"]
    assert called(root, "list", capsys) == {"live": "", "refused": [], "versions": []}
    assert called(root, "prune", capsys)["removed"] == []
