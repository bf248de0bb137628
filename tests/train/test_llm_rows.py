"""The LLM rows of NAPO's Table 2 from their recipes: plain prompting, ChatRec, TALLRec."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tests.data.chat_tokenizers import CHATML, instruct_tokenizer
from tests.data_prep.test_candidates_layout import toy_folder
from tests.train.runs import run

WORDS = (
    "data.bpe_vocab_size=320 data.eval_limit=9 eval.beams=6 eval.ks=[1,3] eval.candidates=5 trainer.threads=1 "
    "model.precision=fp32"
).split()
FIGURES = {"hit_ratio@1", "valid_ratio", "trie_hit_ratio@1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("candidates"))


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A tiny random Instruct model."""
    directory = instruct_tokenizer(tmp_path_factory.mktemp("instruct"), CHATML)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


def words_of(recipe: str, folder: Path, run_dir: Path, *more: str) -> list[str]:
    path = f"recipes/paper/{recipe}.yaml"
    return ["--recipe", path, *WORDS, f"data.root={folder}", f"run_dir={run_dir}", *more]


@pytest.fixture(scope="module", params=[pytest.param("prompting_cpu", marks=pytest.mark.full), "chatrec_cpu"])
def prompted(request, folder, instruct, tmp_path_factory):
    """A finished run of a recipe without training: its name, folder, words and summary."""
    run_dir = tmp_path_factory.mktemp("prompted")
    words = words_of(request.param, folder, run_dir, f"model.init={instruct}")
    return request.param, run_dir, words, run(*words)


def test_a_model_is_prompted_without_training(prompted):
    _, run_dir, words, summary = prompted
    assert summary["final_stage"] == "zero_shot"
    assert summary["candidates"].keys() == {"zero_shot"}
    assert summary["candidates"]["zero_shot"].keys() == FIGURES
    assert pl.read_parquet(run_dir / "zero_shot" / "eval" / "test.candidates.parquet").height == 9
    assert not (run_dir / "zero_shot" / "metrics.jsonl").exists()
    assert json.loads((run_dir / "zero_shot" / "done.json").read_text()) == {"step": 0, "chosen_step": 0}
    assert "Without training" in (run_dir / "report.html").read_text(encoding="utf-8")
    assert run(*words)["candidates"] == summary["candidates"]
    measured = run(f"run_dir={run_dir}", "--recipe", str(run_dir / "recipe.yaml"), verb="evaluate")
    assert measured["test"]["candidates"] == summary["candidates"]["zero_shot"]


def test_the_weights_are_those_of_the_model_and_the_chat_is_its_own(prompted, instruct, tmp_path):
    recipe, run_dir, _, _ = prompted
    run(
        f"checkpoint={run_dir / 'zero_shot'}", f"convert.output={tmp_path / 'out'}",
        "--recipe", str(run_dir / "recipe.yaml"), verb="convert",
    )  # fmt: skip
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", instruct))
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name][: len(weight)], weight)
    if recipe == "chatrec_cpu":
        stored = json.loads((run_dir / "prompt.json").read_text())
        message = [{"role": "user", "content": "MESSAGE"}]
        tokenizer = AutoTokenizer.from_pretrained(instruct)
        chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert "MESSAGE".join(stored["chat"]) == chat


def test_zero_shot_is_a_row_beside_the_trained_stages(folder, tmp_path):
    more = ("compare.zero_shot=true", "model.backbone=nano", "sft.epochs=1", "sft.global_batch_size=16")
    summary = run(*words_of("lastfm_cpu", folder, tmp_path, *more))
    assert list(summary["candidates"]) == ["zero_shot", "sft"]
    assert summary["final_stage"] == "sft"
    untrained = pl.read_parquet(tmp_path / "zero_shot" / "eval" / "test.per_user.parquet")
    assert untrained.height == pl.read_parquet(tmp_path / "sft" / "eval" / "test.per_user.parquet").height == 9
    assert [path.name for path in (tmp_path / "zero_shot" / "checkpoints").iterdir()] == ["step_0"]


def test_a_dry_run_lists_the_stage_without_rows(folder, instruct, tmp_path):
    words = words_of("prompting_cpu", folder, tmp_path / "run", f"model.init={instruct}")
    assert run(*words, "--dry-run")["stages"] == {"zero_shot": 0}


def test_tallrec_learns_from_instructions_with_candidates(folder, tmp_path):
    more = ("model.backbone=nano", "sft.epochs=1", "sft.global_batch_size=16")
    summary = run(*words_of("tallrec_cpu", folder, tmp_path, *more))
    assert summary["candidates"].keys() == {"sft"}
    assert summary["candidates"]["sft"].keys() == FIGURES
    shown = json.loads((tmp_path / "catalogue.json").read_text())["prompt_tokens_mean"]["train"]
    hidden = run(*words_of("tallrec_cpu", folder, tmp_path / "hidden", "data.show_candidates=false"), "--dry-run")
    assert shown > hidden["prompt_tokens_max"]
