"""One vector per item: read from a file, or made from the item texts without any network or pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tawin_nemo.errors import DataError

#: Dimensions of ``text_vectors``.
TEXT_DIMS = 64


def load_item_vectors(path: Path, num_items: int, *, key: str = "rl.reward_source") -> np.ndarray:
    """Item embeddings [I, D] float32 from a NumPy file (``numpy.save``); row i belongs to item i.

    Raises DataError, naming ``key``, for a file that is absent, unreadable or not a 2-D array of numbers, another
    number of rows than ``num_items``, values that are not finite, and all-zero rows (they have no direction).
    """
    where = f"{key}={path}"
    if not path.is_file():
        raise DataError(f"{where}: there is no such file; name a .npy file with one row per item")
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{where} cannot be read as .npy ({error}); write it with numpy.save") from error
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        found = f"{vectors.dtype} of shape {vectors.shape}" if isinstance(vectors, np.ndarray) else "an .npz archive"
        raise DataError(f"{where} holds {found}; it must be one array of numbers with the shape [items, dimensions]")
    if len(vectors) != num_items:
        raise DataError(
            f"{where} has {len(vectors)} rows and the catalogue {num_items} items; "
            "write one row per item, in the order of items.parquet"
        )
    vectors = vectors.astype(np.float32)
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise DataError(f"{where}: {len(broken)} rows are not finite (first: item {broken[0]}); embed them again")
    empty = np.flatnonzero(~vectors.any(axis=1))
    if len(empty):
        raise DataError(f"{where}: {len(empty)} rows are all zero (first: item {empty[0]}); embed them again")
    return vectors


def text_vectors(texts: Sequence[str], *, dims: int = TEXT_DIMS, seed: int = 0) -> np.ndarray:
    """TF-IDF of the words of each text, reduced by a truncated SVD (latent semantic analysis). [I, <= dims] float32.

    Rows have length 1, except that a text without words (or with none that the kept dimensions know) has a zero row,
    which resembles nothing. ``seed`` is of the randomised SVD; equal texts and seed give equal vectors. Words are
    lower-cased runs of letters and digits, single ones too (sizes and part numbers matter in titles).
    Raises DataError when no text has a word.
    """
    # scikit-learn takes a second to import, and only this reward needs it
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        counts = TfidfVectorizer(token_pattern=r"(?u)\w+", sublinear_tf=True).fit_transform(texts)
    except ValueError as error:
        raise DataError(
            f"none of the {len(texts)} item texts has a word ({error}); name a file with rl.reward_source"
        ) from error
    reduced = TruncatedSVD(min(dims, *counts.shape), random_state=seed).fit_transform(counts)
    length = np.linalg.norm(reduced, axis=1, keepdims=True)
    return np.where(length > 1e-9, reduced / np.maximum(length, 1e-9), 0.0).astype(np.float32)
