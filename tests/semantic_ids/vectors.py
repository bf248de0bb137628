"""Item vectors that tests of the tokenizer share."""

from __future__ import annotations

import numpy as np


def blobs(items: int, *, kinds: int = 8, dims: int = 6, seed: int = 0) -> np.ndarray:
    """Item i lies around centre i % kinds, float32 [I, D]."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(kinds, dims)) * 4
    return (centres[np.arange(items) % kinds] + rng.normal(size=(items, dims)) * 0.3).astype(np.float32)


def relative_error(x_ID: np.ndarray, read_ID: np.ndarray) -> float:
    """Squared error as a share of the variance, in plain numpy."""
    return float(((x_ID - read_ID) ** 2).sum() / ((x_ID - x_ID.mean(axis=0)) ** 2).sum())
