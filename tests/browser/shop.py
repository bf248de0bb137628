"""A small shop behind a real server, for the page: titles that one can read, a model whose weights are a number."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.serve.engine.catalog import PromptFormat, ServedCatalog
from tests.serve.scene import GateLM, Scene, serving

KINDS = {
    "trail running shoes": ("grey", "blue", "wide fit"),
    "trail running vest": ("5 litres", "12 litres"),
    "hiking boots": ("low cut", "leather", "waterproof"),
    "hiking poles": ("carbon", "folding"),
    "camping stove": ("gas", "multi fuel"),
    "camping mug": ("steel", "enamel", "titanium"),
    "climbing rope": ("9.5 mm, 60 m", "9.8 mm, 70 m"),
    "climbing chalk": ("block", "liquid"),
    "head torch": ("350 lumens", "600 lumens", "rechargeable"),
    "down jacket": ("women", "men", "hooded"),
    "rain jacket": ("women", "men", "ultralight"),
    "sleeping bag": ("summer", "three seasons", "winter"),
    "water bottle": ("insulated", "soft flask", "filter"),
}
TITLES = [f"{kind}, {form}".capitalize() for kind, forms in KINDS.items() for form in forms]


@cache
def small_catalog() -> ServedCatalog:
    data = DataConfig(bpe_vocab_size=600)
    tokenizer = build_tokenizer(data, CatalogConfig(), ModelConfig(), TITLES, None)
    ids = [f"SKU-{number:03}" for number in range(len(TITLES))]
    catalog = build_catalog(TITLES, ids, TITLES, tokenizer, Template(), kind="title")
    return ServedCatalog.of(catalog, TITLES, PromptFormat(tokenizer, Template(), 10, 200))


class ShopLM(GateLM):
    """Log-probs that sum to one, fixed by all tokens before, and higher for tokens that occur among them."""

    def path_logprobs(self, sequence: Sequence[int], tokens: list[int], space: str) -> list[float]:
        draws = [zlib.crc32(repr((self.seed, *sequence, token)).encode()) / 2**32 for token in tokens]
        logits = [3.0 * draw + (token in sequence) for draw, token in zip(draws, tokens, strict=True)]
        total = math.log(math.fsum(map(math.exp, logits)))
        return [logit - total for logit in logits]


@contextmanager
def shop(folder: Path) -> Iterator[Scene]:
    """Open to everybody; ``folder / "weights"`` holds other weights."""
    (folder / "weights").write_text("2", encoding="ascii")
    with serving([folder], catalog=small_catalog(), keys=(), kind=ShopLM, beams=20) as scene:
        yield scene
