"""The body of a rollout reply: a safetensors file whose metadata name what the arrays come from.

Integers travel as int32, scores and log-probs in the number format of the search, so that nothing is rounded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tawin_nemo.util.errors import TawinError

MEDIA_TYPE = "application/vnd.safetensors"
_INTEGERS = ("items", "tokens", "lengths")


@dataclass(frozen=True)
class RolloutReply:
    """W candidates for each of B prompts, best score first, with where they come from."""

    items_BW: Tensor  # place among the items that the fingerprint counts; -1 where fewer than W exist
    tokens_BWT: Tensor  # token paths, padded with 0
    lengths_BW: Tensor  # tokens of each path; 0 for -1
    scores_BW: Tensor  # -inf for -1
    logprobs_BWT: Tensor  # of each token, in the space that was searched; 0 at padding
    instance: str  # of the server's start
    catalog: str  # fingerprint
    weight_version: int
    catalog_version: int

    def encoded(self) -> bytes:
        tensors = {
            "items": self.items_BW, "tokens": self.tokens_BWT, "lengths": self.lengths_BW, "scores": self.scores_BW,
            "logprobs": self.logprobs_BWT,
        }  # fmt: skip
        metadata = {
            "instance": self.instance, "catalog": self.catalog, "weight_version": str(self.weight_version),
            "catalog_version": str(self.catalog_version),
        }  # fmt: skip
        tensors |= {name: tensors[name].to(torch.int32) for name in _INTEGERS}
        return safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, metadata)

    @classmethod
    def decoded(cls, data: bytes) -> RolloutReply:
        """Raises TawinError for bytes that are no such reply."""
        try:
            tensors = safetensors.torch.load(data)
            size = int.from_bytes(data[:8], "little")
            facts = json.loads(data[8 : 8 + size])["__metadata__"]
            tensors |= {name: tensors[name].long() for name in _INTEGERS}
            reply = cls(
                tensors["items"], tensors["tokens"], tensors["lengths"], tensors["scores"], tensors["logprobs"],
                facts["instance"], facts["catalog"], int(facts["weight_version"]), int(facts["catalog_version"]),
            )  # fmt: skip
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise TawinError(f"what came is no rollout ({type(error).__name__}: {error})") from error
        lists, paths = reply.items_BW.shape, reply.tokens_BWT.shape
        if len(lists) != 2 or not (
            reply.lengths_BW.shape == reply.scores_BW.shape == lists == paths[:2]
            and len(paths) == 3
            and reply.logprobs_BWT.shape == paths
        ):
            raise TawinError(f"what came is no rollout: items {list(lists)}, tokens {list(paths)}")
        return reply
