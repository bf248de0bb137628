"""Recipe sections of supervised fine-tuning: the loop, and the tasks beside the next item."""

from __future__ import annotations

from dataclasses import dataclass

from tawin_nemo.options import choice, number, opt


@dataclass(frozen=True)
class SftConfig:
    enabled: bool = opt(True, "run SFT before RL")
    rows: str = choice(
        "auto", "earlier", "fresh", "all",
        help="rows of train: all, the earlier 1 - rl.fresh_share by time, the rest; auto = earlier when rl.rows=fresh",
    )  # fmt: skip
    epochs: int = number(30, 1, help="upper bound; early stopping on valid ends SFT (cosine and linear end here)")
    global_batch_size: int = number(128, 1, help="rows per optimizer step over all ranks")
    micro_batch_tokens: int = number(16384, 16, help="tokens per forward pass and rank (no padding)")
    lr: float = number(1e-3, 0.0, help="peak learning rate")
    schedule: str = choice("constant", "cosine", "linear", help="after the warm-up")
    warmup: int = number(50, 0, help="steps of linear warm-up")
    min_lr_ratio: float = number(0.1, 0.0, 1.0, help="floor of cosine and linear, as a share of lr")
    watch: str = choice(
        "loss", "ndcg",
        help="what on valid decides when SFT stops and which checkpoint it hands on; ndcg searches max(eval.ks) beams",
    )  # fmt: skip
    patience: int = number(1, 1, help="checks on valid without progress before SFT stops")
    min_delta: float = number(0.0, 0.0, help="fall of the valid loss, or rise of NDCG, that counts as progress")
    checks_per_epoch: int = number(1, 1, help="validations per epoch")
    loss_space: str = choice("vocab", "trie", help="normalise over the whole vocabulary or over the admissible tokens")


@dataclass(frozen=True)
class AlignConfig:
    """Further tasks of SFT: a task's weight is the share of its rows that an epoch adds (0 = off, 1 = all, 2 = twice).

    Needs catalog.kind=sid and a tokenizer that can write words. MiniOneRec (arXiv 2510.24431), LC-Rec (2311.09049).
    """

    title_to_sid: float = number(0.0, 0.0, help="title of an item -> its codes")
    sid_to_title: float = number(0.0, 0.0, help="codes of an item -> its title")
    history_to_title: float = number(0.0, 0.0, help="codes of a history -> title of the next item")
    titles_to_sid: float = number(0.0, 0.0, help="titles of a history -> codes of the next item")
    titles_to_title: float = number(0.0, 0.0, help="titles of a history -> title of the next item")
    description_to_sid: float = number(0.0, 0.0, help="description of an item -> its codes (LC-Rec)")
    sid_to_description: float = number(0.0, 0.0, help="codes of an item -> its description (LC-Rec)")
    intention_to_sid: float = number(0.0, 0.0, help="what a customer wants -> codes (LC-Rec); see intentions")
    intentions: str = opt("", "JSON file {item index: text}, below data.root, for intention_to_sid")
    max_words: int = number(64, 1, help="longer descriptions and intentions are cut")
    holdout: float = number(0.05, 0.0, 0.9, help="share of items that tasks about single items are tested on")
