"""Flat pieces of the optimizer's state as blocks of the parameters' tensors, against the gathered form, bit for bit.

Several processes are in tests/distributed/test_checkpoint_layouts.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from tawin_nemo.models.megatron.checkpoint import flat_pieces
from tawin_nemo.models.megatron.optim.trainable import Trainable
from tawin_nemo.util.errors import CheckpointError
from tests.models.megatron.checkpoint import gathered
from tests.models.megatron.checkpoint.checkpoint_scene import assert_same_weights, load, save, trainable, update
from tests.planted import metadata_with

pytestmark = pytest.mark.usefixtures("one_process")


def moments(actor: Trainable) -> list[torch.Tensor]:
    """Master weight, moments and step counter of every parameter."""
    (part,) = actor.optimizer.chained_optimizers
    states = [
        (parameter, part.optimizer.state[parameter]) for group in part.param_groups for parameter in group["params"]
    ]
    return [tensor for parameter, state in states for tensor in (parameter, *(state[key] for key in sorted(state)))]


def assert_same_state(one: Trainable, other: Trainable) -> None:
    assert_same_weights(one, other)
    left, right = moments(one), moments(other)
    assert len(left) == len(right) > 0
    assert all(torch.equal(first, second) for first, second in zip(left, right, strict=True))


@pytest.mark.parametrize("shape", [(7,), (4, 3), (1, 5), (3, 2, 4), (2, 1, 3)])
@pytest.mark.parametrize("limit", [1, 2, 4, 100])
def test_blocks_are_the_range_in_order(shape: tuple[int, ...], limit: int) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for stop in range(start, numbers.size + 1):
            found = list(flat_pieces.blocks(shape, start, stop, limit))
            parts = [
                numbers[tuple(slice(offset, offset + size) for offset, size in zip(*block, strict=True))].ravel()
                for block in found
            ]
            assert np.concatenate([*parts, np.zeros(0, int)]).tolist() == list(range(start, stop))
            assert all(0 < len(part) <= limit for part in parts)
    assert len(list(flat_pieces.blocks(shape, 0, numbers.size))) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("limit", [10, 2**24], ids=["small-blocks", "one-block-each"])
def test_the_gathered_form_is_read_and_reads_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, precision: str
) -> None:
    monkeypatch.setattr(flat_pieces, "BLOCK", limit)
    first = trainable(3, distributed=True, precision=precision)
    update(first, 0)
    with gathered.saving():
        save(tmp_path / "whole" / "step_1", first, step=1)
    save(tmp_path / "pieces" / "step_1", first, step=1)
    for name in ("whole", "pieces"):
        second, third = (trainable(seed, distributed=True, precision=precision) for seed in (4, 5))
        load(tmp_path / name / "step_1", second)
        assert_same_state(first, second)
        with gathered.loading():
            load(tmp_path / name / "step_1", third)
        assert_same_state(first, third)


def test_loading_fills_the_optimizers_own_tensors(tmp_path: Path) -> None:
    """A rank makes no tensor of its own to read into, however large a parameter is."""
    save(tmp_path / "step_1", trainable(3, distributed=True))
    second = trainable(4, distributed=True)
    update(second, 9)
    before = [tensor.data_ptr() for tensor in moments(second) if tensor.numel() > 1]
    load(tmp_path / "step_1", second)
    assert [tensor.data_ptr() for tensor in moments(second) if tensor.numel() > 1] == before


def test_a_tensor_with_a_gap_is_an_error(tmp_path: Path) -> None:
    """A part that no file holds would stay what it was before, in silence."""
    first = trainable(3, distributed=True)
    save(tmp_path / "step_1", first)

    def drop(metadata: Metadata) -> None:
        for kind in metadata.state_dict_metadata.values():
            chunks = getattr(kind, "chunks", [])
            del chunks[:1]

    metadata_with(tmp_path / "step_1", drop)
    with pytest.raises(
        CheckpointError, match=r"\.metadata does not list \d+ of the elements of \S+ that are read here"
    ):
        load(tmp_path / "step_1", first)
