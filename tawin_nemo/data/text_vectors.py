"""One vector per item: read from a file, or made from the item texts without any network or pretrained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tawin_nemo.catalog.item_names import rows_of
from tawin_nemo.util.errors import CatalogError, DataError

#: Dimensions of ``text_vectors``.
TEXT_DIMS = 64
#: Files of a saved TextModel.
WORDS, MODEL = "words.json", "text_model.npy"


def load_item_vectors(path: Path, external_ids: Sequence[str], *, key: str = "rl.reward_source") -> np.ndarray:
    """Item embeddings [I, D] float32 from a NumPy file (``numpy.save``), for the items with ``external_ids``.

    Row i belongs to item i, or to the i-th name in ``items.json`` (a JSON list of external ids) beside the file.

    Raises DataError, naming ``key``, for a file that is absent, unreadable or not a 2-D array of numbers, for items
    without a row, another number of rows than items where nothing names them, values that are not finite, and all-zero
    rows (they have no direction).
    """
    where = f"{key}={path}"
    if not path.is_file():
        raise DataError(f"{where}: there is no such file; name a .npy file with one row per item")
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{where} cannot be read as .npy ({error}); write it with numpy.save") from error
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        description = (
            f"{vectors.dtype} of shape {vectors.shape}" if isinstance(vectors, np.ndarray) else "an .npz archive"
        )
        raise DataError(
            f"{where} holds {description}; it must be one array of numbers with the shape [items, dimensions]"
        )
    try:
        vectors = vectors[rows_of(path, len(vectors), external_ids)]
    except CatalogError as error:
        raise DataError(f"{key}={error}") from error
    return usable_vectors(vectors.astype(np.float32), where)


def usable_vectors(vectors_ID: np.ndarray, where: str) -> np.ndarray:
    """Return ``vectors_ID``. Raises DataError, beginning with ``where``, that names items with NaN or all-zero rows."""
    for wrong_I, what in ((~np.isfinite(vectors_ID).all(axis=1), "not finite"), (~vectors_ID.any(axis=1), "all zero")):
        if wrong_I.any():
            items = np.flatnonzero(wrong_I).tolist()
            shown = ", ".join(map(str, items[:5])) + (" ..." if len(items) > 5 else "")
            raise DataError(f"{where}: {len(items)} rows are {what} (items {shown}); embed them again")
    return vectors_ID


def text_vectors(texts: Sequence[str], *, dims: int = TEXT_DIMS, seed: int = 0) -> np.ndarray:
    """TF-IDF of the words of each text, reduced by a truncated SVD (latent semantic analysis). [I, <= dims] float32.

    Rows have length 1, except that a text without words (or with none that the kept dimensions know) has a zero row,
    which resembles nothing. ``seed`` is of the randomised SVD; equal texts and seed give equal vectors. Words are
    lower-cased runs of letters and digits, single ones too (sizes and part numbers matter in titles).
    Raises DataError when no text has a word.
    """
    words_IW = _fitted(_tf_idf(), texts, "name a file with rl.reward_source")
    return _unit_rows(_svd(min(dims, *words_IW.shape), seed).fit_transform(words_IW))


@dataclass(frozen=True, eq=False)
class TextModel:
    """TF-IDF and SVD, fitted once and applied to later texts: W words, D dimensions."""

    words: list[str]
    idf_W: np.ndarray  # float32
    components_DW: np.ndarray  # float32

    @classmethod
    def fit(cls, texts: Sequence[str], *, dims: int, seed: int) -> TextModel:
        """Fit vocabulary, IDF and SVD on ``texts``. Raises DataError when no text has a word."""
        counts = _tf_idf()
        words_IW = _fitted(counts, texts, "give the items texts")
        svd = _svd(min(dims, *words_IW.shape), seed).fit(words_IW)
        return cls(
            counts.get_feature_names_out().tolist(), counts.idf_.astype(np.float32), svd.components_.astype(np.float32)
        )

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """[I, D] float32, rows as those of ``text_vectors``; words that ``fit`` has not seen are ignored."""
        counts = _tf_idf(vocabulary=self.words)
        counts.idf_ = self.idf_W
        return _unit_rows(counts.transform(texts) @ self.components_DW.T)

    def save(self, folder: Path) -> None:
        """Write the vocabulary and the matrices into an existing folder; ``load`` reads them back."""
        (folder / WORDS).write_text(json.dumps(self.words), encoding="utf-8")
        np.save(folder / MODEL, np.vstack([self.idf_W, self.components_DW]))

    @classmethod
    def load(cls, folder: Path) -> TextModel:
        """Read a model that ``save`` wrote. Raises DataError for files that are missing or malformed."""
        try:
            idf_W, *components = np.load(folder / MODEL, allow_pickle=False)
            return cls(json.loads((folder / WORDS).read_text(encoding="utf-8")), idf_W, np.stack(components))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{folder} holds no text model that can be read ({error})") from error


# scikit-learn takes a second to import, and few runs need it
def _tf_idf(**options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(token_pattern=r"(?u)\w+", sublinear_tf=True, **options)


def _svd(dims: int, seed: int) -> Any:
    from sklearn.decomposition import TruncatedSVD

    return TruncatedSVD(dims, random_state=seed)


def _fitted(counts: Any, texts: Sequence[str], remedy: str) -> Any:
    try:
        return counts.fit_transform(texts)
    except ValueError as error:
        raise DataError(f"none of the {len(texts)} item texts has a word ({error}); {remedy}") from error


def _unit_rows(rows_ID: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows_ID, axis=1, keepdims=True)
    return np.where(length > 1e-9, rows_ID / np.maximum(length, 1e-9), 0.0).astype(np.float32)
