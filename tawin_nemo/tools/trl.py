"""Constrained search over the weights of a transformers model in memory, and the same as TRL's generation function.

    from trl import GRPOTrainer
    rollouts = CatalogRollouts(CatalogSearch(model, tokenizer, titles))
    GRPOTrainer(model=model, rollout_func=rollouts, ...)

The search runs in a second copy of the model, whose weights are brought up to date before every rollout, so memory for
the weights twice is needed. TRL is not imported here; its ``GRPOTrainer`` has ``rollout_func`` from version 0.29 on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import ModelConfig, RolloutConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.hf.memory import fill_from_rows, rows_of
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.engine import RolloutEngine, draw_seed
from tawin_nemo.types import NO_ITEM, Candidates, TokenRows
from tawin_nemo.util.errors import ConfigError

#: A prompt of a TRL data set: text, or the messages of a conversation.
Prompt = str | list[dict[str, Any]]


class CatalogSearch:
    """Constrained beam search and sampling over ``items`` by a Qwen2.5 or Llama model of transformers.

    Every rank has the whole model (data parallelism); models that FSDP or DeepSpeed ZeRO-3 have cut up cannot be read.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[str], *,
        score_space: str = "trie", seed: int = 0,
    ) -> None:  # fmt: skip
        """``items``: the text of every item; an answer is its tokens and the tokenizer's end-of-text token.

        ``score_space``: candidates are ranked by log-probs over admissible tokens (trie) or over all tokens (vocab).
        Raises ConfigError for a model of another family or number format, CatalogError for items without tokens.
        """
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-text token; set tokenizer.eos_token to the one of its model")
        self.tokenizer, self.seed = tokenizer, seed
        cfg = ModelConfig(precision=_precision(model))
        runtime.initialize(cfg, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            self._shape = backbone_from_hf(Path(folder))
        self._copy = build_model(self._shape, cfg, seed=seed, to_be_loaded=True).eval()
        tokens = tokenizer(list(items), add_special_tokens=False)["input_ids"]
        paths = TokenRows.from_lists([[*path, tokenizer.eos_token_id] for path in tokens])
        ids = [str(item) for item in range(len(items))]
        self.catalog = Catalog(list(items), ids, "title", paths, TokenTrie.from_paths(paths))
        options = RolloutConfig(score_space=score_space)
        self._engine = RolloutEngine(MegatronLM(self._copy, self._shape), self.catalog, options, seed=seed)
        self.load(model)

    @torch.no_grad()
    def load(self, model: PreTrainedModel) -> None:
        """Search with the weights that ``model`` has now. Raises CheckpointError for a model of another shape."""
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        fill_from_rows(self._copy, self._shape, ({name: tensors[name] for name in row} for row in rows_of(self._shape)))

    def beams(self, prompts: Sequence[Sequence[int]], width: int) -> Candidates:
        """The ``width`` best items for each prompt (token ids), best first. Raises ConfigError for too many."""
        return self._engine.search(TokenRows.from_lists([list(prompt) for prompt in prompts]), width)

    def draws(self, prompts: Sequence[Sequence[int]], count: int, *, step: int, numbers: Sequence[int]) -> Candidates:
        """``count`` independent draws for each prompt, over the admissible tokens.

        A function of seed, ``step`` and the prompt's number alone, so that processes that share a group agree.
        """
        seeds = [draw_seed(self.seed, step, number) for number in numbers]
        return self._engine.sample(TokenRows.from_lists([list(prompt) for prompt in prompts]), count, seeds)


class CatalogRollouts:
    """``rollout_func`` of TRL's GRPOTrainer: every completion is an item of the catalog.

    Reward functions get ``item`` (the number of each completion's item) and ``item_score`` (its log-prob) beside TRL's
    own arguments.
    """

    def __init__(self, search: CatalogSearch, *, negatives: str = "beam") -> None:
        """``negatives``: ``beam`` gives a prompt its best distinct items, ``sample`` independent draws, as TRL does."""
        if negatives not in ("beam", "sample"):
            raise ConfigError(f"negatives={negatives!r} is not known; use beam or sample")
        self.search, self.negatives = search, negatives

    def __call__(self, prompts: list[Prompt], trainer: Any) -> dict[str, list[Any] | None]:
        """One completion for each of ``prompts``, of which ``num_generations`` in a row belong to one group.

        A group may lie across processes: this one takes the candidates that its places in the global batch have.
        Raises ConfigError when a group asks for more items than the catalog has.
        """
        trained = trainer.accelerator.unwrap_model(trainer.model)
        group = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        self.search.load(trained)
        first = trainer.accelerator.process_index * len(prompts)
        places = [divmod(first + n, group) for n in range(len(prompts))]  # group, and candidate within it
        firsts = [n for n, (number, _) in enumerate(places) if n == 0 or number != places[n - 1][0]]
        tokens = [self.tokens_of(prompts[n]) for n in firsts]
        if self.negatives == "beam":
            found = self.search.beams(tokens, group)
        else:
            numbers = [places[n][0] for n in firsts]
            found = self.search.draws(tokens, group, step=trainer.state.global_step, numbers=numbers)
        index = {places[n][0]: row for row, n in enumerate(firsts)}
        chosen = [(index[number], candidate) for number, candidate in places]
        if any(int(found.items_BW[row, candidate]) == NO_ITEM for row, candidate in chosen):
            raise ConfigError(f"num_generations={group} asks for more items than the catalog has; lower it")
        return {
            "prompt_ids": [tokens[row] for row, _ in chosen],
            "completion_ids": [
                found.tokens_BWT[row, candidate, : int(found.lengths_BW[row, candidate])].tolist()
                for row, candidate in chosen
            ],
            "logprobs": None,  # as TRL's own generation: the trainer scores the completions itself
            "item": [int(found.items_BW[row, candidate]) for row, candidate in chosen],
            "item_score": [float(found.scores_BW[row, candidate]) for row, candidate in chosen],
        }

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, as TRL makes them."""
        tokenizer = self.search.tokenizer
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        made: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)
        return list(made["input_ids"] if isinstance(made, Mapping) else made)


def _precision(model: PreTrainedModel) -> str:
    """``model.precision`` of a model's number format."""
    known = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    if model.dtype not in known:
        raise ConfigError(f"the model is in {model.dtype}; use torch.float32 or torch.bfloat16")
    return known[model.dtype]
