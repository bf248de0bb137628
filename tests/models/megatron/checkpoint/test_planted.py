"""Checkpoints whose files would run code: they are refused, right checksums and all, and nothing of them runs."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from tawin_nemo.models.megatron.checkpoint.checkpoint import newest_valid
from tawin_nemo.models.megatron.checkpoint.metadata import check_engine_state, read_metadata
from tawin_nemo.util.errors import CheckpointError, TawinError
from tests.models.megatron.checkpoint.checkpoint_scene import assert_same_weights, load, save, trainable, update
from tests.planted import Trap, metadata_with, numpy_saved, pickled, sign, torch_saved

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def step(tmp_path: Path) -> Path:
    save(tmp_path / "run" / "step_1", trainable(1), step=1)
    return tmp_path / "run" / "step_1"


def _bare_metadata(step: Path, marker: Path) -> None:
    (step / ".metadata").write_bytes(pickled(marker))
    sign(step)


def _nested(step: Path, marker: Path) -> None:
    metadata_with(step, lambda metadata: setattr(metadata, "planner_data", Trap(marker)))


def _key(step: Path, marker: Path) -> None:
    def change(metadata: Metadata) -> None:
        metadata.storage_data["trap"] = Trap(marker)

    metadata_with(step, change)


def _common(step: Path, marker: Path) -> None:
    (step / "common.pt").write_bytes(torch_saved(marker))
    sign(step)


def _object_shard(step: Path, marker: Path) -> None:
    """An object of the model, which megatron-core reads with ``weights_only=False``, becomes the trap."""
    shard = step / "__0_0.distcp"
    begin, data = shard.stat().st_size, torch_saved(marker)
    with shard.open("ab") as file:
        file.write(data)

    def change(metadata: Metadata) -> None:
        kinds = metadata.state_dict_metadata
        objects = [key for key in metadata.storage_data if isinstance(kinds[key.fqn], BytesStorageMetadata)]
        assert objects, "the model has no objects; the test tests nothing"
        for key in objects:
            metadata.storage_data[key] = _StorageInfo(shard.name, begin, len(data))

    metadata_with(step, change)


def _tensor_shard(step: Path, marker: Path) -> None:
    shard = step / "__0_0.distcp"
    begin, data = shard.stat().st_size, torch_saved(marker)
    with shard.open("ab") as file:
        file.write(data)

    def change(metadata: Metadata) -> None:
        for key in metadata.storage_data:
            metadata.storage_data[key] = _StorageInfo(shard.name, begin, len(data))

    metadata_with(step, change)


def _extra_pickle(step: Path, marker: Path) -> None:
    (step / "weights.pt").write_bytes(torch_saved(marker))


def _other_backend(step: Path, marker: Path) -> None:
    (step / "metadata.json").write_text('{"sharded_backend": "zarr", "common_backend": "torch"}', encoding="utf-8")
    sign(step)


PLANTS = [_bare_metadata, _nested, _key, _common, _object_shard, _tensor_shard, _extra_pickle, _other_backend]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_checkpoint_is_refused_and_nothing_runs(
    step: Path, tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    marker, actor = tmp_path / "marker", trainable(2)
    plant(step, marker)
    with pytest.raises(TawinError, match=str(step)):
        load(step, actor)
    assert not marker.exists()


def test_the_traps_work_where_files_are_unpickled_freely(step: Path, tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    for number, plant in enumerate((_bare_metadata, _nested)):
        plant(step, tmp_path / str(number))
        pickle.loads((step / ".metadata").read_bytes())
        assert (tmp_path / str(number)).is_dir()
        if plant is _bare_metadata:
            save(step, trainable(1), step=1)
    with pytest.raises(AttributeError):
        torch.load(io.BytesIO(torch_saved(tmp_path / "2")), weights_only=False)["weight"].marker  # noqa: B018
    assert (tmp_path / "2").is_dir()
    import numpy as np

    np.load(io.BytesIO(numpy_saved(tmp_path / "3")), allow_pickle=True)
    assert (tmp_path / "3").is_dir()


def test_a_file_outside_of_the_checkpoint_is_not_opened(step: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes((step / "__0_0.distcp").read_bytes())

    def change(metadata: Metadata) -> None:
        for key, info in metadata.storage_data.items():
            metadata.storage_data[key] = _StorageInfo("../../secret", info.offset, info.length)

    metadata_with(step, change)
    with pytest.raises(CheckpointError, match=r"'\.\./\.\./secret', which is not one of the checkpoint's"):
        load(step, trainable(2))


def test_a_run_is_not_continued_from_a_planted_checkpoint(tmp_path: Path) -> None:
    """A pickle beside the files makes the newest one unusable; what can be used is the one before."""
    for number in (1, 2):
        save(tmp_path / f"step_{number}", trainable(1), step=number)
    (tmp_path / "step_2" / "hook.pkl").write_bytes(pickled(tmp_path / "marker"))
    assert newest_valid(tmp_path) == tmp_path / "step_1"
    assert not (tmp_path / "marker").exists()


def test_checkpoints_are_read_as_before(step: Path) -> None:
    """Weights, moments and step counters, through the restricted readers."""
    saved, other = trainable(1), trainable(3)
    assert load(step, other) == {"step": 1}
    assert_same_weights(saved, other)
    assert update(saved, 5) == update(other, 5)
    assert_same_weights(saved, other)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\x80\x04N.", b"}q\x00.", pickle.dumps([1]), b"garbage" * 9])
def test_metadata_in_any_other_shape_are_an_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_metadata(io.BytesIO(content), ["a"])


def _tensor_state() -> dict[str, Any]:
    return {"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1, "name": "x"}}


def test_the_state_of_an_engine_module_may_hold_tensors_only(tmp_path: Path) -> None:
    check_engine_state(pickle.dumps(_tensor_state()))
    for state in ({"recipe": Trap(tmp_path / "marker")}, _tensor_state() | {"x": torch.nn.Linear(1, 1)}):
        with pytest.raises(ValueError, match="cannot be used"):
            check_engine_state(pickle.dumps(state))
    assert not (tmp_path / "marker").exists()
