"""What the model benchmarks share: random weights on both sides, real titles, prompts of exact lengths.

The shape is Qwen2.5-0.5B with its whole vocabulary, with 4 of its layers (all 24 with ``--full``). Weights are drawn
with a deviation of 0.05, which gives logits a spread of about 1.5: rankings are then decided by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Qwen2Config, Qwen2ForCausalLM

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.backbones import BACKBONES, Backbone
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.data_prep import inter_layout
from tawin_nemo.models.megatron.hf.config import hf_config
from tawin_nemo.models.megatron.hf.io import load_hf
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import EXTERNAL_ID, TITLE, TokenRows
from tests.benchmarks.harness import DTYPES, REPOSITORY, parser

LAYERS = 4
SPREAD = 0.05
HISTORY = 10


def model_parser(doc: str | None) -> argparse.ArgumentParser:
    """Options of the benchmarks that run a model."""
    result = parser(doc)
    result.add_argument("--layers", type=int, default=LAYERS, help="of the model; --full means all 24")
    result.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of weights and products, both sides")
    return result


def qwen_shape(layers: int, *, full: bool = False) -> Backbone:
    shape = replace(BACKBONES["qwen2.5-0.5b"], init_std=SPREAD)
    return shape if full else replace(shape, layers=layers)


def transformers_model(shape: Backbone, precision: str = "fp32", seed: int = 0) -> Qwen2ForCausalLM:
    """Random weights; SDPA attention, key-value cache on."""
    config = Qwen2Config(**{k: v for k, v in hf_config(shape).items() if k not in ("architectures", "model_type")})
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config).to(DTYPES[precision]).eval()


def megatron_model(shape: Backbone, theirs: Qwen2ForCausalLM, precision: str = "fp32") -> GPTModel:
    """The same weights in the model that this package trains, through a temporary folder."""
    cfg = ModelConfig(precision=precision)
    runtime.initialize(cfg, seed=0)
    model = build_model(shape, cfg, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        load_hf(model, shape, folder)
    return model


@dataclass(frozen=True)
class Titles:
    """The complete Amazon Industrial catalog by title, in the Qwen tokenizer, and the histories of its test split."""

    tokenizer: Tokenizer
    template: Template
    catalog: Catalog
    test: Split

    @property
    def eos(self) -> int:
        return self.tokenizer.eos_id

    @cached_property
    def longest(self) -> int:
        return int(self.catalog.paths.lengths.max())

    def prompts(self, count: int, tokens: int, *, first: int = 0) -> TokenRows:
        """Prompts of exactly ``tokens`` tokens from test rows ``first ...``, items in the row's own order.

        A prompt that is too short is continued at its front with the items of the rows before it; then everything in
        front of the last ``tokens`` tokens is cut off (of most prompts the instruction, and the beginning of a title).
        """
        return TokenRows.from_lists([self._prompt(row, tokens) for row in range(first, first + count)])

    def _prompt(self, row: int, tokens: int) -> np.ndarray:
        items, before = list(self.test.history[row]), row
        while True:
            text = self.template.prompt([self.catalog.titles[item] for item in items])
            encoded = self.tokenizer.encode_batch([text])[0]
            if len(encoded) >= tokens:
                return encoded[-tokens:]
            before = (before - 1) % len(self.test)
            items = [*self.test.history[before], *items]

    def random_groups(self, count: int, size: int, *, seed: int = 0) -> np.ndarray:
        """``size`` items for each of ``count`` prompts, [count, size], no two of a group on one path.

        Drawn uniformly: their paths share fewer tokens than the results of one beam search do.
        """
        rng = np.random.default_rng(seed)
        _, one_of_each_path = np.unique(self.catalog.leaf_I, return_index=True)
        return np.stack([rng.choice(one_of_each_path, size, replace=False) for _ in range(count)])


def shared_folder(name: str) -> Path:
    """A folder of the shared data; ends the program with exit code 0 and the reason where it is absent."""
    root = Path(os.environ.get("TAWIN_SHARED", REPOSITORY.parent / "shared"))
    folder = root / "data" / name
    if not folder.is_dir():
        print(f"skipped: no folder {folder}; TAWIN_SHARED names the folder that holds data/{name}", file=sys.stderr)
        sys.exit(0)
    return folder


def industrial_titles() -> Titles:
    source, tokenizer_folder = shared_folder("amazon18_industrial"), shared_folder("qwen_tokenizer")
    tokenizer = Tokenizer.load(tokenizer_folder)
    prepared = inter_layout.read(source, inter_layout.find_name(source), HISTORY)
    titles = prepared.items[TITLE].to_list()
    template = Template("alpaca", "title")
    catalog = build_catalog(titles, prepared.items[EXTERNAL_ID].to_list(), titles, tokenizer, template, kind="title")
    return Titles(tokenizer, template, catalog, prepared.splits["test"])


def start(threads: int) -> None:
    """Threads of both sides; call it first. transformers' own messages are switched off."""
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
