"""Constrained decoding over an item catalog, in one file that needs torch, safetensors and transformers only.

``TrieLogitsProcessor`` keeps a language model inside the catalog that lies beside its weights, so that every answer is
an item. It works as a logits processor of transformers (greedy, sampling, beams, batches padded on the left) and as a
callable on (tokens generated so far, logits of the next one) for one request, the form that vLLM's
``AdapterLogitsProcessor`` takes and that a ``CustomLogitProcessor`` of SGLang can call.

    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    processor = TrieLogitsProcessor.load(folder, prompt_lengths=inputs["input_ids"].shape[1])
    settings = json.load(open(f"{folder}/tawin.json"))["generate"]
    beams = model.generate(**inputs, **settings, logits_processor=[processor])
    items = [processor.trie.items(row[inputs["input_ids"].shape[1] :].tolist()) for row in beams]

Two score spaces. ``trie``: log-probs among the tokens that the catalog admits at a place, so that a token without a
choice costs nothing and all items together have probability 1. ``vocab``: log-probs among the whole vocabulary, others
masked afterwards. Beam search of transformers ranks by either. Sampling always draws as ``trie`` says, because whatever
draws normalises once more; so do the log-probs that vLLM reports after its processors, while the ones before its
processors are those of ``vocab``.

``trie.safetensors`` (format ``tawin_nemo.trie/1``) is a tree of tokens in compressed rows. N nodes, numbered by depth
and within a depth by path; node 0 is the root and edge e leads to node e + 1, so that there are N - 1 edges. I items.

    offsets       int64 [N + 1]  edges of node n are offsets[n] .. offsets[n + 1] - 1
    tokens        int32 [N - 1]  token of each edge, ascending within a node
    item_offsets  int64 [N + 1]  items whose path ends at node n are items[item_offsets[n] .. item_offsets[n + 1] - 1]
    items         int64 [I]      item numbers (lines of catalog.jsonl, rows of catalog.parquet)

Every path ends in the end token. The file's metadata has one entry ``tawin_trie``, a JSON object: ``format``,
``end_token`` (its id) and ``catalog`` (fingerprint).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LogitsProcessor

FORMAT = "tawin_nemo.trie/1"
FILE = "trie.safetensors"
_SHIFT = 32  # key of an edge: node << 32 | token


class TokenTrie:
    """The token paths of a catalog on one device; R rows of tokens are followed at once, -1 is no node."""

    def __init__(self, offsets: Tensor, tokens: Tensor, item_offsets: Tensor, items: Tensor, end_token: int) -> None:
        self.offsets, self.tokens, self.item_offsets, self.items_at = offsets, tokens.long(), item_offsets, items
        self.end_token = end_token
        nodes = torch.arange(len(offsets) - 1, device=offsets.device)
        self._keys = (torch.repeat_interleave(nodes, offsets.diff()) << _SHIFT) + self.tokens

    @classmethod
    def load(cls, path: str | Path) -> TokenTrie:
        """Read a trie.safetensors. Raises ValueError for a file of another format."""
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("tawin_trie", "{}"))
            if about.get("format") != FORMAT:
                raise ValueError(f"{path} has format {about.get('format')!r}, this file reads {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in ("offsets", "tokens", "item_offsets", "items")}
        return cls(**tensors, end_token=about["end_token"])

    def to(self, device: torch.device) -> TokenTrie:
        """The same trie on another device."""
        if device == self.offsets.device:
            return self
        edges = self.offsets.to(device), self.tokens.to(device)
        return TokenTrie(*edges, self.item_offsets.to(device), self.items_at.to(device), self.end_token)

    def follow(self, tokens_RT: Tensor, start_R: Tensor) -> Tensor:
        """The node that each row's tokens from column ``start_R`` on lead to from the root; -1: not in the trie."""
        node_R = torch.zeros_like(start_R)
        for column in range(int(start_R.min()), tokens_RT.shape[1]):
            key_R = (node_R << _SHIFT) + tokens_RT[:, column]
            edge_R = torch.searchsorted(self._keys, key_R).clamp(max=len(self._keys) - 1)
            child_R = torch.where(self._keys[edge_R] == key_R, edge_R + 1, -1)
            node_R = torch.where(start_R <= column, child_R, node_R)
        return node_R

    def admissible(self, node_R: Tensor, vocab: int) -> Tensor:
        """bool [R, vocab]: the tokens that go on from each node; the end token alone where none does."""
        first_R, last_R = self.offsets[node_R.clamp(min=0)], self.offsets[node_R.clamp(min=0) + 1]
        count_R = torch.where(node_R < 0, 0, last_R - first_R)
        row_E = torch.repeat_interleave(count_R)
        edge_E = torch.arange(len(row_E), device=row_E.device) + (first_R - count_R.cumsum(0) + count_R)[row_E]
        allowed_RV = torch.zeros((len(node_R), vocab), dtype=torch.bool, device=node_R.device)
        allowed_RV[row_E, self.tokens[edge_E]] = True
        allowed_RV[:, self.end_token] |= count_R == 0
        return allowed_RV

    def items(self, tokens: Sequence[int]) -> list[int]:
        """The items whose path ``tokens`` is, ascending; what follows the end token is not looked at. [] if none is."""
        tokens = list(tokens)
        path = tokens[: tokens.index(self.end_token) + 1] if self.end_token in tokens else tokens
        device = self.offsets.device
        start = torch.zeros(1, dtype=torch.long, device=device)
        node = int(self.follow(torch.tensor([path], dtype=torch.long, device=device), start))
        return [] if node < 0 else self.items_at[self.item_offsets[node] : self.item_offsets[node + 1]].tolist()


class TrieLogitsProcessor(LogitsProcessor):
    """Admits only the tokens that lead to an item of the catalog; see the module's docstring.

    ``prompt_lengths``: tokens of the prompts, padding included. One number (prompts padded on the left), or one per
    prompt where answers begin at different columns; beams of one prompt are neighbouring rows. It is needed for calls
    with a batch, and not for calls with the tokens of one request.
    """

    def __init__(
        self, trie: TokenTrie, *, prompt_lengths: int | Sequence[int] | None = None, score_space: str = "trie"
    ) -> None:
        if score_space not in ("trie", "vocab"):
            raise ValueError(f"score_space={score_space!r} is not known; use trie or vocab")
        self.trie, self.score_space = trie, score_space
        self.prompt_lengths = [prompt_lengths] if isinstance(prompt_lengths, int) else prompt_lengths

    @classmethod
    def load(
        cls, folder: str | Path, *, prompt_lengths: int | Sequence[int] | None = None, score_space: str = "trie"
    ) -> TrieLogitsProcessor:
        """A processor for the catalog in the folder of an exported model."""
        return cls(TokenTrie.load(Path(folder) / FILE), prompt_lengths=prompt_lengths, score_space=score_space)

    def __call__(self, input_ids: Tensor | Sequence[int], scores: Tensor) -> Tensor:
        """The scores with -inf at every token that does not lead to an item.

        ``input_ids`` [R, T] (prompt and answer so far) with ``scores`` [R, V], or the generated tokens of one request
        with ``scores`` [V]. Scores are logits or log-probs. A row that has ended, or that is no path of the catalog
        (beams that stand for "none"), may only write the end token.
        """
        self.trie = self.trie.to(scores.device)
        if scores.dim() == 1:
            tokens_RT = torch.as_tensor(input_ids, dtype=torch.long, device=scores.device).view(1, -1)
            return self._masked(self.trie.follow(tokens_RT, tokens_RT.new_zeros(1)), scores[None])[0]
        tokens_RT = torch.as_tensor(input_ids, device=scores.device)
        return self._masked(self.trie.follow(tokens_RT, self._starts(tokens_RT)), scores)

    def _starts(self, tokens_RT: Tensor) -> Tensor:
        """The column at which each row's answer begins."""
        if self.prompt_lengths is None:
            raise ValueError("a batch needs prompt_lengths, for example prompt_lengths=inputs['input_ids'].shape[1]")
        rows, prompts = len(tokens_RT), len(self.prompt_lengths)
        if rows % prompts:
            raise ValueError(f"prompt_lengths names {prompts} prompts, which does not divide the {rows} rows")
        starts = torch.tensor(list(self.prompt_lengths), dtype=torch.long, device=tokens_RT.device)
        return starts.repeat_interleave(rows // prompts)

    def _masked(self, node_R: Tensor, scores_RV: Tensor) -> Tensor:
        barred_RV = ~self.trie.admissible(node_R, scores_RV.shape[1])
        if self.score_space == "vocab":
            return scores_RV.log_softmax(dim=-1).masked_fill(barred_RV, -torch.inf)
        return scores_RV.masked_fill(barred_RV, -torch.inf).log_softmax(dim=-1)
