"""Constrained search over the weights of a transformers model in memory, which may be in training elsewhere.

The search runs in a second copy of the model, whose weights ``load`` brings up to date: memory for the weights twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

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
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.sampling import draw_seed
from tawin_nemo.types import Candidates, TokenRows
from tawin_nemo.util.errors import ConfigError


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


def _precision(model: PreTrainedModel) -> str:
    """``model.precision`` of a model's number format."""
    known = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    if model.dtype not in known:
        raise ConfigError(f"the model is in {model.dtype}; use torch.float32 or torch.bfloat16")
    return known[model.dtype]
