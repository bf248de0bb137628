"""A run that began in one process goes on under tensor parallelism: layout keys may change between attempts."""

import json

import pytest

from tests.train.runs import SMALL, assert_same_metrics, called, metrics, run


@pytest.mark.distributed
def test_one_process_then_two(small_dataset, finished_run, tmp_path):
    arguments = [*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}"]
    stopped = called(*arguments, "trainer.max_time=00:00:00:00")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    begun = len(metrics(tmp_path, "sft"))
    assert begun < len(metrics(finished_run, "sft"))
    run(*arguments, "trainer.devices=2", "model.tensor_model_parallel_size=2")
    assert {rank["tp_size"] for rank in json.loads((tmp_path / "layout.json").read_text())} == {2}
    assert_same_metrics(tmp_path, finished_run, "sft", "rl")
