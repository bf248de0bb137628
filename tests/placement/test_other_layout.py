"""A run that began in one process goes on under tensor parallelism: layout keys may change between attempts."""

import json
import math

import pytest

from tests.train.runs import SMALL, called, metrics, run
from tests.train.test_layouts import LOSS_RTOL


@pytest.mark.distributed
def test_one_process_then_two(small_dataset, finished_run, tmp_path):
    arguments = [*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}"]
    stopped = called(*arguments, "trainer.max_time=00:00:00:00")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    begun = len(metrics(tmp_path, "sft"))
    assert begun < len(metrics(finished_run, "sft"))
    run(*arguments, "trainer.devices=2", "model.tensor_model_parallel_size=2")
    assert {rank["tp_size"] for rank in json.loads((tmp_path / "layout.json").read_text())} == {2}
    for stage in ("sft", "rl"):
        ours, expected = metrics(tmp_path, stage), metrics(finished_run, stage)
        assert [line["step"] for line in ours] == [line["step"] for line in expected]
        for line, reference in zip(ours, expected, strict=True):
            for key, value in reference.items():
                assert math.isclose(line[key], value, rel_tol=LOSS_RTOL, abs_tol=1e-6), (stage, line["step"], key)
