"""Further layouts, stages and options on a pretended GPU, one by one (mark ``full``), and equality with a CPU's run."""

import json
import os
import signal
import time

import pytest

from tawin_nemo.api.client import Client
from tests import forked
from tests.simcuda import runs
from tests.simcuda.test_runs import arguments, check
from tests.train.runs import SMALL, assert_same_metrics, environment

pytestmark = [pytest.mark.full, pytest.mark.slow]
#: Seconds that a server may take to start, and to end.
LIMIT = 120
SEPARATE = "trainer.devices=2 rollout.placement=separate rollout.devices=1"
PREFERENCE = (
    "rl.enabled=false preference.enabled=true preference.max_steps=3 preference.lr=1e-3 "
    "preference.global_batch_size=16 preference.micro_batch_tokens=1024 preference.share_group=8"
)
RL = {
    "tp2": (
        "trainer.devices=2 model.tensor_model_parallel_size=2 rl.policy_space=vocab trainer.offload_optimizer=true"
    ),
    "pp2": "trainer.devices=2 model.pipeline_model_parallel_size=2 trainer.async_save=true rl.sft_weight=0.3",
    "pp2_bf16": "trainer.devices=2 model.pipeline_model_parallel_size=2 model.precision=bf16 reference.mode=swap",
    "dp2": (
        "trainer.devices=2 trainer.async_save=true trainer.offload_optimizer=true rl.algorithm=dapo "
        "rl.max_refill_batches=2 rl.ensure_target=off"
    ),
    "dp2_whole_optimizer": "trainer.devices=2 trainer.distributed_optimizer=false model.precision=bf16",
    "tp2_dp2": (
        "trainer.devices=4 model.tensor_model_parallel_size=2 model.sequence_parallel=true model.precision=bf16 "
        "trainer.async_save=true"
    ),
    "dp2_gradients_in_bf16": (
        "trainer.devices=2 trainer.grad_reduce_in_fp32=false model.precision=bf16 trainer.save_minutes=1"
    ),
    "dp2_overlap": (
        "trainer.devices=2 trainer.overlap_grad_reduce=true trainer.overlap_param_gather=true model.precision=bf16 "
        "trainer.offload_optimizer=true trainer.async_save=true rl.inner_updates=2"
    ),
    "tp2_dp2_overlap": (
        "trainer.devices=4 model.tensor_model_parallel_size=2 model.sequence_parallel=true "
        "trainer.overlap_grad_reduce=true trainer.overlap_param_gather=true reference.mode=swap"
    ),
    "separate": f"{SEPARATE} trainer.async_save=true model.precision=bf16",
    "separate_ahead": f"{SEPARATE} rollout.ahead=1 rl.ensure_target=off rl.importance_cap=2",
    "rollout_tp2_beside_dp2": "trainer.devices=2 rollout.tensor_model_parallel_size=2 model.precision=bf16",
    "rollout_dp2_beside_tp2": (
        "trainer.devices=2 model.tensor_model_parallel_size=2 rollout.tensor_model_parallel_size=1 "
        "trainer.offload_optimizer=true"
    ),
    "rollout_dp2_beside_pp2": (
        "trainer.devices=2 model.pipeline_model_parallel_size=2 rollout.pipeline_model_parallel_size=1"
    ),
    "recompute_all_with_dropout": "model.recompute=full model.dropout=0.1 model.precision=bf16",
    "tp2_sp_dropout": (
        "trainer.devices=2 model.tensor_model_parallel_size=2 model.sequence_parallel=true model.dropout=0.1 "
        "model.recompute=selective"
    ),
    "deterministic": "trainer.deterministic=true model.precision=bf16",
    "fp32_reference_of_bf16": (
        "model.precision=bf16 reference.precision=fp32 reference.refresh=every reference.refresh_steps=2"
    ),
    "samples_in_vocabulary_space": (
        "rl.negatives=sample rl.policy_space=vocab rl.inner_updates=2 rl.kl=k2 rl.std=sample"
    ),
    "beams_in_vocabulary_space": (
        "rollout.score_space=vocab rl.policy_space=vocab rl.ensure_target=off rl.importance_cap=2 rollout.width=6 "
        "rollout.length_penalty=0.5"
    ),
    "informative_groups": (
        "rl.kl_groups=informative rl.length_norm=branching rl.algorithm=gspo rl.schedule=cosine "
        "trainer.val_check_interval=1"
    ),
    "semantic_reward": "rl.reward=semantic rl.reward_weight=0.5 rl.negatives=dynamic rl.ensure_target=off",
    "full_ranking": "eval.auc=true eval.auc_rows=4 eval.candidates=20 sft.watch=ndcg compare.sft_all=true",
}
PREFERENCES = {
    "dpo": "preference.algorithm=dpo reference.mode=swap",
    "simpo_beams": "preference.algorithm=simpo preference.negatives=beam preference.search_every=2",
    "alpha_dpo_vocab": "preference.algorithm=alpha_dpo preference.policy_space=vocab model.precision=bf16",
    "napo_self_play": (
        "preference.algorithm=napo preference.negatives=self_play preference.margin=fixed preference.rho=0"
    ),
    "sdpo_tp2": (
        "preference.algorithm=sdpo trainer.devices=2 model.tensor_model_parallel_size=2 model.sequence_parallel=true"
    ),
    "sdpo_dp2": "preference.algorithm=sdpo trainer.devices=2 trainer.offload_optimizer=true",
}


@pytest.mark.parametrize("name", RL)
def test_rl(name, small_dataset, tmp_path):
    runs.run(*arguments(small_dataset, tmp_path, RL[name]))
    check(tmp_path, "sft", "rl")


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference(name, small_dataset, tmp_path):
    runs.run(*arguments(small_dataset, tmp_path, f"{PREFERENCE} {PREFERENCES[name]}"))
    check(tmp_path, "sft", "preference")


def test_a_sequential_recommender_and_what_takes_its_margin_and_its_reward(small_dataset, tmp_path):
    baseline = "baseline.model=sasrec baseline.epochs=2"
    runs.run(*arguments(small_dataset, tmp_path / "aux", baseline))
    for name, options in {
        "napo": f"{PREFERENCE} preference.algorithm=napo preference.aux={tmp_path}/aux/sasrec",
        "reward": f"rl.reward=collaborative rl.reward_source={tmp_path}/aux/sasrec",
    }.items():
        runs.run(*arguments(small_dataset, tmp_path / name, options))


def test_other_verbs(small_dataset, tmp_path):
    """evaluate, generate and convert of a trained model."""
    words = arguments(small_dataset, tmp_path, "model.precision=bf16 rl.enabled=false")
    runs.run(*words)
    words.append(f"checkpoint={tmp_path}/sft")
    assert runs.run(*words, verb="evaluate")
    assert runs.run(*words, "generate.n=3", verb="generate")
    runs.run(*words, f"convert.output={tmp_path}/hf", verb="convert")
    assert list((tmp_path / "hf").glob("*.safetensors"))


def test_a_run_equals_that_of_a_cpu(small_dataset, finished_run, tmp_path):
    """The branches of a GPU compute what those of a CPU compute, in float32 up to the order of sums."""
    runs.run(*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}")
    assert [rank["device"] for rank in json.loads((finished_run / "layout.json").read_text())] == ["cpu"]
    assert_same_metrics(tmp_path, finished_run, "sft", "sft_continued", "rl")


def test_semantic_ids_and_their_tasks(small_dataset, tmp_path):
    """Codes by RQ-VAE on the device, then SFT with tasks of titles beside the next item, and RL over the codes."""
    quantiser = "semantic_ids.method=rqvae semantic_ids.codes=16 semantic_ids.rqvae.epochs=3"
    index = runs.run(*arguments(small_dataset, tmp_path / "codes", quantiser), verb="tokenize")["index"]
    tasks = (
        f"data.tokenizer=bpe catalog.kind=sid catalog.index={index} align.title_to_sid=0.2 align.titles_to_title=0.2"
    )
    runs.run(*arguments(small_dataset, tmp_path / "run", tasks))
    check(tmp_path / "run", "sft", "rl")


def test_a_server(small_dataset, tmp_path):
    words = arguments(small_dataset, tmp_path, "model.precision=bf16 rl.enabled=false")
    runs.run(*words)
    serve = ["serve", *words, f"checkpoint={tmp_path}/sft", "serve.port=0", "serve.control_port=0"]
    address, log = tmp_path / "serve" / "address.json", tmp_path / "server.log"
    process = forked.start(runs.verb, serve, environment(), log)
    try:
        end = time.monotonic() + LIMIT
        while not address.is_file():
            assert process.exitcode is None, log.read_text()[-4000:]
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.1)
        with Client(json.loads(address.read_text())["data"]) as shop:
            assert len(shop.recommend(history=[3, 17], n=5, exclude_history=True).items) == 5
        os.kill(process.pid, signal.SIGTERM)
        process.join(LIMIT)
        assert process.exitcode == 0, log.read_text()[-4000:]
    finally:
        process.kill()
        process.join()
