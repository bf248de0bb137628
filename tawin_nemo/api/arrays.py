"""The body of a rollout reply: a safetensors file whose metadata name the server, catalog and versions.

Integers are encoded as int32, scores and log-probs in the dtype of the search, so that nothing is rounded.
B: prompts; W: candidates of each; T: tokens of the longest path.
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
    """W candidates for each of B prompts by descending score, and the server, catalog and versions they come from.

    A prompt with fewer than W candidates is padded: item -1, length 0, score -inf.
    """

    items_BW: Tensor  # index among the catalog's live items; -1: padding
    tokens_BWT: Tensor  # token ids of the paths, padded with 0
    lengths_BW: Tensor  # tokens of each path; 0: padding
    scores_BW: Tensor  # -inf: padding
    logprobs_BWT: Tensor  # of each token in the search's score space, padded with 0
    instance: str  # id of the server's start
    catalog: str  # fingerprint of the catalog
    weight_version: int
    catalog_version: int

    def encoded(self) -> bytes:
        """The reply as a safetensors file; ``decoded`` is the inverse."""
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
        """The reply in a safetensors file, integers as int64. Raises TawinError for anything else."""
        try:
            tensors = safetensors.torch.load(data)
            size = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + size])["__metadata__"]
            tensors |= {name: tensors[name].long() for name in _INTEGERS}
            reply = cls(
                tensors["items"], tensors["tokens"], tensors["lengths"], tensors["scores"], tensors["logprobs"],
                metadata["instance"], metadata["catalog"], int(metadata["weight_version"]),
                int(metadata["catalog_version"]),
            )  # fmt: skip
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise TawinError(f"the response is no rollout ({type(error).__name__}: {error})") from error
        lists, paths = reply.items_BW.shape, reply.tokens_BWT.shape
        if len(lists) != 2 or not (
            reply.lengths_BW.shape == reply.scores_BW.shape == lists == paths[:2]
            and len(paths) == 3
            and reply.logprobs_BWT.shape == paths
        ):
            raise TawinError(f"the response is no rollout: items {list(lists)}, tokens {list(paths)}")
        return reply
