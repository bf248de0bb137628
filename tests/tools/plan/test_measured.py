"""The memory model against the resident memory of real training steps, in processes of their own."""

from __future__ import annotations

import pytest

from tests.benchmarks.plan_memory import CASES, WITHIN, run_case


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case", ["one process", pytest.param("full recomputation", marks=pytest.mark.full), "TP 2, sequence parallel"]
)
def test_modelled_peaks_are_the_measured_ones(case: str):
    ranks = run_case(case)
    assert len(ranks) == CASES[case].tensor_model_parallel_size
    for found in ranks:
        assert abs(found.off) <= WITHIN, found
        assert found.parameters == found.modelled_parameters
