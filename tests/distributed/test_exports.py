"""Exports of every kind through transformers: family x tied x titles or semantic IDs x tensor-parallel layout.

Each cell is exported under two umasks; transformers then reads it as a stranger would. Another family is one more line
in ``FAMILIES``.
"""

from __future__ import annotations

import importlib.util
import json
import stat
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.interactions import load_dataset
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.exported import exported_world, from_export
from tests.distributed.export_worker import HISTORIES, UMASKS, WIDTH, beams, make
from tests.distributed.launch import launch
from tests.rollout.rankings import SCORE_TOLERANCE, assert_same_ranking

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "export_worker.py"
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "rope_theta": 1e4, "initializer_range": 0.3,
}  # fmt: skip
#: Family -> its configuration, and whether its tokenizer puts a token in front of texts.
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any], bool]] = {
    "qwen2": (Qwen2Config, {}, False),
    "llama": (LlamaConfig, {"head_dim": 16}, True),
    "qwen3": (Qwen3Config, {"head_dim": 16}, False),
    "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": None}, True),
}
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TIED, KINDS, LAYOUTS = ("tied", "untied"), ("title", "sid"), (1, 2)
CELLS = [(family, tied, kind, tp) for tp in LAYOUTS for family in FAMILIES for tied in TIED for kind in KINDS]


@pytest.fixture(scope="module")
def root(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models with tokenizers, the data and the codes of its items (some share them)."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "data").symlink_to(small_dataset)
    items = load_dataset(small_dataset).items
    codes = {
        name: [f"<a_{item % 5}>", f"<b_{item % 7}>", f"<c_{item // 70}>"]
        for item, name in enumerate(items.external_ids)
    }
    (folder / "index.json").write_text(json.dumps(codes))
    for family, (config, options, begins) in FAMILIES.items():
        for tied in TIED:
            write_source(folder / f"{family}-{tied}", config, options, begins, tied == "tied", items.titles)
    return folder


def write_source(
    folder: Path, config: type[PretrainedConfig], options: dict[str, Any], begins: bool, tied: bool, titles: list[str]
) -> None:
    """A Hugging Face folder; one of a family with a begin token has a base model's taste for sampling, too."""
    tokenizer = build_tokenizer(
        DataConfig(tokenizer="bpe", bpe_vocab_size=1500), CatalogConfig(), ModelConfig(), titles, None
    )
    fast = tokenizer.fast
    if begins:
        fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unused>"})
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A:0", pair="<s> $A:0 $B:1", special_tokens=[("<s>", fast.bos_token_id)]
        )
    fast.chat_template = CHAT
    torch.manual_seed(5)
    vocab = len(fast) + 3  # rows to spare, as published models have
    model = AutoModelForCausalLM.from_config(config(**SIZES, **options, vocab_size=vocab, tie_word_embeddings=tied))
    with torch.no_grad():
        model.get_output_embeddings().weight[fast.eos_token_id] *= 4  # it wants to end now and then
    model.generation_config.update(do_sample=True, top_k=20, temperature=0.6)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def cells(tp: int) -> list[dict[str, str]]:
    return [
        {"source": f"{family}-{tied}", "out": f"{family}-{tied}-{kind}-tp{tp}", "kind": kind}
        for family, tied, kind, layout in CELLS
        if layout == tp
    ]


@pytest.fixture(scope="module")
def tp_exports(root: Path) -> Iterator[Path]:
    """All exports: those of one process made here, those of two by two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small for more
    runtime.initialize(ModelConfig(), seed=0)
    for cell in cells(1):
        make(root / cell["source"], root / cell["out"], cell["kind"], 1)
    launch(WORKER, 2, "2", str(root), json.dumps(cells(2)), folder=root / "logs")
    yield root
    torch.set_num_threads(threads)


@pytest.fixture(params=CELLS, ids=lambda cell: "-".join(map(str, cell)))
def cell(request: pytest.FixtureRequest, tp_exports: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a cell, and our beams."""
    family, tied, kind, tp = request.param
    folder = tp_exports / f"{family}-{tied}-{kind}-tp{tp}"
    return folder, json.loads((folder / "beams.json").read_text())


@cache
def loaded(folder: Path) -> tuple[Any, Any, ModuleType]:
    """Model, tokenizer and processor file of an export, as somebody without this package has them."""
    spec = importlib.util.spec_from_file_location(f"trie_of_{folder.parent.name}", folder / "tawin_trie.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), module


def test_rights_are_those_of_the_umask(cell: tuple[Path, dict[str, Any]]) -> None:
    for digits, name in UMASKS.items():
        export = cell[0] / name
        files = {path.name for path in export.iterdir()}
        assert files >= {
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "catalog.parquet", "catalog.jsonl", "trie.safetensors", "tawin_trie.py", "tawin.json", "recipe.yaml",
            "README.md",
        }  # fmt: skip
        for path in (export, *export.rglob("*")):
            expected = (0o777 if path.is_dir() else 0o666) & ~int(digits, 8)
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_constrained_generate_gives_our_beams(cell: tuple[Path, dict[str, Any]]) -> None:
    """Items, order and scores, in both score spaces, from a batch of prompts of different lengths."""
    folder, ours = cell
    model, tokenizer, module = loaded(folder / "wide")
    settings = json.loads((folder / "wide" / "tawin.json").read_text())
    inputs = tokenizer(ours["texts"], return_tensors="pt", padding=True)
    rows = [ids[mask == 1].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert rows == ours["prompts"]  # the ids that training would use
    assert tokenizer.chat_template == CHAT
    length = inputs["input_ids"].shape[1]
    assert settings["generate"]["num_beams"] == WIDTH
    for space in settings["score_spaces"]:
        processor = module.TrieLogitsProcessor.load(folder / "wide", prompt_lengths=length, score_space=space)
        output = model.generate(
            **inputs, **settings["generate"], logits_processor=[processor], output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        answers = [row[length:].tolist() for row in output.sequences]
        paths = [tuple(row[: row.index(settings["end_token"]["id"]) + 1]) for row in answers]
        scores = output.sequences_scores.tolist()
        for prompt in range(len(HISTORIES)):
            mine, theirs = ours[space], slice(prompt * WIDTH, (prompt + 1) * WIDTH)
            expected = list(zip(map(tuple, mine["paths"][prompt]), mine["scores"][prompt], strict=True))
            found = list(zip(paths[theirs], scores[theirs], strict=True))
            assert_same_ranking(found, expected, SCORE_TOLERANCE)
            items = [processor.trie.items(answer)[0] for answer in answers[theirs]]
            if [path for path, _ in found] == [path for path, _ in expected]:  # no swap within rounding
                assert items == mine["items"][prompt]


def test_plain_generate_stops_at_the_end_token(cell: tuple[Path, dict[str, Any]]) -> None:
    """Without processor and without a word about the end; nothing of the base model's taste for sampling is left."""
    folder, ours = cell
    model, tokenizer, _ = loaded(folder / "wide")
    end = model.config.eos_token_id
    assert (end, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    generation = json.loads((folder / "wide" / "generation_config.json").read_text())
    assert generation.keys() == {
        "bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "transformers_version"
    }  # fmt: skip
    for text in ours["texts"]:
        inputs = tokenizer(text, return_tensors="pt")
        row = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :].tolist()
        assert row.index(end) == len(row) - 1 < 99


def test_the_export_is_read_again(cell: tuple[Path, dict[str, Any]]) -> None:
    """With its own catalog, without data, in one process: the same beams. Weights do not depend on the layout."""
    folder, ours = cell
    export = folder / "wide"
    recipe = from_export(load_recipe(export / "recipe.yaml", [f"checkpoint={export}"]))
    world = exported_world(replace(recipe, run_dir=str(folder / "again")), export, folder / "again", None)
    again = beams(world)
    assert again["prompts"] == ours["prompts"]
    for space in ("trie", "vocab"):
        for mine, found in zip(ours[space]["scores"], again[space]["scores"], strict=True):
            assert found == pytest.approx(mine, abs=SCORE_TOLERANCE)
    one = folder.with_name(f"{folder.name[:-1]}1")
    assert (export / "model.safetensors").read_bytes() == (one / "wide" / "model.safetensors").read_bytes()
    for digits in UMASKS.values():
        assert (folder / digits / "tawin.json").read_bytes() == (one / "wide" / "tawin.json").read_bytes()
