"""Quantised weights that decoding keeps, with layers that follow Transformer Engine's rule for ``is_first_microbatch``.

``tests/simcuda/test_engine.py`` has the same with Transformer Engine's own layers.
"""

from types import SimpleNamespace

import pytest
import torch

from tawin_nemo.models.megatron.model.fp8_weights import QuantisedWeights, keeps_sequence_parallel


class Layer(torch.nn.Module):
    """megatron-core's wrapper of a linear layer: ``made`` counts quantisations of its weight, 3 its number."""

    def __init__(self):
        super().__init__()
        self.disable_parameter_transpose_cache, self.is_first_microbatch = True, True
        self.weight, self.kept, self.made = 3.0, None, 0

    def forward(self, x):
        first = None if self.disable_parameter_transpose_cache else self.is_first_microbatch
        quantised = self.kept
        if first is None or first:
            quantised, self.made = self.weight, self.made + 1
        if first is not None:
            self.kept = quantised
        self.is_first_microbatch = False
        return x * quantised


def model(fp8="e4m3"):
    layers = torch.nn.Sequential(Layer(), Layer())
    layers.config = SimpleNamespace(fp8=fp8, sequence_parallel=False)
    return layers


def test_weights_are_quantised_once_until_they_change():
    layers = model()
    weights = QuantisedWeights(layers)
    for _ in range(3):
        with weights.kept():
            assert layers(1.0) == 9.0
    assert [layer.made for layer in layers] == [1, 1]
    layers[0].weight = 5.0
    with weights.kept():
        assert layers(1.0) == 9.0, "nobody has said that the weights changed"
    weights.renew()
    for _ in range(2):
        with weights.kept():
            assert layers(1.0) == 15.0
    assert [layer.made for layer in layers] == [2, 2]


def test_training_passes_neither_use_nor_change_what_is_kept():
    layers = model()
    weights = QuantisedWeights(layers)
    with weights.kept():
        layers(1.0)
    layers[1].weight = 7.0
    assert layers(1.0) == 21.0
    with weights.kept():
        assert layers(1.0) == 9.0
    assert [layer.disable_parameter_transpose_cache for layer in layers] == [True, True]


def test_a_call_that_failed_has_kept_nothing():
    layers = model()
    weights = QuantisedWeights(layers)
    with pytest.raises(TypeError), weights.kept():
        layers(None)
    with weights.kept():
        assert layers(1.0) == 9.0
    assert [layer.made for layer in layers] == [2, 1]


def test_without_fp8_nothing_is_kept():
    layers = model(fp8=None)
    with QuantisedWeights(layers).kept():
        layers(1.0)
    assert [layer.kept for layer in layers] == [None, None]


@pytest.mark.parametrize(
    ("fp8", "sequence_parallel", "kept"), [("e4m3", True, True), (None, True, False), ("e4m3", False, False)]
)
def test_sequence_parallelism_stays_on_under_fp8_alone(fp8, sequence_parallel, kept):
    assert keeps_sequence_parallel(SimpleNamespace(fp8=fp8, sequence_parallel=sequence_parallel)) is kept
