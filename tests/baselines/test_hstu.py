"""HSTU against the paper's equations, item by item in float64; its gradients and scores."""

import math

import pytest
import torch

from tawin_nemo.baselines.hstu import HSTU, HSTULayer
from tawin_nemo.types import NO_ITEM

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def silu(value: float) -> float:
    return value / (1.0 + math.exp(-value))


def normed(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row) + 1e-5)
    return [(value - mean) / deviation for value in row]


def times(weight: list[list[float]], row: list[float]) -> list[float]:
    return [sum(w * value for w, value in zip(line, row, strict=True)) for line in weight]


def slow_layer(layer: HSTULayer, x: list[list[float]]) -> list[list[float]]:
    """Eq. 1-3 with loops over items, heads and widths."""
    width, size = len(x[0]), len(x[0]) // layer.heads
    weight, bias = layer.project.weight.tolist(), layer.distance_bias.tolist()
    parts = [[silu(value) for value in times(weight, normed(row))] for row in x]
    result = []
    for place, row in enumerate(x):
        read = [0.0] * width
        for head in range(layer.heads):
            columns = range(head * size, (head + 1) * size)
            for other in range(place + 1):
                match = sum(parts[place][2 * width + c] * parts[other][3 * width + c] for c in columns)
                share = silu(match + bias[place - other]) / layer.max_history
                for c in columns:
                    read[c] += share * parts[other][width + c]
        gated = [value * parts[place][c] for c, value in enumerate(normed(read))]
        out = times(layer.out.weight.tolist(), gated)
        result.append([row[c] + out[c] + layer.out.bias[c].item() for c in range(width)])
    return result


def model_of(**options) -> HSTU:
    torch.manual_seed(3)
    model = HSTU(7, hidden=8, layers=2, heads=2, max_history=5, dropout=0.0, **options).double().eval()
    with torch.no_grad():  # fresh weights are so small that the residual would hide a mistake
        for layer in model.layers:
            layer.project.weight.normal_(std=0.5)
            layer.distance_bias.normal_()
    return model


def test_states_are_those_of_the_equations():
    model = model_of()
    items = [4, 0, 6, 6]
    table, places = model.items.weight.tolist(), model.positions.weight.tolist()
    x = [[math.sqrt(8) * e + p for e, p in zip(table[i + 1], places[n], strict=True)] for n, i in enumerate(items)]
    for layer in model.layers:
        x = slow_layer(layer, x)
    states_BLD = model.states(torch.tensor([[*items, NO_ITEM]]))
    torch.testing.assert_close(states_BLD[0, :4], torch.tensor(x, dtype=torch.float64), **CLOSE)


def test_scores_are_cosines_over_the_temperature():
    model = model_of(temperature=0.05)
    history_BL = torch.tensor([[NO_ITEM, 2, 5], [1, 3, 0]])
    state_BD, table_ID = model.state(history_BL), model.items.weight[1:]
    expected_BI = torch.nn.functional.cosine_similarity(state_BD.unsqueeze(1), table_ID, dim=-1) / 0.05
    torch.testing.assert_close(model.scores(history_BL), expected_BI, **CLOSE)
    items_BM = torch.tensor([[0, 6], [3, 3]])
    torch.testing.assert_close(model._scores_of(state_BD, items_BM), expected_BI.gather(1, items_BM), **CLOSE)
    some_N = torch.tensor([5, 5, 0])
    own_B, shared_BN = model._own_and_shared(state_BD, torch.tensor([4, 2]), some_N)
    torch.testing.assert_close(shared_BN, expected_BI[:, some_N], **CLOSE)
    torch.testing.assert_close(own_B, expected_BI[[0, 1], [4, 2]], **CLOSE)


@pytest.mark.parametrize("heads", [1, 2])
def test_gradients_of_a_layer(heads):
    torch.manual_seed(5)
    layer = HSTULayer(4, heads=heads, max_history=3, dropout=0.0).double()
    weights = [torch.randn_like(weight, requires_grad=True) for weight in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x_BLD = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x_BLD, *weights), fast_mode=True)
