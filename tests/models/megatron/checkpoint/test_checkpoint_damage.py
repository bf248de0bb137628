"""Checkpoints that are damaged, half written, or have no room on the disk: what is used instead, and what is said."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.checkpoint import files as checkpoint_files
from tawin_nemo.models.megatron.checkpoint.checkpoint import find_problem, list_checkpoints, newest_valid, prune
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.util.errors import CheckpointError
from tests import failpoints
from tests.models.megatron.checkpoint.checkpoint_scene import load, save

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the checkpoint module logs."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(checkpoint.__name__)
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _edit_state(path: Path) -> None:
    record = json.loads(path.read_text())
    record["state"]["step"] = 7
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("__0_0.distcp", _truncate, "bytes instead of"),
        ("__0_0.distcp", _flip, "checksum of __0_0.distcp is wrong"),
        (".metadata", _flip, "checksum of .metadata is wrong"),
        ("common.pt", Path.unlink, "common.pt is missing"),
        ("state.json", Path.unlink, "state.json is missing"),
        ("state.json", _truncate, "state.json is damaged"),
        ("state.json", _edit_state, "checksum of state.json is wrong"),
    ],
)
def test_damage_is_found_and_the_previous_one_used(
    two: tuple[Path, Trainable], messages: list[str], name: str, damage: Callable[[Path], None], said: str
) -> None:
    folder, actor = two
    assert newest_valid(folder) == folder / "step_2"
    assert messages == []
    damage(folder / "step_2" / name)
    with pytest.raises(CheckpointError, match=said):
        load(folder / "step_2", actor)
    assert newest_valid(folder) == folder / "step_1"
    assert len(messages) == 1
    assert str(folder / "step_2") in messages[0]
    assert f"continuing from {folder / 'step_1'}" in messages[0]
    assert said in messages[0]
    assert load(folder / "step_1", actor) == {"step": 1}


def test_nothing_valid(two: tuple[Path, Trainable], messages: list[str], tmp_path: Path) -> None:
    folder, _ = two
    assert newest_valid(tmp_path / "absent") is None
    for step in (1, 2):
        (folder / f"step_{step}" / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"is whole: .*step_2 .*common.pt is missing.*step_1 .*remove") as raised:
        newest_valid(folder)
    assert str(folder.parent) in str(raised.value)
    assert messages == []


@pytest.mark.parametrize(
    ("module", "name"), [(checkpoint, "sharded_state"), (checkpoint_files, "digests"), (checkpoint_files, "fsync_path")]
)
def test_an_interrupted_save_leaves_the_old_one(
    two: tuple[Path, Trainable], monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    folder, actor = two

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for step in (2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                save(folder / f"step_{step}", actor, step=30)
    assert [step for step, _ in list_checkpoints(folder)] == [1, 2]
    assert find_problem(folder / "step_2") is None
    assert load(folder / "step_2", actor) == {"step": 2}
    save(folder / "step_3", actor, step=3)  # over the left-over temporary
    assert load(newest_valid(folder) or folder, actor) == {"step": 3}


def test_a_kill_between_the_two_renames_loses_nothing(two: tuple[Path, Trainable]) -> None:
    """The old step_2 has been moved away, the new one is not in its place yet."""
    folder, actor = two

    def killed() -> None:
        raise KeyboardInterrupt

    with failpoints.calling("save.replacing", killed), pytest.raises(KeyboardInterrupt):
        save(folder / "step_2", actor, step=20)
    assert [step for step, _ in list_checkpoints(folder)] == [1]
    assert newest_valid(folder) == folder / "step_2"
    assert load(folder / "step_2", actor) == {"step": 2}


def test_what_was_passed_over_is_set_aside_until_the_next_save(two: tuple[Path, Trainable]) -> None:
    folder, _ = two
    _truncate(folder / "step_2" / "__0_0.distcp")
    assert newest_valid(folder) == folder / "step_1"
    checkpoint.set_aside(folder, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["step_1", "step_2.damaged"]
    prune(folder, keep_last=1, keep=set())
    assert [path.name for path in folder.iterdir()] == ["step_1"]


def test_a_full_disk_is_explained_and_leaves_the_old_one(two: tuple[Path, Trainable]) -> None:
    folder, actor = two
    failpoints.arm("save.mid_shard=enospc")
    try:
        with pytest.raises(
            CheckpointError, match=r"step_3 could not be written .*No space left.*untouched.*free space"
        ):
            save(folder / "step_3", actor)
    finally:
        failpoints.arm("")
    assert newest_valid(folder) == folder / "step_2"
