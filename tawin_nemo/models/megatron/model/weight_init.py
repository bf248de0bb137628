"""Initial weights, drawn block by block, so that no rank holds a whole matrix of which it keeps a shard.

The values are those of one draw of the whole matrix. torch fills 16 values at a time from a generator's stream, and
draws the last 16 again where the number of values is no multiple of 16; blocks of 16 rows keep to that grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Values per block (16 MB of float32).
_BLOCK = 4 * 1024 * 1024
_GRID = 16


@dataclass(frozen=True)
class Piece:
    """Rows ``start:stop`` of the whole matrix, from ``column`` on, lie at row ``local`` of the shard."""

    start: int
    stop: int
    local: int
    column: int = 0


def blocks(rows: int, columns: int, std: float, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """(first row, block) of a matrix of Normal(0, std) in float32 on the CPU."""
    step = max(_GRID, _BLOCK // columns // _GRID * _GRID)
    start = 0
    while start < rows:
        stop = start + step
        if (rows - stop) * columns < _GRID:  # too short for torch's grid: it would draw these one by one
            stop = rows
        stop = min(stop, rows)
        yield start, torch.empty(stop - start, columns).normal_(0.0, std, generator=generator)
        start = stop


def shard_pieces(name: str, parameter: Tensor, axis: int | None, rank: int, size: int) -> list[Piece]:
    """The pieces of a matrix, split along ``axis``, that TP rank ``rank`` of ``size`` holds.

    ``linear_fc1`` has a gate and an up half, each of which is cut.
    """
    rows, columns = parameter.shape
    if size == 1 or axis is None:
        return [Piece(0, rows, 0)]
    if axis == 1:
        return [Piece(0, rows, 0, rank * columns)]
    if name.endswith("linear_fc1.weight"):
        width = rows // 2
        starts = (rank * width, (size + rank) * width)
        return [Piece(start, start + width, half * width) for half, start in enumerate(starts)]
    return [Piece(rank * rows, (rank + 1) * rows, 0)]


@torch.no_grad()
def fill(parameter: Tensor, pieces: list[Piece], whole: tuple[int, int], *, std: float, key: str) -> None:
    """Draw the ``whole`` (rows, columns) matrix of ``key`` and keep ``pieces``; what no piece covers becomes 0."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    parameter.zero_()
    last = max(piece.stop for piece in pieces)
    for first, block in blocks(*whole, std, generator):
        if first >= last:
            return
        for piece in pieces:
            low, high = max(piece.start, first), min(piece.stop, first + len(block))
            if low < high:
                row = piece.local + low - piece.start
                columns = slice(piece.column, piece.column + parameter.shape[1])
                parameter[row : row + high - low].copy_(block[low - first : high - first, columns])
