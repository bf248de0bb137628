"""A fitted item tokenizer (vectors -> codes -> vectors) and its files, from which new items can be encoded.

I items, L levels, D dimensions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tawin_nemo.config.schema import SemanticIdsConfig
from tawin_nemo.semantic_ids import collisions
from tawin_nemo.semantic_ids.clustering import balanced_residual_kmeans, residual_kmeans
from tawin_nemo.semantic_ids.codebooks import CHUNK_ROWS, Codebooks, mean_codebooks
from tawin_nemo.semantic_ids.quantiser import Autoencoder, NetworkShape
from tawin_nemo.semantic_ids.train_quantiser import EpochCallback, Plan, train_quantiser
from tawin_nemo.util.errors import ConfigError, DataError

CODEBOOKS, WEIGHTS, NETWORK = "codebooks.npy", "network.safetensors", "network.json"
#: Methods whose codebooks lie in the latent space of networks.
WITH_NETWORK = ("rqvae", "rqkmeans_plus")


@dataclass(frozen=True, eq=False)
class ItemCoder:
    """Codebooks, and for some methods the networks around them. A coder without network works on the vectors."""

    method: str
    books: Codebooks
    network: Autoencoder | None = None

    def latents(self, x_ID: np.ndarray) -> np.ndarray:
        """Latent vectors that the codebooks quantise, [I, latent dimensions] float32."""
        if self.network is None:
            return np.asarray(x_ID, dtype=np.float32)
        return _in_pieces(self.network.encode, x_ID)

    def encode(self, x_ID: np.ndarray) -> np.ndarray:
        """Nearest codes [I, L]; items may share them. Raises DataError for vectors of another width."""
        expected = self.network.shape.dims if self.network else self.books.vectors_LKD.shape[2]
        if x_ID.shape[1] != expected:
            raise DataError(f"vectors of {x_ID.shape[1]} dimensions, but the codebooks were made for {expected}")
        return self.books.encode(self.latents(x_ID))

    def decode(self, codes_IL: np.ndarray) -> np.ndarray:
        """The vectors that the codes stand for, [I, D] float32."""
        read_ID = self.books.decode(codes_IL)
        return read_ID if self.network is None else _in_pieces(self.network.decode, read_ID)

    def save(self, folder: Path) -> None:
        """Write codebooks and network into an existing folder; ``load`` reads them back."""
        np.save(folder / CODEBOOKS, self.books.vectors_LKD)
        shape = asdict(self.network.shape) if self.network else None
        (folder / NETWORK).write_text(json.dumps({"method": self.method, "shape": shape}) + "\n", encoding="utf-8")
        if self.network:
            save_file(self.network.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> ItemCoder:
        """Read a coder that ``save`` wrote. Raises DataError for a file that is missing or malformed."""
        try:
            content = json.loads((folder / NETWORK).read_text(encoding="utf-8"))
            books = Codebooks(np.load(folder / CODEBOOKS, allow_pickle=False))
            if content["shape"] is None:
                return cls(content["method"], books)
            shape = NetworkShape(**(content["shape"] | {"widths": tuple(content["shape"]["widths"])}))
            network = Autoencoder(shape, books.levels, books.codes)
            network.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DataError(f"{folder} holds no tokenizer that can be read ({error}); make it again") from error
        return cls(content["method"], books, network.eval())


def fit(
    x_ID: np.ndarray,
    cfg: SemanticIdsConfig,
    *,
    seed: int,
    checkpoint: Path | None = None,
    on_epoch: EpochCallback | None = None,
) -> tuple[ItemCoder, np.ndarray]:
    """The coder that ``cfg.method`` makes, and its codes [I, L] before collisions are resolved.

    Raises DataError for fewer items, or fewer different vectors, than codes. ``checkpoint`` and ``on_epoch`` are those
    of ``train_quantiser``.
    """
    if cfg.method == "random":
        codes_IL = random_codes(len(x_ID), levels=cfg.levels, codes=cfg.codes, seed=seed)
        return ItemCoder(cfg.method, mean_codebooks(x_ID, codes_IL, cfg.codes)), codes_IL
    if cfg.method in WITH_NETWORK:
        residual = cfg.method == "rqkmeans_plus"
        plan = Plan(cfg.levels, cfg.codes, seed=seed, kmeans_iterations=cfg.kmeans_iterations, residual=residual)
        network = train_quantiser(x_ID, cfg.rqvae, plan, checkpoint=checkpoint, on_epoch=on_epoch)
        books = Codebooks(network.quantiser.vectors_LKD.detach().numpy().copy())
        coder = ItemCoder(cfg.method, books, network)
        return coder, coder.encode(x_ID)
    clustering = balanced_residual_kmeans if cfg.method == "constrained" else residual_kmeans
    books, codes_IL = clustering(x_ID, levels=cfg.levels, codes=cfg.codes, iterations=cfg.kmeans_iterations, seed=seed)
    return ItemCoder(cfg.method, books), codes_IL


def random_codes(items: int, *, levels: int, codes: int, seed: int, taken: np.ndarray | None = None) -> np.ndarray:
    """Different codes for all items, drawn evenly; none of the rows of ``taken``. Raises ConfigError if too few."""
    weights = codes ** np.arange(levels - 1, -1, -1, dtype=np.int64)
    used = set() if taken is None else set((taken[:, :levels].astype(np.int64) @ weights).tolist())
    if items + len(used) > codes**levels:
        raise ConfigError(
            f"{items + len(used)} items, but semantic_ids.codes={codes} ** semantic_ids.levels={levels} gives only "
            f"{codes**levels} different IDs; raise one of them"
        )
    drawn = random.Random(seed).sample(range(codes**levels), min(codes**levels, items + len(used)))
    fresh = np.array([number for number in drawn if number not in used][:items], dtype=np.int64)
    return (fresh[:, None] // weights % codes).astype(np.int32)


def resolve_collisions(codes_IL: np.ndarray, coder: ItemCoder, x_ID: np.ndarray, how: str) -> np.ndarray:
    """Codes [I, L or L + 1] after resolving collisions by ``how`` (``semantic_ids.collisions``).

    keep leaves equal codes, dedup adds a token, assign and sinkhorn choose other last codes. Raises DataError where
    there are not enough codes.
    """
    if how == "keep":
        return codes_IL
    if how == "dedup":
        return collisions.with_dedup_token(codes_IL)
    choose = collisions.assign_unique if how == "assign" else collisions.assign_unique_sinkhorn
    return choose(codes_IL, coder.books, coder.latents(x_ID))


@torch.no_grad()
def _in_pieces(function: Callable[[torch.Tensor], torch.Tensor], x_ID: np.ndarray) -> np.ndarray:
    pieces = [
        function(torch.from_numpy(np.array(x_ID[begin : begin + CHUNK_ROWS], dtype=np.float32))).numpy()
        for begin in range(0, len(x_ID), CHUNK_ROWS)
    ]
    return np.concatenate(pieces)
