"""An exported run as the source of verbs, and its model card, as somebody uses them who has only the folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.runs import called, command, environment, run

ASKED = ("generate.history=[3,5]", "generate.n=4")


@pytest.fixture(scope="module")
def export(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hf"
    run(f"checkpoint={finished_run / 'rl'}", f"convert.output={folder}", verb="convert")
    return folder


@pytest.fixture(scope="module")
def recommended(finished_run: Path) -> dict[str, Any]:
    return run(f"checkpoint={finished_run / 'rl'}", *ASKED, verb="generate")


def elsewhere(folder: Path, *words: str, verb: str) -> dict[str, Any]:
    """The verb's result when it is started in ``folder``."""
    done = subprocess.run(
        command(*words, verb=verb), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_verb_takes_the_catalog_and_the_recipe_of_the_export(
    export: Path, recommended: dict[str, Any], tmp_path: Path
) -> None:
    """The very scores of the run, without its data, from a folder of its own, by ``checkpoint`` and ``model.init``."""
    alone = tmp_path / "moved"
    shutil.copytree(export, alone)
    assert elsewhere(tmp_path, f"checkpoint={alone}", *ASKED, verb="generate") == recommended
    bound = ("data.max_history=4", "data.max_prompt_tokens=120", "eval.beams=6", "eval.ks=1")
    assert run(f"model.init={alone}", f"run_dir={tmp_path / 'none'}", *bound, *ASKED, verb="generate") == recommended
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]  # nothing is written


def test_evaluate_reads_rows_for_the_catalog_of_the_export(
    export: Path, finished_run: Path, small_dataset: Path, tmp_path: Path
) -> None:
    words = (f"checkpoint={export}", f"data.root={small_dataset}", f"run_dir={tmp_path / 'none'}", "data.eval_limit=24")
    summary, result = json.loads((finished_run / "summary.json").read_text()), run(*words, verb="evaluate")
    assert {key: result["test"][key] for key in summary["rl"]} == summary["rl"]


@pytest.mark.parametrize(
    ("words", "verb", "message"),
    [
        ((), "evaluate", "no rows to evaluate .* set data.root=DIR"),
        ((), "generate", "generate.history is empty and split test has no rows"),
        (("data.max_history=9", *ASKED), "generate", "data.max_history: 4 -> 9"),
    ],
)
def test_what_an_export_cannot_do_is_said(export: Path, words: tuple[str, ...], verb: str, message: str) -> None:
    done = called(f"checkpoint={export}", *words, verb=verb)
    assert done.returncode == 2
    assert re.search(message, done.stderr)


def test_a_changed_catalog_or_tokenizer_is_refused(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "catalog")
    table = pq.read_table(export / "catalog.parquet")
    pq.write_table(table.slice(1), tmp_path / "catalog" / "catalog.parquet")
    shutil.copytree(export, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"<|next|>"', '"<|newt|>"'))
    for name in ("catalog", "tokenizer"):
        done = called(f"checkpoint={tmp_path / name}", *ASKED, verb="generate")
        assert done.returncode == 2
        assert f"is not the {name} of this export" in done.stderr


def test_an_export_can_be_exported_again(export: Path, tmp_path: Path) -> None:
    run(f"checkpoint={export}", f"convert.output={tmp_path / 'again'}", verb="convert")
    for name in ("model.safetensors", "tokenizer.json", "catalog.jsonl", "trie.safetensors", "tawin.json"):
        assert (tmp_path / "again" / name).read_bytes() == (export / name).read_bytes(), name


def test_the_model_card_works_as_it_stands(export: Path, finished_run: Path) -> None:
    """Its program is run without this package; it prints what the verb recommends."""
    card = (export / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    program = program.replace("THIS_FOLDER", str(export)).replace("(items[0], items[1])", "(items[3], items[5])")
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    mine = run(f"checkpoint={finished_run / 'rl'}", ASKED[0], "generate.n=6", verb="generate")
    titles = [eval(line)[0] for line in done.stdout.splitlines()]
    assert titles == [item["title"] for item in mine["recommendations"][0]["items"]]


def test_plain_generate_ends_by_itself(export: Path) -> None:
    """Without an argument about it: at the latest where the longest item would (this small model rambles)."""
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)
    inputs = tokenizer("<|item|>Steel ruler<|next|>", return_tensors="pt")
    plain = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
    settings = json.loads((export / "tawin.json").read_text())
    assert len(plain) <= settings["catalog"]["longest_path"]


def test_settings_say_what_a_prompt_is(export: Path) -> None:
    settings = json.loads((export / "tawin.json").read_text())
    assert settings["format"] == "tawin_nemo.export/1"
    assert settings["prompt"]["max_history"] == 4
    assert (settings["prompt"]["head"], settings["prompt"]["tail"]) == ("<|item|>", "<|next|>")
    assert settings["end_token"]["text"] == "<|endoftext|>"
    assert settings["score_spaces"] == ["trie", "vocab"]
    assert {"tawin_nemo", "torch", "transformers"} <= settings["versions"].keys()
    assert (
        json.loads((export / "config.json").read_text())["transformers_version"] == settings["versions"]["transformers"]
    )
    recipe = (export / "recipe.yaml").read_text()
    assert "/" not in recipe  # no paths of the machine that it was made on
