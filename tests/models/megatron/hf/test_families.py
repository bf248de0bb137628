"""Every family computes what transformers' model does: packed trees as in training, and the search over stored keys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.hf.io import load_hf, save_hf
from tawin_nemo.models.megatron.model.build import HiddenGPT, build_model
from tawin_nemo.models.megatron.optim.trainable import score
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CheckpointError, ConfigError
from tests.models.megatron.hf.random_models import KINDS, VOCAB, random_model

ATOL = 1e-5  # float32, another order of the sums
PROMPTS = [[3, 9, 27, 4, 5, 6, 8, 11, 2], [1, 2, 3, 4], [7]]
#: Paths below each of the prompts: forks at the root and deeper, and one path alone.
PATHS = [[[5, 9, 1], [5, 8, 7, 1], [2, 6, 1]], [[8, 9, 7, 1]], [[5, 9, 1], [2, 6, 1]]]
CATALOG = [[2, 6, 1], [5, 8, 7, 1], [5, 9, 1], [8, 9, 7, 1]]


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[HiddenGPT, PreTrainedModel, Path]:
    """A model of this family, as ours and as theirs, and its folder."""
    theirs = random_model(request.param, tied=request.param != "mistral")
    theirs.save_pretrained(tmp_path / "hf")
    runtime.initialize(ModelConfig(), seed=0)
    shape = backbone_from_hf(tmp_path / "hf")
    ours = build_model(shape, ModelConfig(), seed=3)
    load_hf(ours, shape, tmp_path / "hf")
    return ours, theirs, tmp_path / "hf"


@torch.no_grad()
def their_logprobs(theirs: PreTrainedModel, prompt: list[int], path: list[int], admissible: TokenTrie | None) -> Tensor:
    """One full forward pass over the row; log-probs of the path's tokens in the vocabulary or in the trie."""
    logits_TV = theirs(torch.tensor([prompt + path])).logits[0, len(prompt) - 1 : -1]
    if admissible is None:
        return logits_TV.log_softmax(-1).gather(-1, torch.tensor(path)[:, None])[:, 0]
    position, found = admissible.root, []
    for logits_V, token in zip(logits_TV, path, strict=True):
        tokens = torch.from_numpy(admissible.children(position)[0])
        if len(tokens) > 1:
            found.append(logits_V[tokens].log_softmax(-1)[int((tokens == token).nonzero())])
        position = admissible.step(position, token)
    return torch.stack(found)


@pytest.mark.parametrize("space", ["vocab", "trie"])
def test_packed_trees_have_the_logprobs_of_transformers(
    pair: tuple[HiddenGPT, PreTrainedModel, Path], space: str
) -> None:
    ours, theirs, _ = pair
    trie = TokenTrie.from_paths(TokenRows.from_lists(CATALOG)) if space == "trie" else None
    flat = TokenRows.from_lists([path for paths in PATHS for path in paths])
    prompt_of = np.repeat(np.arange(len(PROMPTS)), [len(paths) for paths in PATHS])
    batch = tree_batch(TokenRows.from_lists(PROMPTS), flat, prompt_of, trie)[0]
    expected = torch.cat([
        their_logprobs(theirs, prompt, path, trie)
        for prompt, paths in zip(PROMPTS, PATHS, strict=True) for path in paths
    ])  # fmt: skip
    assert expected.std() > 0.1
    torch.testing.assert_close(score(ours, [batch])[0], expected, atol=ATOL, rtol=ATOL)


def test_the_search_over_stored_keys_has_the_logprobs_of_transformers(
    pair: tuple[HiddenGPT, PreTrainedModel, Path],
) -> None:
    """Prefill, then two extensions below rows of several prompts."""
    ours, theirs, folder = pair
    lm, rows = MegatronLM(ours, backbone_from_hf(folder)), [list(prompt) for prompt in PROMPTS]
    cache = lm.prefill(TokenRows.from_lists(rows))
    for parents, chains in (([0, 0, 2], [[5, 8], [2], [9, 9, 4]]), ([1, 4, 8], [[6], [7, 30], [12]])):
        cache = lm.extend(cache, torch.tensor(parents), TokenRows.from_lists(chains))
        rows = rows + [
            rows[parent] + chain[: i + 1]
            for parent, chain in zip(parents, chains, strict=True) for i in range(len(chain))
        ]  # fmt: skip
    number = torch.arange(len(rows))
    got = lm.logprobs(cache, number, number.repeat_interleave(VOCAB), torch.arange(VOCAB).repeat(len(rows)), "vocab")
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([row])).logits[0, -1].log_softmax(-1) for row in rows])
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=ATOL)


def test_the_export_is_of_the_same_family_with_the_same_bytes(
    pair: tuple[HiddenGPT, PreTrainedModel, Path], tmp_path: Path
) -> None:
    ours, theirs, folder = pair
    shape = backbone_from_hf(folder)
    save_hf(ours, shape, tmp_path / "out")
    assert backbone_from_hf(tmp_path / "out") == replace(shape, head_dim=shape.kv_channels)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(theirs)
    assert shape.kv_channels == theirs.model.layers[0].self_attn.head_dim == again.model.layers[0].self_attn.head_dim
    one, other = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all(one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one)


def test_weights_of_another_family_are_refused_by_name(tmp_path: Path) -> None:
    """A Qwen3 checkpoint under a Qwen2 config lacks the biases and has norms that nothing reads."""
    random_model("qwen3", tied=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    runtime.initialize(ModelConfig(), seed=0)
    shape = backbone_from_hf(tmp_path)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias.*q_norm|missing.*unexpected"):
        load_hf(build_model(shape, ModelConfig(), seed=3), shape, tmp_path)


def test_a_window_limits_the_length_and_is_exact_up_to_it(tmp_path: Path) -> None:
    """transformers attends to the newest 8 tokens: up to 8 that is full attention, and search allows no more."""
    theirs = random_model("mistral", tied=False, sliding_window=8)
    theirs.save_pretrained(tmp_path)
    shape = backbone_from_hf(tmp_path)
    assert (shape.window, shape.max_position, shape.positions) == (8, 256, 8)
    runtime.initialize(ModelConfig(), seed=0)
    ours = build_model(shape, ModelConfig(), seed=3)
    load_hf(ours, shape, tmp_path)
    assert MegatronLM(ours, shape).max_positions == 8
    full = random_model("mistral", tied=False)
    row = torch.arange(1, 13)[None]
    with torch.no_grad():
        windowed, plain = (model(row).logits[0] for model in (theirs, full))
    torch.testing.assert_close(windowed[:8], plain[:8], atol=ATOL, rtol=ATOL)
    assert (windowed[8:] - plain[8:]).abs().max() > 1e-3  # beyond it full attention would be wrong


def test_an_unsupported_family_names_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(ConfigError, match=r"'qwen3_moe'.*Qwen2\.5.*Qwen3 dense.*Llama.*Mistral"):
        backbone_from_hf(tmp_path)
