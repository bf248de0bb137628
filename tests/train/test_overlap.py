"""Whole runs with overlapped communication (``trainer.overlap_*``): every stage computes what the plain form does.

Weights that other ranks have not sent yet are NaN here (``tests.distributed.late_gather``), so that a search, a
reference, a checkpoint or an evaluation that does not wait for them cannot go unnoticed.
"""

import math

import pytest

from tests.distributed import late_gather
from tests.train.runs import SMALL, metrics, run
from tests.train.test_layouts import LOSS_RTOL, evaluated

OVERLAP = "trainer.overlap_grad_reduce=true trainer.overlap_param_gather=true".split()
#: A pipeline of all stages; without clipping, as the norm is summed over pieces that buckets cut at other places.
ALL_STAGES = (
    "trainer.clip_grad=0 compare.sft_continued=false eval.splits=[valid] sft.epochs=1 rl.max_steps=3 "
    "rl.inner_updates=2 rl.beta=0.01 rl.init=preference preference.enabled=true preference.max_steps=3 "
    "preference.lr=1e-3 preference.global_batch_size=16 preference.micro_batch_tokens=1024 reference.refresh=ema "
    "reference.refresh_decay=0.5"
).split()
MATRIX = {
    "swapped reference, offload, self-play": (
        "trainer.devices=2 reference.mode=swap trainer.offload_optimizer=true preference.negatives=self_play "
        "trainer.async_save=true"
    ),
    "tp2 x dp2": "trainer.devices=4 model.tensor_model_parallel_size=2 model.sequence_parallel=true",
    "pp2 x dp2, no rl.beta": (
        "trainer.devices=4 model.pipeline_model_parallel_size=2 rl.beta=0 rl.ensure_target=off reference.refresh=off"
    ),
    "other rollout layout": "trainer.devices=2 rollout.tensor_model_parallel_size=2",
    "ranks that only search": (
        "trainer.devices=3 rollout.placement=separate rollout.devices=1 rollout.ahead=1 rl.ensure_target=off "
        "reference.refresh=every reference.refresh_steps=1"
    ),
}


@pytest.mark.distributed
def test_losses_equal_one_process(small_dataset, finished_run, tmp_path):
    where = ("trainer.devices=2", f"data.root={small_dataset}", f"run_dir={tmp_path}")
    run(*SMALL, *OVERLAP, "compare.sft_continued=false", *where, main=late_gather.verb)
    for stage in ("sft", "rl"):
        ours, expected = metrics(tmp_path, stage), metrics(finished_run, stage)
        assert len(ours) == len(expected)
        for line, reference in zip(ours, expected, strict=True):
            assert line.keys() == reference.keys()
            for key, value in reference.items():
                assert math.isclose(line[key], value, rel_tol=LOSS_RTOL, abs_tol=1e-6), (stage, line["step"], key)
        assert evaluated(tmp_path, stage) == evaluated(finished_run, stage)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", MATRIX)
def test_every_stage_logs_what_the_plain_form_does(name, small_dataset, tmp_path):
    words = [*SMALL, *ALL_STAGES, *MATRIX[name].split(), f"data.root={small_dataset}"]
    run(*words, f"run_dir={tmp_path / 'plain'}")
    run(*words, *OVERLAP, f"run_dir={tmp_path / 'overlapped'}", main=late_gather.verb)
    for stage in ("sft", "preference", "rl"):
        ours, expected = (metrics(tmp_path / form, stage) for form in ("overlapped", "plain"))
        assert len(ours) == len(expected)
        for line, reference in zip(ours, expected, strict=True):
            norm, other = line.pop("grad_norm", 0.0), reference.pop("grad_norm", 0.0)
            assert math.isclose(norm, other, rel_tol=1e-6), (stage, line["step"])
            assert line == reference, (stage, line["step"])


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.distributed
def test_a_whole_optimizer_needs_no_tolerance(small_dataset, tmp_path):
    words = [*SMALL, "trainer.distributed_optimizer=false", "trainer.devices=2", f"data.root={small_dataset}"]
    run(*words, f"run_dir={tmp_path / 'plain'}")
    run(*words, OVERLAP[0], f"run_dir={tmp_path / 'overlapped'}")
    for stage in ("sft", "sft_continued", "rl"):
        files = [(tmp_path / form / stage / "metrics.jsonl").read_bytes() for form in ("overlapped", "plain")]
        assert files[0] == files[1]
