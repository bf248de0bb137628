"""Constrained search as the generation function of TRL's GRPOTrainer.

    from trl import GRPOTrainer

    search = CatalogSearch(model, tokenizer, titles)
    GRPOTrainer(model=model, rollout_func=CatalogRollouts(search), ...)

TRL is not imported here; its ``GRPOTrainer`` uses ``rollout_func`` without vLLM from version 0.29 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tawin_nemo.tools.hf_search import CatalogSearch
from tawin_nemo.types import NO_ITEM
from tawin_nemo.util.errors import ConfigError

#: A prompt of a TRL data set: text, or the messages of a conversation.
Prompt = str | list[dict[str, Any]]


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
