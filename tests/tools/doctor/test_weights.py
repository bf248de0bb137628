"""Pretrained folders: whole, and with each kind of damage that downloads and copies leave."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.load import load_recipe
from tawin_nemo.models.megatron.hf.config import hf_config
from tawin_nemo.models.megatron.hf.files import INDEX_FILE, SINGLE_FILE
from tawin_nemo.models.megatron.hf.map import hf_names, table
from tawin_nemo.tools.doctor import recipe as recipe_here
from tawin_nemo.tools.doctor.check import Check, Status

SHAPE = Backbone("qwen2", 8, 2, 2, 2, 16, 32)
NAMES = [name for entry, layer in table(SHAPE) for name in hf_names(entry, layer)]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards with an index."""
    (tmp_path / "config.json").write_text(json.dumps(hf_config(SHAPE)))
    placed = {name: FIRST if position < 2 else SECOND for position, name in enumerate(NAMES)}
    for file in (FIRST, SECOND):
        tensors = {name: np.ones((4, 4), np.float32) for name, where in placed.items() if where == file}
        save_file(tensors, tmp_path / file)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": placed}))
    return tmp_path


def look(folder: Path) -> Check:
    return recipe_here.pretrained(load_recipe(None, [f"model.init={folder}"]))


def test_a_whole_folder(folder):
    seen = look(folder)
    assert seen.status == Status.OK, seen
    assert "qwen2, 2 layers of 8, 2 files" in seen.value


def test_a_single_file(folder):
    for file in (INDEX_FILE, FIRST, SECOND):
        (folder / file).unlink()
    save_file({name: np.ones(3, np.float32) for name in NAMES}, folder / SINGLE_FILE)
    assert look(folder).status == Status.OK


def _truncate(folder: Path) -> None:
    whole = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(whole[:-5])


def _cut_header(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:20])


def _pointer(folder: Path) -> None:
    (folder / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def _swap(folder: Path) -> None:
    save_file({"other": np.ones(3, np.float32)}, folder / SECOND)


def _old_format(folder: Path) -> None:
    for file in (INDEX_FILE, FIRST, SECOND):
        (folder / file).unlink()
    (folder / "pytorch_model.bin").touch()


def _other_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(hf_config(Backbone("qwen2", 8, 3, 2, 2, 16, 32))))


@pytest.mark.parametrize(
    ("damage", "part", "remedy"),
    [
        (lambda folder: (folder / SECOND).unlink(), "missing", "download that file"),
        (_truncate, "cannot be read", "cut off or damaged: copy it again"),
        (_cut_header, "cannot be read", "cut off or damaged: copy it again"),
        (_pointer, "Git LFS pointer", "git lfs pull"),
        (_swap, "lacks model.layers.0.mlp.down_proj.weight, which the index promises", "one revision"),
        (_other_config, "missing ['model.layers.2.input_layernorm.weight'", "config.json belongs to the weights"),
        (_old_format, "has neither", "pytorch_model.bin is the old format"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be used", "config.json does not exist"),
        (lambda folder: (folder / INDEX_FILE).write_text("{}"), "no readable weight_map", "download it again"),
    ],
    ids=["missing", "truncated", "header", "lfs", "swapped", "config", "bin", "no-config", "index"],
)
def test_each_damage_is_named(folder, damage, part, remedy):
    damage(folder)
    seen = look(folder)
    assert seen.status == Status.FAILS
    assert part in seen.value
    assert remedy in seen.remedy


def test_no_folder_and_random_weights(tmp_path):
    assert look(tmp_path / "nowhere").status == Status.FAILS
    assert recipe_here.pretrained(load_recipe(None)).status == Status.ABSENT


def test_the_tokenizer_lies_with_the_weights_or_where_the_recipe_says(folder):
    from tokenizers import Tokenizer, models

    def look(*overrides: str) -> Check:
        return recipe_here.tokenizer(load_recipe(None, list(overrides)))

    pretrained = f"model.init={folder}"
    assert look().status == Status.ABSENT
    assert look(pretrained).status == Status.FAILS
    (folder / "tokenizer.json").write_text("{")
    assert "cannot be read" in look(pretrained).value
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    assert look(pretrained).value.endswith("2 tokens")
    assert look(f"data.tokenizer={folder}").status == Status.OK
    assert look(pretrained, "data.tokenizer=bpe").status == Status.FAILS
