"""Constrained search with a published checkpoint: items and scores are those of transformers' generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_lm import transformers_search
from rankings import assert_same_ranking, found_ranking
from transformers import AutoModelForCausalLM

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.hf.io import load_hf
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.beam import constrained_beam_search

pytestmark = pytest.mark.slow

#: float32: up to a dozen log-probs through 30 layers, two attention paths.
SCORE_ATOL = 2e-3
WIDTH = 5
TITLES = [
    "Steel Ruler 30 cm", "Steel Ruler 15 cm", "Steel Tape Measure", "Digital Caliper 6 Inch", "Digital Multimeter",
    "Soldering Iron 60W", "Soldering Iron Stand", "Solder Wire 0.8 mm", "Nitrile Gloves Large", "Nitrile Gloves Small",
    "Safety Glasses", "3D Printer Filament PLA Black", "3D Printer Filament PLA White", "3D Printer Nozzle Set",
    "Microscope Slides", "Microscope Cover Glass", "pH Test Strips", "Beaker 250 ml", "Beaker 500 ml", "Hex Key Set",
]  # fmt: skip
HISTORIES = [["3D Printer Nozzle Set"], ["Soldering Iron 60W", "Solder Wire 0.8 mm"], ["Beaker 250 ml"]]


@pytest.mark.parametrize("space", ["trie", "vocab"])
@torch.no_grad()
def test_items_and_scores_are_those_of_transformers(smollm2: Path, space: str) -> None:
    tokenizer, template = Tokenizer.load(smollm2), Template("alpaca", "title")
    answers = tokenizer.encode_batch([template.answer(title) for title in TITLES])
    trie = TokenTrie.from_paths([[*row.tolist(), tokenizer.eos_id] for row in answers])
    prompts = tokenizer.encode_batch([template.prompt(history) for history in HISTORIES])
    theirs = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    expected = transformers_search(theirs, prompts, trie, WIDTH, eos=tokenizer.eos_id, space=space)
    del theirs  # one copy of the weights at a time
    runtime.initialize(ModelConfig(), seed=0)
    shape = backbone_from_hf(smollm2)
    model = build_model(shape, ModelConfig(), seed=0, to_be_loaded=True)
    load_hf(model, shape, smollm2)
    found = constrained_beam_search(MegatronLM(model.eval(), shape), prompts, trie, WIDTH, score_space=space)
    for row, ranking in enumerate(expected):
        assert_same_ranking(found_ranking(found, row), ranking, SCORE_ATOL)
        paths = [path for path, _ in found_ranking(found, row)]
        titles = [tokenizer.decode(path[:-1]).strip('"') for path in paths]
        assert titles == [TITLES[item] for item in found.items_BW[row].tolist()]
