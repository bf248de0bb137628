"""Messages between ranks: what survives encoding, what is not accepted, and the loop of a following rank."""

from __future__ import annotations

import pickle
import queue
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tawin_nemo.config.backbones import BACKBONES, FlopCount
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.parallel.channel import Channel, Stop, decode, encode
from tawin_nemo.placement.remote_engine import MESSAGES, BuildEngine, Generate, Generated, Search, Searched
from tawin_nemo.rollout.scoring import empty_candidates
from tawin_nemo.run.failures import OpenLog
from tawin_nemo.types import PromptBatch, Rollout, TokenRows
from tests.distributed.rollout_worker import small_catalog

ROWS = TokenRows.from_lists([[1, 2, 3], [], [4]])
PROMPTS = PromptBatch(torch.arange(3), ROWS, torch.tensor([5, 6, 7]))


@dataclass(frozen=True)
class Inner:
    number: int


@dataclass(frozen=True)
class Carries:
    value: Any
    inner: Inner | None = None


@dataclass(frozen=True)
class Stranger:
    number: int


def again(value: Any) -> Any:
    return decode(encode(Carries(value)), (Carries,)).value


@pytest.mark.parametrize(
    "value",
    [None, True, -3, 2**80, 0.1, float("inf"), "a b/ü\n", Path("/ü"), [1, [2.5, None]], (1, ("x",)), {1: {"a": (2,)}}],
    ids=repr,
)  # fmt: skip
def test_plain_values_keep_value_and_type(value):
    assert again(value) == value
    assert type(again(value)) is type(value)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "float16", "bfloat16", "float32", "float64", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (2, 3, 5)], ids=str)
def test_tensors_keep_every_bit(dtype, shape):
    kind = getattr(torch, dtype)
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 100).to(kind)
    back = again([1, value, "between", value])  # an odd number of bytes before the second one
    for copy in (back[1], back[3]):
        assert (copy.dtype, copy.shape) == (kind, torch.Size(shape))
        assert torch.equal(copy.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    back[1].fill_(0)
    assert torch.equal(back[3], value), "the copies share no memory"


@pytest.mark.parametrize("dtype", ["<i4", "<i8", "<f4", "|b1", ">i2"])
def test_arrays_keep_values_type_and_order_of_axes(dtype):
    value = np.arange(24).reshape(2, 3, 4).astype(dtype).transpose(2, 0, 1)
    back = again(value)
    assert (back.dtype, back.flags.writeable) == (value.dtype, True)
    np.testing.assert_array_equal(back, value)
    assert again(np.array(7)).shape == ()


def test_strided_and_expanded_tensors_arrive_dense():
    wide = torch.arange(12.0).view(3, 4)
    assert torch.equal(again(wide.T), wide.T)
    assert torch.equal(again(wide[:, :1].expand(3, 5)), wide[:, :1].expand(3, 5))


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, np.array(["x", None], dtype=object), np.int64(3), Inner],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_is_no_data_is_not_sent(value):
    with pytest.raises(TypeError, match="a message cannot carry a value of type"):
        encode(Carries([value]))


def test_only_the_receivers_dataclasses_are_made():
    assert decode(encode(Carries(1, Inner(2))), (Carries,)) == Carries(1, Inner(2))
    with pytest.raises(TypeError, match="holds a Stranger; only Carries, Inner are accepted"):
        decode(encode(Carries(Stranger(1))), (Carries,))
    with pytest.raises(TypeError, match="holds a Stranger"):
        decode(encode(Stranger(1)), (Carries,))


class Fires:
    fired = False

    def __reduce__(self):
        return (setattr, (Fires, "fired", True))


def test_bytes_of_another_encoding_run_no_code():
    harmful = pickle.dumps(Fires())
    with pytest.raises(Exception):  # noqa: B017 - whatever the parser says
        decode(harmful, (Carries,))
    assert not Fires.fired


def test_two_message_types_of_one_name_are_an_error():
    other = dataclass(frozen=True)(type("Inner", (), {"__annotations__": {"x": "int"}}))
    with pytest.raises(TypeError, match="two message types are called Inner"):
        decode(encode(Stop()), (Carries, other))


def test_a_whole_engine_survives_with_its_catalog():
    catalog = small_catalog()
    recipe = replace(Recipe(), exp_manager={"create_wandb_logger": True, "nested": {"names": ["a", 1, None]}})
    sent = BuildEngine(recipe, BACKBONES["llama-3.2-1b"], catalog)
    back = decode(encode(sent), MESSAGES)
    assert (back.recipe, back.shape) == (sent.recipe, sent.shape)
    assert back.catalog.fingerprint == catalog.fingerprint
    assert back.catalog.trie.num_leaves == catalog.trie.num_leaves
    leaves = torch.from_numpy(catalog.leaf_I)
    for ours, theirs in zip(back.catalog.trie.paths_of(leaves), catalog.trie.paths_of(leaves), strict=True):
        assert torch.equal(ours, theirs)


def test_prompts_rollouts_and_candidates_survive():
    asked = decode(encode(Generate(PROMPTS, {"group_size": 4, "negatives": "beam", "oversample": 1.5})), MESSAGES)
    assert asked.options == {"group_size": 4, "negatives": "beam", "oversample": 1.5}
    assert torch.equal(asked.prompts.target_B, PROMPTS.target_B)
    assert asked.prompts.prompts.flat.tolist() == [1, 2, 3, 4]
    assert asked.prompts.prompts.flat.dtype == np.int64
    scores = torch.tensor([[0.5, -torch.inf]] * 3)
    items = torch.zeros(3, 2, dtype=torch.long)
    rollout = Rollout(PROMPTS, items, items[..., None], items, scores, None, items > 0, 9)
    back = decode(encode(Generated(rollout, FlopCount(1, 2.5, 3))), (Generated,))
    assert (back.flops, back.rollout.weight_version) == (FlopCount(1, 2.5, 3), 9)
    assert (back.rollout.logprobs_BGT, back.rollout.inserted_BG) == (None, None)
    assert torch.equal(back.rollout.scores_BG, scores)
    assert back.rollout.is_target_BG.dtype == torch.bool
    empty = decode(encode(Searched(empty_candidates(5, 3), FlopCount())), (Searched,)).candidates
    assert (empty.tokens_BWT.shape, empty.tokens_BWT.dtype) == ((0, 5, 3), torch.long)
    assert decode(encode(OpenLog(Path("a/b"), 3)), (OpenLog, *MESSAGES)) == OpenLog(Path("a/b"), 3)


class Wire:
    def __init__(self) -> None:
        self.sent: queue.Queue[bytes] = queue.Queue()

    def send(self, data: bytes) -> None:
        self.sent.put(data)

    def receive(self) -> bytes:
        return self.sent.get(timeout=5)


def test_a_following_rank_handles_messages_in_order_until_it_is_stopped():
    wire, seen = Wire(), []
    channel = Channel(wire)
    for message in (Search(ROWS, 3, None), Search(ROWS, 4, 100), Stop(), Search(ROWS, 5, None)):
        channel.broadcast(message)
    Channel(wire).follow(MESSAGES, seen.append)
    assert [(message.width, message.token_budget) for message in seen] == [(3, None), (4, 100)]
    with pytest.raises(TypeError, match="holds a Search"):
        Channel(wire).follow((OpenLog,), seen.append)
