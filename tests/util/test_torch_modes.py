"""What runs below torch function modes, and that it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.forward import batch_logprobs, hidden_states
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.beam import constrained_beam_search
from tawin_nemo.rollout.sampling import constrained_sample
from tawin_nemo.util.torch_modes import plain_calls
from tests.distributed.layout_worker import SHAPE, prompts, rows, small_catalog

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is no such mode where CUDA is")


class Counting(TorchFunctionMode):
    """Counts the calls of torch that it is shown."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def model() -> Any:
    runtime.initialize(ModelConfig(), seed=1)
    return build_model(SHAPE, ModelConfig(), seed=3)


def test_inside_a_mode_sees_nothing_and_no_gradient_is_kept() -> None:
    @plain_calls
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    given = torch.ones(3, requires_grad=True)
    with Counting() as mode:
        result = twice(given)
        assert mode.calls == 0
        result + 1
    assert mode.calls > 0
    assert not result.requires_grad


def test_searches_show_a_mode_next_to_nothing() -> None:
    lm, trie = MegatronLM(model(), SHAPE), TokenTrie.from_paths(small_catalog())
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    with Counting() as mode:
        constrained_beam_search(lm, prompts([0, 1]), trie, 4)
        constrained_sample(lm, prompts([0, 1]), trie, 4, generators=generators)
    assert mode.calls < 50  # thousands, if it saw all


def test_a_pass_shows_a_mode_only_what_surrounds_it() -> None:
    net, batch = model(), rows([0, 1, 2], "trie")
    with Counting() as mode:
        hidden_SBD = hidden_states(net, batch)
        passes = mode.calls
        batch_logprobs(net, batch, hidden_SBD)
    assert passes < 60
    assert mode.calls > passes
    assert hidden_SBD.requires_grad
