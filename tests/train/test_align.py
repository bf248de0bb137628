"""SFT with alignment tasks, and of new tokens alone: whole runs over semantic IDs written by a BPE that knows words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tawin_nemo.data.interactions import load_dataset
from tawin_nemo.train.sft_data import intentions
from tawin_nemo.util.errors import ConfigError
from tests.train import tiny_pretrained
from tests.train.runs import SMALL, metrics, run

ALIGNED = [
    *SMALL, "catalog.kind=sid", "data.tokenizer=bpe", "rl.enabled=false", "sft.lr=5e-3", "sft.warmup=5",
]  # fmt: skip
TASKS = ("title_to_sid", "sid_to_title", "history_to_title", "titles_to_sid")


@pytest.fixture(scope="module")
def index(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of every item: by the first word of its title, by the last one, and at random."""
    items = load_dataset(small_dataset).items
    titles = items.titles
    firsts, lasts = (sorted({title.split()[place] for title in titles}) for place in (0, -1))
    third = np.random.default_rng(0).integers(8, size=len(titles))
    codes = {
        name: [f"<a_{firsts.index(title.split()[0])}>", f"<b_{lasts.index(title.split()[-1])}>", f"<c_{last}>"]
        for name, title, last in zip(items.external_ids, titles, third, strict=True)
    }
    path = tmp_path_factory.mktemp("index") / "toy.index.json"
    path.write_text(json.dumps(codes))
    return path


@pytest.mark.parametrize(("space", "falls_to"), [pytest.param("vocab", 0.5, marks=pytest.mark.full), ("trie", 0.93)])
def test_every_task_is_learnt(small_dataset: Path, index: Path, tmp_path: Path, space: str, falls_to: float) -> None:
    weights = [f"align.{name}=1" for name in TASKS]
    run(
        *ALIGNED, *weights, f"data.root={small_dataset}", f"catalog.index={index}", f"run_dir={tmp_path}",
        f"sft.loss_space={space}", "sft.epochs=9", "sft.patience=20", "trainer.save_interval=100",
    )  # fmt: skip
    logged = [line for line in metrics(tmp_path, "sft") if "valid/loss" in line]
    assert len(logged) == 10
    for name in TASKS:
        losses = [line[f"valid/loss/{name}"] for line in logged]
        assert min(losses) < falls_to * losses[0], name
    exact = json.loads((tmp_path / "sft" / "eval" / "tasks.json").read_text())
    assert set(exact) == set(TASKS)
    for name, facts in exact.items():
        assert set(facts) == {"held_out", "trained"}
        assert all(0.0 <= value["exact"] <= 1.0 for value in facts.values()), name
    assert exact["title_to_sid"]["trained"]["exact"] > 0.05
    assert exact["title_to_sid"]["held_out"]["rows"] == round(0.05 * len(load_dataset(small_dataset).items))


@pytest.fixture(scope="module")
def pretrained(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer that knows no codes, and spare rows behind its last token."""
    return tiny_pretrained.write(tmp_path_factory.mktemp("pretrained"), small_dataset)


@pytest.mark.parametrize(
    "layout",
    ["", pytest.param("trainer.devices=2 model.tensor_model_parallel_size=2", marks=pytest.mark.full)],
    ids=["one", "TP2"],
)
def test_a_frozen_backbone_keeps_every_bit(
    small_dataset: Path, index: Path, pretrained: Path, tmp_path: Path, layout: str
) -> None:
    run(
        *ALIGNED, f"data.root={small_dataset}", f"catalog.index={index}", f"run_dir={tmp_path}/run", *layout.split(),
        "data.tokenizer=auto", f"model.init={pretrained}", "model.freeze_backbone=true", "model.new_tokens=text",
        "align.title_to_sid=1", "sft.epochs=2",
    )  # fmt: skip
    run(f"checkpoint={tmp_path}/run/sft", f"convert.output={tmp_path}/hf", verb="convert")
    before, after = (load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path / "hf"))
    known = len(AutoTokenizer.from_pretrained(pretrained))
    whole = AutoTokenizer.from_pretrained(tmp_path / "hf")
    table, name = after.pop("model.embed_tokens.weight"), "model.embed_tokens.weight"
    assert torch.equal(table[:known], before.pop(name)[:known])
    assert len(table) == len(whole) > known + 7  # new tokens took the spare rows and some more
    assert all(torch.equal(after[other], value) for other, value in before.items())
    logged = [line["valid/loss"] for line in metrics(tmp_path / "run", "sft") if "valid/loss" in line]
    assert logged[-1] < logged[0]


def test_intentions_belong_to_external_ids(tmp_path: Path) -> None:
    """Numbers are read through the ids that they number, never as positions in the present catalog."""
    file = tmp_path / "intentions.json"
    file.write_text(json.dumps({"B2": "to measure a pipe", "B1": "to hold a sheet of steel"}))
    assert intentions(file, ["B0", "B1", "B2"], 3) == ["", "to hold a", "to measure a"]
    file.write_text(json.dumps({"0": "to cut", "2": "to measure"}))
    with pytest.raises(ConfigError, match=r"align.intentions: .*numbers its items, but this catalog names them"):
        intentions(file, ["B0", "B1", "B2"], 3)
    (tmp_path / "items.json").write_text(json.dumps(["B9", "B0", "B1"]))
    with pytest.raises(ConfigError, match="not an item of the catalog with a text: 'B9'"):
        intentions(file, ["B0", "B1", "B2"], 3)
    assert intentions(file, ["B0", "B1", "B9"], 3) == ["", "to measure", "to cut"]
