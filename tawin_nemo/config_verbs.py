"""Sections of a recipe besides training a language model: baselines, and the verbs generate, convert, retrain."""

from __future__ import annotations

from dataclasses import dataclass

from tawin_nemo.options import choice, number, opt


@dataclass(frozen=True)
class BaselineConfig:
    """A classic recommender, trained and evaluated instead of the language model."""

    model: str = choice("off", "gru4rec", "caser", "sasrec", "tiger", help="which one; off = the language model")
    loss: str = choice("softmax", "bce", help="all items as negatives, or sampled ones (not tiger)")
    negatives: int = number(1, 1, help="loss=bce: sampled negatives per positive")
    rows: str = choice("all", "earlier", help="rows of train: all, or the earlier 1 - rl.fresh_share (for a reward)")
    hidden: int = number(64, 4, help="width of embeddings and layers")
    layers: int = number(2, 1, help="layers (gru4rec, sasrec, tiger)")
    heads: int = number(2, 1, help="attention heads (sasrec, tiger)")
    dropout: float = number(0.2, 0.0, 0.9, help="on inputs and layers")
    batch_size: int = number(256, 1, help="rows per step")
    epochs: int = number(200, 1, help="upper bound")
    patience: int = number(10, 1, help="epochs on valid without progress before training stops")
    lr: float = number(1e-3, 0.0, help="Adam's learning rate")
    weight_decay: float = number(0.0, 0.0, help="Adam's L2 penalty")


@dataclass(frozen=True)
class GenerateConfig:
    split: str = choice("test", "valid", "train", help="whose prompts are answered when no history is given")
    rows: int = number(3, 1, help="prompts of the split")
    history: list[int] = opt([], "item indices, oldest first: recommend for this history instead")
    n: int = number(10, 1, help="recommendations per prompt")


@dataclass(frozen=True)
class ConvertConfig:
    output: str = opt("", "folder for the Hugging Face export")
    shard_mb: int = number(2000, 1, help="largest safetensors file, MB")


@dataclass(frozen=True)
class RetrainConfig:
    """The verb retrain: a night's model replaces the published one only if it passes the gate."""

    root: str = opt("", "folder of the nights' runs, the published versions and the link `latest`")
    date: str = opt("", "YYYY-MM-DD; interactions up to that day are used (empty = today, UTC)")
    warm_start: bool = opt(True, "begin with the published model, if there is one, instead of model.init")
    metrics: list[str] = opt(["ndcg@10"], "metrics on valid that all have to pass")
    margin: float = number(
        0.05, 0.0, 1.0,
        help="share of the published metric that the lower end of the 95 % interval of the difference may be below 0",
    )  # fmt: skip
