"""Jinja and chat templates in whole runs: the same prompts everywhere, kept with the run, and changes are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tawin_nemo.run.trained import chosen_checkpoint, identity_of
from tests.data.chat_tokenizers import TRIMMING, instruct_tokenizer
from tests.train.runs import SMALL, called, run

SOURCE = (
    "{% for item in items %}\n{{ item.text }} | {{ item.brand }} | {{ item.category }} | {{ item.price or '?' }}\n"
    "{% endfor %}\nNext:\n"
)
QUICK = ("rl.enabled=false", "compare.sft_continued=false", "sft.epochs=1", "data.max_prompt_tokens=400")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def priced(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small dataset with one column more: a price."""
    from tawin_nemo.util.files import sha256, write_json

    folder = tmp_path_factory.mktemp("priced") / "data"
    shutil.copytree(small_dataset, folder)
    items = pl.read_parquet(folder / "items.parquet")
    items = items.with_columns(price=pl.when(pl.col("item") % 3 > 0).then(pl.col("item") / 4))
    items.write_parquet(folder / "items.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["items.parquet"] = sha256(folder / "items.parquet")
    write_json(folder / "manifest.json", manifest)
    return folder


@pytest.fixture(scope="module")
def jinja_run(priced: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished SFT run with a Jinja file, and the file."""
    folder = tmp_path_factory.mktemp("jinja")
    (folder / "shop.jinja").write_text(SOURCE, encoding="utf-8")
    words = [*SMALL, *QUICK, f"data.template={folder / 'shop.jinja'}"]
    run(*words, f"data.root={priced}", f"run_dir={folder / 'run'}")
    return folder / "run", folder / "shop.jinja"


def test_the_run_keeps_the_text_and_its_fingerprint(jinja_run: tuple[Path, Path]) -> None:
    run_dir, _ = jinja_run
    stored = json.loads((run_dir / "prompt.json").read_text())
    assert (stored["template"], stored["chat"]) == (SOURCE, ["", ""])
    assert identity_of(chosen_checkpoint(run_dir / "sft"))["prompt"] == stored["sha256"]


def test_a_verb_needs_the_run_alone_and_a_changed_file_is_refused(jinja_run: tuple[Path, Path]) -> None:
    run_dir, file = jinja_run
    expected = json.loads((run_dir / "summary.json").read_text())["sft"]
    moved = file.rename(file.with_name("moved"))
    try:
        found = run(f"checkpoint={run_dir / 'sft'}", verb="evaluate")["test"]
        assert {name: found[name] for name in expected} == expected
        file.write_text(SOURCE.replace("Next", "Then"), encoding="utf-8")
        done = called(f"checkpoint={run_dir / 'sft'}", verb="evaluate")
        assert done.returncode == 2
        assert "was changed since" in done.stderr
        assert str(run_dir) in done.stderr
    finally:
        moved.rename(file)


def test_an_edited_record_is_no_template_of_the_checkpoint(jinja_run: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir, file = jinja_run
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    stored = json.loads((copy / "prompt.json").read_text())
    other = SOURCE.replace("Next", "Then")
    (copy / "prompt.json").write_text(json.dumps({**stored, "template": other}))
    words = (copy / "recipe.yaml").read_text().replace(str(file), str(tmp_path / "gone.jinja"))
    (copy / "recipe.yaml").write_text(words)
    done = called(f"checkpoint={copy / 'sft'}", verb="evaluate")
    assert done.returncode == 2
    assert "was trained with the prompts" in done.stderr


def test_generate_writes_the_same_prompts_as_the_rows_of_the_split(jinja_run: tuple[Path, Path], priced: Path) -> None:
    run_dir, _ = jinja_run
    checkpoint = f"checkpoint={run_dir / 'sft'}"
    by_row = run(checkpoint, "generate.rows=1", verb="generate")["recommendations"][0]
    history = pl.read_parquet(priced / "test.parquet")["history"][0].to_list()
    named = ",".join(f"#{item}" for item in history)
    by_name = run(checkpoint, f"generate.history={named}", verb="generate")["recommendations"][0]
    assert by_name["history"] == by_row["history"]
    assert [item["item"] for item in by_name["items"]] == [item["item"] for item in by_row["items"]]
    assert [item["score"] for item in by_name["items"]] == pytest.approx([item["score"] for item in by_row["items"]])


def test_an_unknown_variable_ends_with_2_before_training(small_dataset: Path, tmp_path: Path) -> None:
    words = [*SMALL, "data.template={% for item in items %}{{ item.colour }}{% endfor %}"]
    done = called(*words, f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "uses the column colour" in done.stderr
    assert "it has text, title, external_id, description, brand, category" in done.stderr
    assert not list(tmp_path.glob("run/*/checkpoints"))


def test_an_instruct_model_is_trained_and_used_in_its_own_chat(small_dataset: Path, tmp_path: Path) -> None:
    """With a template that writes the date: the run keeps the text of its first day."""
    folder = instruct_tokenizer(tmp_path / "instruct", TRIMMING)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    run_dir = tmp_path / "run"
    words = [*SMALL, *QUICK, f"model.init={folder}", "data.template=alpaca", "data.chat=true"]
    run(*words, f"data.root={small_dataset}", f"run_dir={run_dir}")
    stored = json.loads((run_dir / "prompt.json").read_text())
    assert "Today Date: " in stored["chat"][0]
    assert stored["chat"][1] == "<|im_end|><|im_start|>assistant\n\n"
    assert identity_of(chosen_checkpoint(run_dir / "sft"))["prompt"] == stored["sha256"]
    expected = json.loads((run_dir / "summary.json").read_text())["sft"]
    found = run(f"checkpoint={run_dir / 'sft'}", verb="evaluate")["test"]
    assert {name: found[name] for name in expected} == expected
    earlier = [stored["chat"][0].replace("Today Date: ", "Today Date: yesterday "), stored["chat"][1]]
    (run_dir / "prompt.json").write_text(json.dumps({**stored, "chat": earlier}))
    done = called(f"checkpoint={run_dir / 'sft'}", verb="evaluate")
    assert done.returncode == 2
    assert "was trained with the prompts" in done.stderr


def test_a_base_model_has_no_chat(small_dataset: Path, tmp_path: Path) -> None:
    words = [*SMALL, "data.template=alpaca", "data.chat=true", f"data.root={small_dataset}"]
    done = called(*words, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "the tokenizer has no chat template" in done.stderr
