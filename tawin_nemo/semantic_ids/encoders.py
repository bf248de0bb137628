"""Item texts -> one vector per item, kept with a manifest of how they were made."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tawin_nemo.catalog.item_names import NAMES, numbers
from tawin_nemo.config.schema import TextConfig
from tawin_nemo.data.interactions import MANIFEST
from tawin_nemo.data.text_vectors import MODEL, WORDS, TextModel, load_item_vectors, usable_vectors
from tawin_nemo.data_prep.titles import clean_text, join_json_list
from tawin_nemo.semantic_ids.hf_encoder import encode_texts, encoder_checksums, encoder_folder
from tawin_nemo.util.errors import ConfigError, DataError
from tawin_nemo.util.files import atomic_directory, sha256, write_json
from tawin_nemo.util.log import say

FORMAT = "tawin_nemo.text_vectors.v1"
VECTORS = "vectors.npy"
#: The manifest of the vectors, its name in the folder of an index.
MANIFEST_COPY = "text_vectors.json"


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors [I, D] float32 and the manifest of the folder that they lie in."""

    vectors_ID: np.ndarray
    manifest: dict[str, Any]


def item_texts(
    titles: Sequence[str], descriptions: Sequence[str], fields: str, *, needs_words: bool = True
) -> list[str]:
    """The text of each item that is embedded, without markup. Raises DataError that names items without any word, or
    without ``needs_words`` (for an encoder that reads "!!!" too) without any character."""
    texts = [clean_text(title) for title in titles]
    if fields == "title_description":
        described = [_plain(text) for text in descriptions]
        if missing := [item for item, text in enumerate(described) if not text]:
            say(f"{len(missing)} of {len(texts)} items have no description (first: item {missing[0]}): title only")
        texts = [f"{title}. {text}" if text else title for title, text in zip(texts, described, strict=True)]
    empty = [item for item, text in enumerate(texts) if not (any(map(str.isalnum, text)) if needs_words else text)]
    if empty:
        shown = ", ".join(f"{item} ({titles[item]!r})" for item in empty[:5])
        raise DataError(
            f"{len(empty)} items have no text in {fields.replace('_', ' and ')}: items {shown}; give them a title, or "
            "drop them when preparing"
        )
    return texts


def _plain(text: str) -> str:
    """Descriptions come as text, as a JSON list or as a printed Python list of paragraphs."""
    if text.startswith("['") or text.startswith('["'):
        try:
            parts = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return join_json_list(text, " ")
        return " ".join(cleaned for part in parts if (cleaned := clean_text(str(part))))
    return "" if text == "[]" else join_json_list(text, " ")


def embed(
    texts: Sequence[str],
    cfg: TextConfig,
    out: Path,
    *,
    seed: int,
    like: Path | None = None,
    external_ids: Sequence[str] | None = None,
) -> Embeddings:
    """Vectors of the texts, in the folder ``out`` with its manifest; a finished folder of the same request is reused.

    ``seed`` is of the SVD (encoder=tfidf). ``like``: folder with what ``copy_encoder_files`` left; the vectors are made
    in the same way. ``external_ids``: of the items, by which the rows of a vector file (encoder=file) are found; None =
    row i belongs to text i. Raises ConfigError for an encoder that is absent or another than ``like``'s, DataError for
    unusable vectors, naming items.
    """
    maker = _maker(cfg, seed)
    request = {"maker": maker, "items": len(texts), "texts_sha256": _texts_sha256(texts)}
    if like:
        _check_same_encoder(maker, _read_json(like / MANIFEST_COPY)["maker"])
        request["text_model"] = sha256(like / MODEL) if cfg.encoder == "tfidf" else ""
    if cfg.encoder == "file":
        request["vectors_sha256"] = sha256(_vector_file(cfg))
        names = _vector_file(cfg).parent / NAMES
        if names.is_file():
            request["names_sha256"] = sha256(names)
    if (finished := _finished(out, request)) is not None:
        say(f"{out} holds the vectors of these texts already; reused")
        return finished
    with atomic_directory(out) as folder:
        ids = numbers(len(texts)) if external_ids is None else external_ids
        vectors_ID, details = _vectors(texts, ids, cfg, out, folder, seed, like, request)
        np.save(folder / VECTORS, usable_vectors(vectors_ID, f"semantic_ids.text.encoder={cfg.encoder}"))
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        manifest = {"format": FORMAT, **request, **details, "dims": int(vectors_ID.shape[1]), "files": files}
        write_json(folder / MANIFEST, manifest)
    shutil.rmtree(_work(out), ignore_errors=True)
    return Embeddings(vectors_ID, manifest)


def copy_encoder_files(vectors: Path, folder: Path) -> None:
    """Copy what later items need from a folder of vectors: its manifest, and the TextModel if there is one."""
    shutil.copyfile(vectors / MANIFEST, folder / MANIFEST_COPY)
    for name in (WORDS, MODEL):
        if (vectors / name).is_file():
            shutil.copyfile(vectors / name, folder / name)


def _maker(cfg: TextConfig, seed: int) -> dict[str, Any]:
    """Encoder and settings, as far as they decide about the vectors."""
    if cfg.encoder == "file":
        return {"encoder": cfg.encoder}
    shared = {"encoder": cfg.encoder, "fields": cfg.fields}
    if cfg.encoder == "tfidf":
        return shared | {"dims": cfg.dims, "seed": seed}
    sums = encoder_checksums(encoder_folder(cfg))
    return shared | {"max_tokens": cfg.max_tokens, "precision": cfg.precision, "checksums": sums}


def _check_same_encoder(maker: dict[str, Any], before: dict[str, Any]) -> None:
    if changed := sorted(key for key in {*maker, *before} if maker.get(key) != before.get(key)):
        raise ConfigError(
            f"semantic_ids.text would make other vectors than those of the growing index: {', '.join(changed)} differ "
            f"(now {maker.get(changed[0])}, then {before.get(changed[0])}); use the same encoder, settings and seed"
        )


def _vectors(
    texts: Sequence[str],
    external_ids: Sequence[str],
    cfg: TextConfig,
    out: Path,
    folder: Path,
    seed: int,
    like: Path | None,
    request: dict[str, Any],
) -> tuple[np.ndarray, dict[str, Any]]:
    if cfg.encoder == "file":
        return load_item_vectors(_vector_file(cfg), external_ids, key="semantic_ids.text.source"), {}
    if cfg.encoder == "tfidf":
        model = TextModel.load(like) if like else TextModel.fit(texts, dims=cfg.dims, seed=seed)
        model.save(folder)
        return model.vectors(texts), {"words": len(model.words)}
    encoded = encode_texts(texts, cfg, encoder_folder(cfg), _work(out), request)
    if encoded.num_truncated:
        say(f"{encoded.num_truncated} of {len(texts)} texts were cut at semantic_ids.text.max_tokens={cfg.max_tokens}")
    return encoded.vectors_ID, {"texts_cut": encoded.num_truncated}


def _vector_file(cfg: TextConfig) -> Path:
    path = Path(cfg.source)
    if not path.is_file():
        raise DataError(f"semantic_ids.text.source={path}: there is no such file; name a .npy with one row per item")
    return path


def _work(out: Path) -> Path:
    """The folder of unfinished shards."""
    return out.with_name(f"{out.name}.work")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return read
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); tokenize the catalog again") from error


def _finished(out: Path, request: dict[str, Any]) -> Embeddings | None:
    if not (out / MANIFEST).is_file():
        return None
    try:
        manifest = _read_json(out / MANIFEST)
        if any(manifest.get(key) != value for key, value in request.items()):
            return None
        if any(sha256(out / name) != expected for name, expected in manifest["files"].items()):
            say(f"{out} is damaged; its vectors are made again")
            return None
        return Embeddings(np.load(out / VECTORS), manifest)
    except (DataError, OSError, EOFError, ValueError, KeyError):
        return None


def _texts_sha256(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
