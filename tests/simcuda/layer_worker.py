"""What models of every kind compute in float32, to be compared between a CPU and the pretended device: there norms,
biases, residual sums and rotations take other kernels, and a search's step another form.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.simcuda import device

PATHS = [[2 + a, 20 + b, 40 + c] for a in range(4) for b in range(5) for c in range(3) if (a + b + c) % 4]


def results() -> dict[str, Any]:
    """Name -> tensor, or items of a search."""
    from tawin_nemo.config.schema import ModelConfig
    from tawin_nemo.models.megatron.parallel import runtime
    from tests.simcuda import scene

    runtime.initialize(ModelConfig(), seed=1)
    qwen2 = replace(scene.shape(2), init_std=0.2)
    qwen3, llama = replace(qwen2, family="qwen3", head_dim=24), replace(qwen2, family="llama", tied=False)
    found: dict[str, Any] = {}
    for name, shape in {"qwen2": qwen2, "qwen3": qwen3, "llama": llama}.items():
        found |= {f"{name} {key}": value for key, value in _of_shape(shape).items()}
    return found


def _of_shape(shape: Any) -> dict[str, Any]:
    from tawin_nemo.config.schema import ModelConfig
    from tawin_nemo.models.megatron.decode.lm import MegatronLM
    from tawin_nemo.models.megatron.model.build import build_model
    from tawin_nemo.types import TokenRows

    model = build_model(shape, ModelConfig(), seed=3)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():  # biases begin at 0 and norms at 1: neither would be noticed missing
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw).to(parameter.device))
    prompts = TokenRows.from_lists([[3, 9, 27, 4, 5], [1, 2], [50, 40, 30, 20, 10, 5, 1], [7]])
    lm = MegatronLM(model, shape)
    cache = lm.prefill(prompts)
    for parents in ([0, 0, 1, 3], [4, 6, 5], [2]):  # the last one has few of the prompts
        chains = [[1 + parent, 9][: 1 + parent % 2] for parent in parents]
        cache = lm.extend(cache, torch.tensor(parents), TokenRows.from_lists(chains))
    assert cache.hidden_RD is not None
    return {"rows": cache.hidden_RD.cpu(), **_searches(lm, prompts), **_update(model, prompts)}


def _searches(lm: Any, prompts: Any) -> dict[str, Any]:
    from tawin_nemo.catalog.trie import TokenTrie
    from tawin_nemo.rollout.beam import BeamSearch, collect_candidates
    from tawin_nemo.rollout.filters import ItemFilter

    trie, found = TokenTrie.from_paths(PATHS), {}
    filters = [ItemFilter.without(trie, range(0, len(PATHS), 3)), None, ItemFilter.only(trie, [1, 8, 20, 33]), None]
    for space in ("trie", "vocab"):
        search = BeamSearch(lm, trie, 6, score_space=space, length_penalty=0.7 if space == "vocab" else 0.0)
        search.admit(prompts.take(np.arange(2)), [0, 1], filters=filters[:2])
        finished = [search.advance()]
        search.admit(prompts.take(np.arange(2, 4)), [2, 3], filters=filters[2:], widths=[4, 6])  # joins the others
        while search.running:
            finished.append(search.advance())
        candidates = collect_candidates(finished, 6, trie)
        found[f"{space} items"] = candidates.items_BW.tolist()
        found[f"{space} scores"] = candidates.scores_BW.nan_to_num(neginf=-1e3).cpu()
    return found


def _update(model: Any, prompts: Any) -> dict[str, Tensor]:
    """Log-probs of trees of answers, and every gradient."""
    from tawin_nemo.data.trees import tree_batch
    from tawin_nemo.models.megatron.model.forward import batch_logprobs, hidden_states
    from tawin_nemo.types import TokenRows

    answers = TokenRows.from_lists([[2, 21, 40], [2, 22, 41], [3, 20, 40], [2, 21, 42], [5, 24, 40]])
    batch, _ = tree_batch(prompts, answers, np.array([0, 0, 1, 2, 3]), None)
    logp_N = batch_logprobs(model, batch, hidden_states(model, batch))
    (logp_N * torch.linspace(-1, 1, len(logp_N), device=logp_N.device)).sum().backward()
    grads = {f"gradient {name}": p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"log-probs": logp_N.detach().cpu(), **grads}


def main(words: Sequence[str]) -> int:
    """``words``: the file to write the results of the pretended device to."""
    device.install()
    from tawin_nemo.models.megatron.model.attention import additive_mask

    found = results()
    found["faults"] = len(device.FAULTS)
    visible = torch.zeros(2, 3, 13, dtype=torch.bool, device="cuda")
    found["mask strides"] = additive_mask(visible, 2, torch.bfloat16).stride()
    Path(words[0]).write_bytes(pickle.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
