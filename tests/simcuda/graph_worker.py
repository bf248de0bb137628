"""A search in fixed shapes on the pretended device, its graphs recorded and repeated; writes what it cost as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.rollout.recorded_graph import RecordedGraph
from tests.simcuda import device


def main(words: Sequence[str]) -> int:
    """``words``: the file to write."""
    device.install()
    from tawin_nemo.config.schema import ModelConfig
    from tawin_nemo.models.megatron.decode.lm import MegatronLM
    from tawin_nemo.models.megatron.model.build import build_model
    from tawin_nemo.models.megatron.parallel import runtime
    from tawin_nemo.rollout.beam import constrained_beam_search
    from tawin_nemo.rollout.fixed_search import FixedShapeSearch, fixed_buffers
    from tests.simcuda import scene

    runtime.initialize(ModelConfig(precision="fp32"), seed=0)
    given, trie = scene.shape(2), scene.catalog().trie
    lm = MegatronLM(build_model(given, ModelConfig(precision="fp32"), seed=3), given)
    prompts = scene.prompts(trie.num_items).prompts
    with pytest.MonkeyPatch.context() as patch:
        RecordedGraph.install(patch)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        buffers = fixed_buffers(lm, trie, scene.GROUP, len(prompts), 16)
        assert buffers is not None
        search = FixedShapeSearch(lm, buffers, trie, scene.GROUP, len(prompts))
        tickets = np.arange(len(prompts))
        search.search(prompts, tickets)  # captures
        captures, before = RecordedGraph.captures, RecordedGraph.replays
        found, captured = device.count(lambda: search.search(prompts, tickets))
        replays = RecordedGraph.replays - before
        expected, usual = device.count(lambda: constrained_beam_search(lm, prompts, trie, scene.GROUP))
    result: dict[str, Any] = {
        "same": torch.equal(found.candidates.items_BW.cpu(), expected.items_BW.cpu()),
        "apart": float((found.candidates.scores_BW.cpu() - expected.scores_BW).abs().max()),
        "captures": captures, "replays": replays, "faults": len(device.FAULTS),
        "device": found.candidates.scores_BW.device.type,
    }  # fmt: skip
    for name, counts in (("captured", captured), ("usual", usual)):
        result[name] = {kind: counts.total(kind) for kind in ("launches", "syncs", "h2d", "d2h")}
    Path(words[0]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
