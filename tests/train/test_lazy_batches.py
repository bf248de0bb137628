"""Batches of lazily made prompts are bit for bit those of prompts that are all in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from tawin_nemo.config.schema import AlignConfig, CatalogConfig, DataConfig, ModelConfig, Recipe, SftConfig
from tawin_nemo.data import tasks
from tawin_nemo.data.batches import balanced_shard
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.interactions import ItemFrame, load_dataset
from tawin_nemo.data.prompts import build_template
from tawin_nemo.data.samples import encode_split
from tawin_nemo.data.split_arrays import open_arrays
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.run import world
from tawin_nemo.train.rollouts import PromptStream
from tawin_nemo.train.sft_data import SftData, _taken, item_batches, sft_data, task_batches
from tawin_nemo.types import DataParallel, TokenBatch
from tests import forked
from tests.data.prompt_oracle import samples_in_memory
from tests.train.runs import SMALL, run

ALIGN = AlignConfig(titles_to_sid=0.6, title_to_sid=1.0, sid_to_title=1.0)


@cache
def recipe_of(template: str, align: bool) -> Recipe:
    return Recipe(
        data=DataConfig(template=template, tokenizer="bpe", bpe_vocab_size=320, max_history=4, max_prompt_tokens=200),
        catalog=CatalogConfig(kind="sid"), sft=SftConfig(global_batch_size=24, micro_batch_tokens=900),
        align=ALIGN if align else AlignConfig(),
    )  # fmt: skip


def world_of(root: Path, template: str, align: bool, encode: Any, arrays: bool) -> SimpleNamespace:
    recipe, dataset = recipe_of(template, align), load_dataset(root, open_arrays(root) if arrays else None)
    titles, ids = dataset.items.titles, dataset.items.external_ids
    codes = [[f"<a_{i % 13}>", f"<b_{i // 13}>"] for i in range(len(titles))]
    texts, wording = ["".join(item) for item in codes], build_template(template, "sid")
    markers = [task.marker for task in tasks.active_tasks(recipe.align)] if template == "compact" else []
    tokenizer = build_tokenizer(recipe.data, recipe.catalog, ModelConfig(), titles, codes, markers, wording)
    samples = {
        name: encode(getattr(dataset, name).slice(0, rows), texts, tokenizer, wording, recipe.data)
        for name, rows in (("train", 130), ("valid", 20))
    }
    return SimpleNamespace(
        recipe=recipe, samples=samples, tokenizer=tokenizer, template=wording, item_texts=texts, dp=DataParallel(),
        catalog=build_catalog(titles, ids, texts, tokenizer, wording, kind="sid"),
        dataset=SimpleNamespace(items=ItemFrame(ids, titles, titles)),
    )  # fmt: skip


def assert_equal(ours: list[TokenBatch], expected: list[TokenBatch]) -> None:
    assert len(ours) == len(expected) > 0
    for one, other in zip(ours, expected, strict=True):
        for field in fields(one):
            value, wanted = getattr(one, field.name), getattr(other, field.name)
            if isinstance(value, Tensor):
                assert value.dtype == wanted.dtype
                assert value.equal(wanted), field.name


def steps(surroundings: SimpleNamespace, data: SftData) -> list[TokenBatch]:
    batches = []
    for step in range(2 * -(-data.stream.n // data.stream.batch_size)):  # two epochs
        picked = data.picked(step)
        for rank in range(2):
            share = balanced_shard(picked, data.lengths_of(picked), DataParallel(rank, 2))
            batches += data.batches(surroundings, share)
    return batches


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("template", ["compact", "alpaca"])
def test_sft(small_dataset: Path, template: str, align: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = world_of(small_dataset, template, align, encode_split, arrays=True)
    for rows in (np.arange(130), np.arange(40, 130)):
        data = sft_data(lazy, rows)
        with monkeypatch.context() as patch:
            patch.setattr(tasks, "encode_split", samples_in_memory)
            eager = world_of(small_dataset, template, align, samples_in_memory, arrays=False)
            expected = sft_data(eager, rows)
        assert_equal(steps(lazy, data), steps(eager, expected))
        assert_equal(item_batches(lazy, lazy.samples["valid"]), item_batches(eager, eager.samples["valid"]))
        for ours, wanted in zip(data.tasks, expected.tasks, strict=True):
            assert_equal(task_batches(lazy, ours.held_out), task_batches(eager, wanted.held_out))


def test_rl(small_dataset: Path) -> None:
    lazy = world_of(small_dataset, "compact", False, encode_split, arrays=True)
    eager = world_of(small_dataset, "compact", False, samples_in_memory, arrays=False)
    for rank in range(2):
        ours, expected = (
            PromptStream.of(part.samples["train"], np.arange(50, 130), batch_size=12, seed=3, dp=DataParallel(rank, 2))
            for part in (lazy, eager)
        )
        for _ in range(9):
            batch, wanted = ours.take(), expected.take()
            assert batch.prompts.flat.tobytes() == wanted.prompts.flat.tobytes()
            assert batch.prompts.offsets.tobytes() == wanted.prompts.offsets.tobytes()
            assert batch.row_B.equal(wanted.row_B)
            assert batch.target_B.equal(wanted.target_B)


def test_no_array_of_sft_grows_with_the_rows(small_dataset: Path) -> None:
    """Without tasks the questions of SFT are the samples themselves, and the rows those of the stage."""
    lazy, rows = world_of(small_dataset, "compact", False, encode_split, arrays=True), np.arange(130)
    data, train = sft_data(lazy, rows), lazy.samples["train"]
    assert data.prompts is train.prompts
    assert data.answer_N is train.target_N
    assert data.row_of is rows
    assert _taken(train, rows) is train


def verb_with_prompts_in_memory(words: Sequence[str]) -> int:
    """A verb in a process of its own that reads and tokenises all rows by the definition."""
    world.open_dataset = load_dataset
    world.open_samples = lambda splits, encoder, data: {
        name: samples_in_memory(split, encoder.texts, encoder._tokenizer, encoder._template, data)
        for name, split in splits.items()
    }
    return forked.verb(words)


@pytest.mark.full
def test_a_whole_run_logs_the_same_bytes(small_dataset: Path, finished_run: Path, tmp_path: Path) -> None:
    run(*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}", main=verb_with_prompts_in_memory)
    logs = sorted(path.relative_to(finished_run) for path in finished_run.glob("*/metrics.jsonl"))
    assert len(logs) >= 3
    for log in logs:
        assert (tmp_path / log).read_bytes() == (finished_run / log).read_bytes(), log
