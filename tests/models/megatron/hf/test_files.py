"""Slices of safetensors files are those that the library itself reads, and reading leaves nothing behind."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tawin_nemo.models.megatron.hf import files
from tawin_nemo.models.megatron.hf.files import HfWeights
from tawin_nemo.util.errors import CheckpointError

TENSORS, READINGS = 40, 30


def folder_with(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", files._DTYPES.values(), ids=str)
def test_slices_are_those_of_the_library(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randint(0, 255, (4, 6 * dtype.itemsize), dtype=torch.uint8)
    matrix = (values % 2).bool() if dtype is torch.bool else values.view(dtype)
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "matrix": matrix, "row": matrix[2, :5].clone()}
    weights = HfWeights(folder_with(tmp_path, tensors))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as own:
        for name, axis, start, stop in (
            ("matrix", 0, 1, 3), ("matrix", 0, 0, 4), ("matrix", 1, 2, 5), ("matrix", 1, 0, 1), ("matrix", 0, 2, 2),
            ("row", 0, 1, 4), ("row", 0, 0, 5), ("odd", 0, 2, 3),
        ):  # fmt: skip
            part = own.get_slice(name)
            expected = part[start:stop] if axis == 0 else part[:, start:stop]
            got = weights.read(name, axis, start, stop)
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert got.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8)), name
        assert weights.shape("matrix") == tuple(own.get_slice("matrix").get_shape())


def test_a_format_that_torch_lacks_and_a_tensor_that_is_missing_are_named(tmp_path: Path) -> None:
    weights = HfWeights(folder_with(tmp_path, {"a": torch.ones(2)}))
    weights._file("model.safetensors")._entries["a"]["dtype"] = "F6_E2M3"
    with pytest.raises(CheckpointError, match="a is in F6_E2M3, not in one of F64"):
        weights.read("a", 0, 0, 1)
    weights.files["b"] = "model.safetensors"
    with pytest.raises(CheckpointError, match="has no tensor b, although the index lists it"):
        weights.shape("b")


def test_reading_leaves_no_objects_behind(tmp_path: Path) -> None:
    """A server reads all tensors at every swap; two integers were left of each."""
    folder = folder_with(tmp_path, {f"layer.{number}": torch.ones(8, 8) for number in range(TENSORS)})

    def read() -> None:
        weights = HfWeights(folder)
        for name in weights.files:
            weights.shape(name)
            weights.read(name, 0, 0, 4)
            weights.read(name, 1, 2, 8)

    for _ in range(3):
        read()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(READINGS):
        read()
    gc.collect()
    assert sys.getallocatedblocks() - before < TENSORS * READINGS / 10
