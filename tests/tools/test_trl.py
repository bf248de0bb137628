"""The engine as generation function of the real TRL: the rollouts, rewards and weights of its own generation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

pytest.importorskip("trl", reason="TRL is not installed; tests/run.sh installs it")

from tawin_nemo.tools.hf_search import CatalogSearch
from tawin_nemo.tools.trl import CatalogRollouts
from tawin_nemo.util.errors import ConfigError
from tests.benchmarks.hf_round_trip import make_tokenizer
from tests.benchmarks.trl_step import PrefixRollouts, hit, trainer_of

ITEMS = [f"{kind} {thing}" for kind in ("Steel", "Brass", "Old brass") for thing in ("ruler", "ruler 15 cm", "caliper")]
PROMPTS = ["Bought: tape. Next: ", "Bought: bolt. Next: "]
GROUP, STEPS = 4, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    found = AutoTokenizer.from_pretrained(folder)
    found.pad_token = found.eos_token
    return found


def model_of(tokenizer: Any, *, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # far from uniform
    return model.to(dtype)


def trained(tokenizer: Any, rollouts_of: Any, folder: Path) -> tuple[Any, list[dict[str, Any]], list[str]]:
    """The trainer after STEPS steps, its log, and every completion that the reward function has seen."""
    model, seen = model_of(tokenizer), []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return hit(completions, **columns)

    rollouts = rollouts_of(model)
    best = CatalogSearch(model, tokenizer, ITEMS).beams([tokenizer(text)["input_ids"] for text in PROMPTS], GROUP)
    rows = [
        {"prompt": text, "target": ITEMS[int(items[2])]} for text, items in zip(PROMPTS, best.items_BW, strict=True)
    ]
    trainer = trainer_of(
        model, tokenizer, rows, str(folder), rollouts=rollouts, reward=reward, group=GROUP, steps=STEPS, lr=1e-2
    )
    trainer.train()
    return trainer, [line for line in trainer.state.log_history if "reward" in line], seen


def test_trl_trains_alike_with_our_search_and_every_completion_is_an_item(tokenizer: Any, tmp_path: Path):
    """The same groups, so the same rewards, losses and weights as with transformers' beam search and a prefix function,
    although the weights change between the rollouts."""
    ours, log, seen = trained(
        tokenizer, lambda model: CatalogRollouts(CatalogSearch(model, tokenizer, ITEMS)), tmp_path / "ours"
    )
    paths = CatalogSearch(model_of(tokenizer), tokenizer, ITEMS).catalog.paths
    theirs, their_log, their_seen = trained(tokenizer, lambda _: PrefixRollouts(paths, tokenizer), tmp_path / "theirs")
    assert len(seen) == STEPS * GROUP * len(PROMPTS)
    assert {text.strip() for text in seen} <= set(ITEMS)  # 100 % valid
    assert seen == their_seen
    assert [line["reward"] for line in log] == [line["reward"] for line in their_log]
    assert len({line["reward"] for line in log}) >= 1
    assert log[0]["reward"] == pytest.approx(1 / GROUP)  # the target is among the beams of both prompts
    torch.testing.assert_close(dict(ours.model.named_parameters()), dict(theirs.model.named_parameters()))
    before = dict(model_of(tokenizer).named_parameters())
    assert not torch.equal(ours.model.model.embed_tokens.weight, before["model.embed_tokens.weight"])


def stand_in(model: Any, *, rank: int = 0, step: int = 0) -> Any:
    """What a rollout function looks at in a trainer."""
    accelerator = SimpleNamespace(unwrap_model=lambda wrapped: wrapped, process_index=rank)
    return SimpleNamespace(
        accelerator=accelerator, model=model.train(), num_generations=GROUP, num_generations_eval=2,
        state=SimpleNamespace(global_step=step),
    )  # fmt: skip


@pytest.mark.parametrize("negatives", ["beam", "sample"])
def test_a_group_across_processes_is_that_of_one_process(tokenizer: Any, negatives: str):
    model = model_of(tokenizer)
    rollouts = CatalogRollouts(CatalogSearch(model, tokenizer, ITEMS), negatives=negatives)
    prompts = [text for text in PROMPTS for _ in range(GROUP)]
    whole = rollouts(list(prompts), stand_in(model))
    parts = [rollouts(prompts[rank * 2 : rank * 2 + 2],
                      stand_in(model, rank=rank)) for rank in range(4)]  # fmt: skip
    assert whole["item"] == [item for part in parts for item in part["item"]]
    assert whole["completion_ids"] == [row for part in parts for row in part["completion_ids"]]
    if negatives == "beam":
        assert all(len(set(whole["item"][start : start + GROUP])) == GROUP for start in (0, GROUP))


def test_rollouts_follow_the_weights_and_evaluation_has_its_own_group_size(tokenizer: Any):
    model = model_of(tokenizer)
    rollouts = CatalogRollouts(CatalogSearch(model, tokenizer, ITEMS))
    trainer = stand_in(model)
    before = rollouts([PROMPTS[0]] * GROUP, trainer)["item_score"]
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.5)
    assert rollouts([PROMPTS[0]] * GROUP, trainer)["item_score"] != before
    model.eval()
    found = rollouts([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, trainer)
    assert [len(ids) for ids in found["prompt_ids"]] == [len(tokenizer(text)["input_ids"]) for text in
                                                         (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])]  # fmt: skip


def test_what_cannot_work_says_so(tokenizer: Any):
    model = model_of(tokenizer)
    with pytest.raises(ConfigError, match=r"torch\.float64; use torch\.float32"):
        CatalogSearch(model_of(tokenizer, dtype=torch.float64), tokenizer, ITEMS)
    search = CatalogSearch(model, tokenizer, ITEMS[:2])
    with pytest.raises(ConfigError, match="negatives='greedy' is not known"):
        CatalogRollouts(search, negatives="greedy")
    with pytest.raises(ConfigError, match=r"more beams than the catalog has distinct token paths \(2\)"):
        CatalogRollouts(search)([PROMPTS[0]] * GROUP, stand_in(model))
