"""TIGER (arXiv 2305.05065): a T5 reads the semantic-ID codes of the history and writes those of the next item.

Left out: the paper's hashed user-id token, so that rows differ by their history alone, as for the other
models. Added: each code of the history carries an embedding of how many codes ago it was, where T5 knows distances
between codes only. Ranking: beam search over the catalog's codes only; a code's log-probability is normalised over
the codes that lead to items, so that steps without a choice cost nothing.

C codes of an item or continuations of a state, S codes of a history, N states or flattened beams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from tawin_nemo.baselines.protocol import SequentialRecommender
from tawin_nemo.baselines.sampled_softmax import SharedNegatives
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.types import NO_ITEM, Record, TokenRows

#: The first two entries of the vocabulary (T5's own numbers).
PAD, END = 0, 1
#: Where ``CodeTree.states_of`` has no state: nothing is left to choose there.
NO_STATE = -1
#: Histories searched at once: their beams each hold a copy of the history's keys and values.
SEARCH_ROWS = 32
#: Beams when the caller names no width.
BEAMS = 50
#: Fresh weights, as a share of T5's own, which go with Adafactor: its steps are in proportion to the weights. Adam's
#: have the size of the learning rate; embeddings of size 1 stay the random directions that they begin with under them.
INITIAL = 0.1
#: Codes further back than this share one age embedding.
MAX_CODE_AGE = 64


@dataclass(frozen=True)
class CodeBook:
    """``rows``: the codes of I items, END last; ``vocab``: PAD, END, then one token per pair of level and code."""

    rows: TokenRows
    vocab: int

    @classmethod
    def from_paths(cls, paths: TokenRows) -> CodeBook:
        """Number the tokens of all paths of a catalog again, separately per level (TIGER's level offsets).

        The last token of every path is its end of text and becomes END. Equal paths become equal rows.
        """
        level_S = np.arange(len(paths.flat)) - np.repeat(paths.offsets[:-1], paths.lengths)
        code_S = level_S < np.repeat(paths.lengths, paths.lengths) - 1
        pairs = level_S * (int(paths.flat.max()) + 1) + paths.flat
        distinct, number = np.unique(pairs[code_S], return_inverse=True)
        flat = np.full(len(paths.flat), END, dtype=np.int64)
        flat[code_S] = number + 2
        return cls(TokenRows(flat, paths.offsets), len(distinct) + 2)


@dataclass(frozen=True)
class CodeTree(Record):
    """Prefixes of the rows as N states, state 0 the empty one; a state of only one row is final and leads to itself.

    ``child_token``, ``child_state`` hold the continuations of state n at ``offsets[n] .. offsets[n + 1] - 1``.
    """

    offsets: Tensor  # [N + 1]
    child_token: Tensor  # [E]
    child_state: Tensor  # [E]
    item_N: Tensor  # first item of a final state's row, -1 elsewhere
    representative_I: Tensor  # first item with the same row
    num_rows: int  # distinct rows

    @classmethod
    def from_rows(cls, rows: TokenRows) -> CodeTree:
        """The tree of I rows. Raises CatalogError for no rows, an empty row, or a row that begins another one."""
        trie = TokenTrie.from_paths(rows)
        positions, items, edges = [trie.root], [], []  # positions grows while it is walked: breadth first
        for state, position in enumerate(positions):
            node = position % trie.num_nodes
            if node >= trie.num_inner:  # nothing is left to choose on the way to this leaf
                items.append(int(trie.items(node)[0]))
                edges.append([(PAD, state)])
                continue
            items.append(-1)
            tokens, children = trie.children(position)
            edges.append([(int(token), len(positions) + i) for i, token in enumerate(tokens)])
            positions.extend(children.tolist())
        counts = [len(out) for out in edges]
        flat = torch.tensor([edge for out in edges for edge in out])
        _, first, inverse = np.unique(trie.leaf_I, return_index=True, return_inverse=True)
        return cls(
            offsets=torch.tensor([0, *np.cumsum(counts).tolist()]),
            child_token=flat[:, 0],
            child_state=flat[:, 1],
            item_N=torch.tensor(items),
            representative_I=torch.from_numpy(first[inverse]),
            num_rows=trie.num_leaves,
        )

    def children(self, state_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and next states [N, C] of the continuations and which of them exist; C = the most that a state has."""
        start_N, stop_N = self.offsets[state_N], self.offsets[state_N + 1]
        widest = int((stop_N - start_N).max())
        edge_NC = start_N.unsqueeze(1) + torch.arange(widest, device=state_N.device)
        exists_NC = edge_NC < stop_N.unsqueeze(1)
        edge_NC = edge_NC.clamp(max=len(self.child_token) - 1)
        return self.child_token[edge_NC], self.child_state[edge_NC], exists_NC

    def states_of(self, codes_IC: Tensor) -> Tensor:
        """The state in which each code of a row is chosen [I, C], NO_STATE from the row's final state on.

        ``codes_IC``: rows of this tree, padded behind their end.
        """
        state_I, columns = torch.zeros(len(codes_IC), dtype=torch.long), []
        for code_I in codes_IC.T:
            open_I = self.item_N[state_I] == NO_ITEM
            columns.append(state_I.masked_fill(~open_I, NO_STATE))
            token_IC, next_IC, exists_IC = self.children(state_I)
            taken_I = (exists_IC & (token_IC == code_I.unsqueeze(1))).int().argmax(dim=1, keepdim=True)
            state_I = torch.where(open_I, next_IC.gather(1, taken_I).squeeze(1), state_I)
        return torch.stack(columns, dim=1)


class Tiger(SequentialRecommender):
    """``paths`` are the items' token paths, end of text last; items on one path share their rank."""

    def __init__(
        self, paths: TokenRows, *, hidden: int, layers: int, heads: int, dropout: float, loss_space: str = "vocab"
    ) -> None:
        super().__init__(len(paths))
        self.loss_space = loss_space
        book = CodeBook.from_paths(paths)
        self.tree = CodeTree.from_rows(book.rows)
        self.representative_I = self.tree.representative_I
        codes_IC, _ = book.rows.padded(PAD)
        self.register_buffer("codes_IC", torch.cat([torch.full_like(codes_IC[:1], PAD), codes_IC]), persistent=False)
        self.codes_IC: Tensor  # row i + 1 holds item i's codes and END, row 0 is padding
        self.register_buffer("states_IC", self.tree.states_of(codes_IC), persistent=False)
        self.states_IC: Tensor  # where in the tree each code of an item is chosen
        self.t5 = T5ForConditionalGeneration(
            T5Config(
                vocab_size=book.vocab,
                d_model=hidden,
                d_kv=hidden // heads,
                d_ff=4 * hidden,
                num_layers=layers,
                num_heads=heads,
                dropout_rate=dropout,
                decoder_start_token_id=PAD,
                initializer_factor=INITIAL,
                tie_word_embeddings=False,
            )
        )
        self.t5.lm_head.weight = self.t5.shared.weight  # without the factor of 1 / sqrt(hidden) that T5's option brings
        self.place = nn.Embedding(MAX_CODE_AGE, hidden)
        nn.init.normal_(self.place.weight, std=INITIAL)

    def loss(
        self, history_BL: Tensor, target_B: Tensor, negatives: Tensor | SharedNegatives | None = None
    ) -> Tensor:  # fmt: skip
        """``-log p(codes of the target)``, summed over its codes and END.

        ``loss_space``: each over the whole vocabulary, or (``trie``) over the codes that lead to items, as the search
        ranks them; steps without a choice cost nothing then.
        """
        if negatives is not None:
            raise ValueError("TIGER has no loss with sampled negatives; call it without negatives")
        tokens_BS, mask_BS = self.encoder_input(history_BL)
        codes_BT = self.codes_IC[target_B + 1]
        before_BT = F.pad(codes_BT[:, :-1], (1, 0), value=PAD)  # T5 begins with the padding token
        read_BSD = self.read(tokens_BS, mask_BS)
        logits_BTV = self.t5(
            encoder_outputs=BaseModelOutput(last_hidden_state=read_BSD), attention_mask=mask_BS,
            decoder_input_ids=before_BT,
        ).logits  # fmt: skip
        if self.loss_space == "trie":
            return self._admissible_loss(logits_BTV, codes_BT, self.states_IC[target_B]).sum(dim=1)
        loss_BT = F.cross_entropy(logits_BTV.transpose(1, 2), codes_BT, ignore_index=PAD, reduction="none")
        return loss_BT.sum(dim=1)

    def _admissible_loss(self, logits_BTV: Tensor, codes_BT: Tensor, states_BT: Tensor) -> Tensor:
        """``-log p`` of each code among those that its state admits, 0 where nothing is left to choose. [B, T]"""
        self._tree_on(logits_BTV.device)
        token_NC, _, exists_NC = self.tree.children(states_BT.clamp(min=0).flatten())
        logits_NV, code_N1 = logits_BTV.flatten(0, 1), codes_BT.reshape(-1, 1)
        logit_NC = logits_NV.gather(1, token_NC).masked_fill(~exists_NC, float("-inf"))
        loss_N = logit_NC.logsumexp(dim=1) - logits_NV.gather(1, code_N1).squeeze(1)
        return loss_N.view_as(states_BT).masked_fill(states_BT == NO_STATE, 0.0)

    def _tree_on(self, device: torch.device) -> None:
        if self.tree.offsets.device != device:
            self.tree = self.tree.to(device)

    def encoder_input(self, history_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the items one after another without gaps, then END: ``tokens_BS`` and ``mask_BS`` (1 = a token)."""
        codes_BS = self.codes_IC[:, :-1][history_BL + 1].flatten(1)  # the last column holds END or padding only
        codes_BS = codes_BS.masked_fill(codes_BS == END, PAD)
        used_BS = codes_BS != PAD
        order_BS = used_BS.int().argsort(dim=1, descending=True, stable=True)
        length_B1 = used_BS.sum(dim=1, keepdim=True)
        tokens_BS = F.pad(codes_BS.gather(1, order_BS), (0, 1), value=PAD).scatter(1, length_B1, END)
        tokens_BS = tokens_BS[:, : int(length_B1.max()) + 1]
        return tokens_BS, (tokens_BS != PAD).long()

    def read(self, tokens_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """The encoder's states [B, S, D]; the age of each code is added as an embedding, see the module docstring."""
        age_BS = (mask_BS.sum(dim=1, keepdim=True) - mask_BS.cumsum(dim=1)).clamp(0, MAX_CODE_AGE - 1)
        embedded_BSD = self.t5.shared(tokens_BS) + self.place(age_BS)
        encoded: Tensor = self.t5.encoder(inputs_embeds=embedded_BSD, attention_mask=mask_BS).last_hidden_state
        return encoded

    @torch.no_grad()
    def scores(self, history_BL: Tensor, width: int | None = None) -> Tensor:
        """Log-probability [B, I] of each item that the search returned, -inf for all others."""
        width = min(width or BEAMS, self.tree.num_rows)
        parts = []
        for part_BL in history_BL.split(SEARCH_ROWS):
            items_BW, score_BW = self.search(part_BL, width)
            spare_BI = score_BW.new_full((len(part_BL), self.num_items + 1), float("-inf"))
            column_BW = torch.where(items_BW == NO_ITEM, self.num_items, items_BW)
            spare_BI.scatter_(1, column_BW, score_BW)
            parts.append(spare_BI[:, : self.num_items][:, self.representative_I])
        return torch.cat(parts)

    def search(self, history_BL: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The best ``width`` rows of codes: first item of each and its score, best first; NO_ITEM with -inf."""
        self._tree_on(history_BL.device)
        tokens_BS, mask_BS = self.encoder_input(history_BL)
        read_BSD = self.read(tokens_BS, mask_BS)
        memory = EncoderDecoderCache(DynamicCache(), DynamicCache())
        batch, device = len(history_BL), history_BL.device
        state_BW = torch.zeros(batch, 1, dtype=torch.long, device=device)
        score_BW = torch.zeros(batch, 1, device=device)
        token_BW = torch.full_like(state_BW, PAD)
        user_N = torch.arange(batch, device=device)
        while bool(((self.tree.item_N[state_BW] == NO_ITEM) & (score_BW > float("-inf"))).any()):
            logits_NV = self._decode(token_BW, read_BSD[user_N], mask_BS[user_N], memory)
            beams = state_BW.shape[1]
            state_BW, score_BW, token_BW, parent_BW = self._advance(state_BW, score_BW, logits_NV, width)
            parent_N = (parent_BW + beams * torch.arange(batch, device=device).unsqueeze(1)).flatten()
            memory.self_attention_cache.reorder_cache(parent_N)
            if beams != state_BW.shape[1]:  # keys and values of the history are the same for all beams of a row
                memory.cross_attention_cache.reorder_cache(parent_N)
                user_N = torch.arange(batch, device=device).repeat_interleave(state_BW.shape[1])
        item_BW = self.tree.item_N[state_BW].masked_fill(score_BW == float("-inf"), NO_ITEM)
        score_BW, order_BW = score_BW.sort(dim=1, descending=True, stable=True)
        return item_BW.gather(1, order_BW), score_BW

    def _decode(self, token_BW: Tensor, read_NSD: Tensor, mask_NS: Tensor, memory: EncoderDecoderCache) -> Tensor:
        """Logits after one more token of every beam; ``memory`` keeps what was computed."""
        out = self.t5(
            encoder_outputs=BaseModelOutput(last_hidden_state=read_NSD), attention_mask=mask_NS,
            decoder_input_ids=token_BW.reshape(-1, 1), past_key_values=memory, use_cache=True,
        )  # fmt: skip
        return out.logits[:, -1]

    def _advance(
        self, state_BW: Tensor, score_BW: Tensor, logits_NV: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best ``width`` continuations of each row: states, scores, tokens, and the beams that they continue."""
        batch = len(state_BW)
        token_NC, next_NC, exists_NC = self.tree.children(state_BW.flatten())
        logit_NC = logits_NV.gather(1, token_NC).masked_fill(~exists_NC, float("-inf"))
        total_BE = (score_BW.reshape(-1, 1) + logit_NC.log_softmax(dim=1)).reshape(batch, -1)
        best_BW, edge_BW = total_BE.topk(min(width, total_BE.shape[1]), dim=1)
        token_BW, next_BW = (part.reshape(batch, -1).gather(1, edge_BW) for part in (token_NC, next_NC))
        return next_BW, best_BW, token_BW, edge_BW // token_NC.shape[1]
