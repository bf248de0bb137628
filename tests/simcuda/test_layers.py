"""The kernels that a CUDA device takes compute what a CPU computes: layers, their gradients, searches."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.simcuda import layer_worker
from tests.train.runs import environment

LIMIT = 300
#: Of float32 results, relative to the largest entry of a tensor: sums are rounded once instead of twice.
TOLERANCE = 2e-5


@pytest.mark.slow
def test_the_device_computes_what_a_cpu_computes(tmp_path: Path) -> None:
    out = tmp_path / "results.pickle"
    process = forked.start(layer_worker.main, [str(out)], environment(), out.with_suffix(".log"))
    expected = layer_worker.results()
    failed, hung = forked.finish([process], LIMIT)
    assert not failed, out.with_suffix(".log").read_text()[-4000:]
    assert not hung
    found = pickle.loads(out.read_bytes())
    assert found.pop("faults") == 0
    assert found.pop("mask strides") == (6 * 16, 6 * 16, 16, 1)  # 13 keys; other rows would be copied in every layer
    assert found.keys() == expected.keys()
    assert len(found) > 60
    different = 0
    for name, want in expected.items():
        if isinstance(want, list):
            assert found[name] == want, name
            continue
        torch.testing.assert_close(
            found[name],
            want,
            rtol=0,
            atol=TOLERANCE * float(want.abs().max() + 1e-3),
            msg=lambda m, n=name: f"{n}: {m}",
        )
        different += not torch.equal(found[name], want)
    assert different  # the device's kernels were taken
