"""eSASRec's LiGR layers against their definition, item by item in float64; their gradients."""

import math

import torch

from tawin_nemo.baselines.esasrec import ESASRec, LiGRLayer
from tawin_nemo.types import NO_ITEM
from tests.baselines.test_hstu import CLOSE, normed, silu, times


def linear(part: torch.nn.Linear, row: list[float]) -> list[float]:
    bias = [0.0] * part.out_features if part.bias is None else part.bias.tolist()
    return [value + b for value, b in zip(times(part.weight.tolist(), row), bias, strict=True)]


def affine(part: torch.nn.LayerNorm, row: list[float]) -> list[float]:
    return [
        w * value + b for w, b, value in zip(part.weight.tolist(), part.bias.tolist(), normed(row), strict=True)
    ]  # fmt: skip


def gated(gate: torch.nn.Linear, row: list[float], branch: list[float]) -> list[float]:
    """row + sigmoid(row W + b) * branch"""
    shares = [1.0 / (1.0 + math.exp(-value)) for value in linear(gate, row)]
    return [value + share * part for value, share, part in zip(row, shares, branch, strict=True)]


def slow_layer(layer: LiGRLayer, x: list[list[float]]) -> list[list[float]]:
    width, size = len(x[0]), len(x[0]) // layer.heads
    qkv = [linear(layer.qkv, affine(layer.norm_attention, row)) for row in x]
    result = []
    for place, row in enumerate(x):
        read = [0.0] * width
        for head in range(layer.heads):
            columns = range(head * size, (head + 1) * size)
            match = [
                math.exp(sum(qkv[place][c] * qkv[other][width + c] for c in columns) / math.sqrt(size))
                for other in range(place + 1)
            ]
            for other in range(place + 1):
                for c in columns:
                    read[c] += match[other] / sum(match) * qkv[other][2 * width + c]
        row = gated(layer.gate_attention, row, linear(layer.merge, read))
        wide = linear(layer.widen, affine(layer.norm_feed, row))
        half = len(wide) // 2
        fed = linear(layer.narrow, [silu(one) * two for one, two in zip(wide[:half], wide[half:], strict=True)])
        result.append(gated(layer.gate_feed, row, fed))
    return result


def test_states_are_those_of_the_definition():
    torch.manual_seed(3)
    model = ESASRec(7, hidden=8, layers=2, heads=2, max_history=5, dropout=0.0).double().eval()
    with torch.no_grad():
        for weight in model.layers.parameters():
            weight.normal_(std=0.5)
    items = [4, 0, 6, 6]
    table, places = model.items.weight.tolist(), model.positions.weight.tolist()
    x = [[e + p for e, p in zip(table[i + 1], places[n], strict=True)] for n, i in enumerate(items)]
    for layer in model.layers:
        x = slow_layer(layer, x)
    states_BLD = model.states(torch.tensor([[*items, NO_ITEM]]))
    torch.testing.assert_close(states_BLD[0, :4], torch.tensor(x, dtype=torch.float64), **CLOSE)


def test_gradients_of_a_layer():
    torch.manual_seed(5)
    layer = LiGRLayer(4, heads=2, dropout=0.0).double()
    names = [name for name, _ in layer.named_parameters()]
    weights = [torch.randn_like(weight, requires_grad=True) for weight in layer.parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x_BLD = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x_BLD, *weights), fast_mode=True)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(3)
    model = ESASRec(7, hidden=8, layers=1, heads=2, max_history=5, dropout=0.5)
    history_BL = torch.tensor([[1, 2, 3]])
    trained = [model.train().scores(history_BL) for _ in range(2)]
    assert not torch.equal(*trained)
    ranked = [model.eval().scores(history_BL) for _ in range(2)]
    assert torch.equal(*ranked)
