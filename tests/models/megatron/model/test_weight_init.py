"""Weights drawn in blocks are those of one draw of the whole matrix."""

from __future__ import annotations

import hashlib

import pytest
import torch

from tawin_nemo.models.megatron.model import weight_init


def drawn_at_once(rows: int, columns: int, key: str) -> torch.Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(rows, columns).normal_(0.0, 0.5, generator=generator)


@pytest.mark.parametrize(
    ("rows", "columns"), [(200, 33), (193, 7), (1, 5), (3, 5), (64, 16), (161, 1), (177, 1), (48, 100)]
)
def test_blocks_are_one_draw(rows: int, columns: int, monkeypatch):
    monkeypatch.setattr(weight_init, "_BLOCK", 16 * columns * 2)
    parameter = torch.full((rows, columns), 7.0)
    weight_init.fill(parameter, [weight_init.Piece(0, rows, 0)], (rows, columns), std=0.5, key="k")
    assert torch.equal(parameter, drawn_at_once(rows, columns, "k"))


def filled(name: str, shape: tuple[int, int], axis: int, rank: int, whole: tuple[int, int]) -> torch.Tensor:
    parameter = torch.full(shape, 7.0)
    weight_init.fill(parameter, weight_init.shard_pieces(name, parameter, axis, rank, 2), whole, std=0.5, key="k")
    return parameter


def test_shards_are_parts_of_the_whole(monkeypatch):
    monkeypatch.setattr(weight_init, "_BLOCK", 16 * 6)
    whole = drawn_at_once(80, 6, "k")
    rows = [filled("linear_qkv.weight", (40, 6), 0, rank, (80, 6)) for rank in (0, 1)]
    assert torch.equal(torch.cat(rows), whole)
    columns = [filled("linear_proj.weight", (80, 3), 1, rank, (80, 6)) for rank in (0, 1)]
    assert torch.equal(torch.cat(columns, 1), whole)
    gated = [filled("linear_fc1.weight", (40, 6), 0, rank, (80, 6)) for rank in (0, 1)]
    halves = [torch.cat([part[:20] for part in gated]), torch.cat([part[20:] for part in gated])]
    assert torch.equal(torch.cat(halves), whole)


def test_padding_rows_are_zero():
    second = filled("word_embeddings.weight", (30, 4), 0, 1, (50, 4))
    assert torch.equal(second[:20], drawn_at_once(50, 4, "k")[30:])
    assert not second[20:].any()
