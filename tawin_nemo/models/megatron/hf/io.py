"""Weights to and from Hugging Face safetensors, under any tensor- and pipeline-parallel layout.

Import: every rank opens the files lazily and reads only the slices that its shard consists of. Export: one parameter
at a time is gathered over its tensor-parallel group, sent to rank 0 and written when a file is full, so that rank 0
never holds more than one output file plus one tensor.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file
from torch import Tensor

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.models.megatron.hf.config import hf_config
from tawin_nemo.models.megatron.hf.files import INDEX_FILE, ROWS_AT_ONCE, SINGLE_FILE, HfWeights
from tawin_nemo.models.megatron.hf.gather import Export, Row
from tawin_nemo.models.megatron.hf.map import (
    Entry,
    Kind,
    Segment,
    hf_names,
    hf_shapes,
    local_parameters,
    shard_segments,
    table,
)
from tawin_nemo.models.megatron.hf.new_tokens import NewTokens, starting_rows
from tawin_nemo.models.megatron.model.adapters import MergedShards
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.util.errors import CheckpointError, ConfigError
from tawin_nemo.util.files import atomic_directory, write_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def _check_shapes(weights: HfWeights, entry: Entry, layer: int | None, shape: Backbone) -> None:
    for name, expected in zip(hf_names(entry, layer), hf_shapes(entry, shape), strict=True):
        seen = weights.shape(name)
        extendable = entry.kind is Kind.VOCAB and len(seen) == 2 and seen[0] <= expected[0] and seen[1] == expected[1]
        if seen != expected and not extendable:
            raise CheckpointError(
                f"{weights.directory}: {name} has shape {list(seen)}, the model needs {list(expected)}; "
                "check that config.json belongs to the weights (a vocabulary can be extended but not cut)"
            )


def check_hf(shape: Backbone, directory: str | Path) -> None:
    """Raises CheckpointError unless ``load_hf`` can load the directory into a model of this shape.

    It is not collective and reads only the headers of the files.
    """
    weights = HfWeights(Path(directory))
    weights.check_files()
    weights.check_names(shape)
    for entry, layer in table(shape):
        _check_shapes(weights, entry, layer, shape)


def _fill_new_rows(
    parameter: Tensor, drawn: Tensor, first_row: int, vocab: int, weights: HfWeights, name: str, new: NewTokens
) -> None:
    """Set the rows of new tokens to ``starting_rows`` plus the values ``drawn``, and rows from ``vocab`` on to 0."""
    here = new.local(first_row, len(parameter))
    if len(here):
        rows = torch.from_numpy(new.local_rows(first_row, len(parameter)))
        parameter[rows] = (starting_rows(new, weights, name, here).to(drawn.device) + drawn.double()).to(parameter)
    parameter[max(vocab - first_row, 0) :] = 0


@torch.no_grad()
def load_hf(model: GPTModel, shape: Backbone, directory: str | Path, new: NewTokens | None = None) -> None:
    """Fill a freshly built ``model`` (this rank's shard) from the safetensors files in ``directory``.

    New tokens (``new``, without it the rows that the file does not have) get rows of their own in the embedding and
    in an untied LM head: what ``NewTokens`` says plus the values that ``build_model`` drew, so that they start at a
    plausible logit and yet differ from each other. Rows that only pad the vocabulary for tensor parallelism become
    zero. Values are rounded to the model's number format.

    Call it before an optimizer copies the weights. Raises CheckpointError naming the tensors that are missing,
    unexpected or of another shape, or the file that is corrupt.
    """
    weights = HfWeights(Path(directory))
    weights.check_names(shape)
    for row, parameter in local_parameters(model, shape).items():
        fill_row(model, shape, row, parameter, weights, new)


@torch.no_grad()
def fill_row(
    model: GPTModel, shape: Backbone, row: Row, parameter: Tensor, weights: HfWeights, new: NewTokens | None = None
) -> None:
    """Load this rank's shard of one row of the table from a source that has its tensors; see ``load_hf``."""
    entry, layer = row
    tp_rank, tp_size = model.tp_group.rank(), model.tp_group.size()
    _check_shapes(weights, entry, layer, shape)
    names = hf_names(entry, layer)
    in_file = replace(shape, vocab=weights.shape(names[0])[0]) if entry.kind is Kind.VOCAB else shape
    rows = parameter.shape[0]
    offset = 0
    first_row = tp_rank * rows
    if entry.kind is Kind.VOCAB:
        lacking = NewTokens(np.arange(in_file.vocab, shape.vocab)) if new is None else new
        drawn = parameter.detach()[torch.from_numpy(lacking.ids[lacking.local(first_row, rows)] - first_row)].clone()
    for whole in shard_segments(entry, in_file, tp_rank, tp_size, padded_vocab=rows * tp_size):
        for segment in _parts(whole):
            part = weights.read(names[segment.source], entry.axis, segment.start, segment.stop)
            parameter.narrow(entry.axis, offset, part.shape[entry.axis]).copy_(part)
            if shape.tied and entry.kind is Kind.VOCAB:
                _check_tied(weights, segment, part)
            offset += part.shape[entry.axis]
    if entry.kind is Kind.VOCAB:
        _fill_new_rows(parameter, drawn, first_row, shape.vocab, weights, names[0], lacking)
    elif offset != parameter.shape[entry.axis]:
        raise CheckpointError(
            f"the model's shard of {names} has {parameter.shape[entry.axis]} rows, {offset} were read"
        )


def _parts(segment: Segment) -> Iterator[Segment]:
    """Split a segment into parts that are small beside a shard, so that reading needs no second copy."""
    for start in range(segment.start, segment.stop, ROWS_AT_ONCE):
        yield replace(segment, start=start, stop=min(start + ROWS_AT_ONCE, segment.stop))


def _check_tied(weights: HfWeights, segment: Segment, embedding: Tensor) -> None:
    """A file of a tied model may repeat the embedding as its LM head, but not contradict it."""
    if "lm_head.weight" not in weights.files:
        return
    if not torch.equal(weights.read("lm_head.weight", 0, segment.start, segment.stop), embedding):
        raise CheckpointError(
            f"{weights.directory}: lm_head.weight differs from model.embed_tokens.weight, but config.json says "
            "tie_word_embeddings=true; set it to false"
        )


def _files(shape: Backbone, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, list[Row]]:
    """File name -> rows, in model order; a row larger than the limit gets a file of its own."""
    groups: list[list[Row]] = [[]]
    filled = 0
    for row in table(shape):
        size = sum(torch.Size(part).numel() for part in hf_shapes(row[0], shape)) * dtype.itemsize
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def owners(model: GPTModel, shape: Backbone, local: Mapping[Row, Tensor]) -> dict[Row, int]:
    """The pipeline stage that sends each row of the table: the first one that has it. Collective."""
    rows = list(table(shape))
    held: list[Any] = [None] * model.pp_group.size()
    dist.all_gather_object(held, [n for n, row in enumerate(rows) if row in local], group=model.pp_group)
    return {row: next(stage for stage, numbers in enumerate(held) if n in numbers) for n, row in enumerate(rows)}


def _write(path: Path, tensors: dict[str, Tensor]) -> int:
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sum(tensor.nbytes for tensor in tensors.values())


def save_hf(
    model: GPTModel,
    shape: Backbone,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    special: Mapping[str, int | None] | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a directory that transformers' ``AutoModelForCausalLM`` loads, adapters merged. Every rank calls it.

    ``dtype`` is the number format of the files (default: the model's parameters'). Files hold at most
    ``max_shard_bytes`` bytes each. Tokenizer files are copied from ``tokenizer_dir``. ``special`` has the ids for
    config.json (``bos_token_id``, ``eos_token_id``, ``pad_token_id``). ``finish`` adds files on rank 0, before the
    directory gets its name. An older ``directory`` is replaced only after the new one is whole. Raises ConfigError when
    ``tokenizer_dir`` has no tokenizer.
    """
    tokenizer_files = _tokenizer_files(tokenizer_dir)
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        local = MergedShards(model, local_parameters(model, shape))
        dtype = dtype or model.config.params_dtype
        export = Export(model, shape, dtype, local, owners(model, shape, local))
        writer = dist.get_rank() == 0
        with atomic_directory(Path(directory)) if writer else nullcontext() as folder:
            weight_map: dict[str, str] = {}
            total = 0
            for name, rows in _files(shape, dtype, max_shard_bytes).items():
                gathered = export.allocate(rows) if folder is not None else None
                for row in rows:
                    export.gather(row, gathered)
                if folder is not None and gathered is not None:
                    total += _write(folder / name, gathered)
                    weight_map |= dict.fromkeys(gathered, name)
                    del gathered  # before the next file's is taken
            if folder is not None:
                if set(weight_map.values()) != {SINGLE_FILE}:
                    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
                config = hf_config(shape, dtype=str(dtype).removeprefix("torch."), **(special or {}))
                write_json(folder / "config.json", config)
                for file in tokenizer_files:
                    shutil.copyfile(file, folder / file.name)
                finish(folder)
    runtime.barrier()


def _tokenizer_files(tokenizer_dir: str | Path | None) -> list[Path]:
    if tokenizer_dir is None:
        return []
    files = [Path(tokenizer_dir) / name for name in TOKENIZER_FILES if (Path(tokenizer_dir) / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        raise ConfigError(f"{tokenizer_dir} holds no tokenizer (tokenizer.json); name the folder the tokenizer is in")
    return files
