"""Pretrained files on disk: config.json, every safetensors shard, the tokenizer. Nothing large is read."""

from __future__ import annotations

import json
from pathlib import Path

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.tools.doctor.check import Check, absent, check, fails, gib, ok
from tawin_nemo.util.errors import ConfigError

#: Names that Hugging Face's ``save_pretrained`` gives: one file, or an index and several.
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"


@check("model.init")
def pretrained(recipe: Recipe) -> Check:
    """Every shard that the index names is there and as long as its header says, and holds the promised tensors."""
    if recipe.model.init == "random":
        return absent("random initial weights")
    folder = Path(recipe.model.init)
    if not folder.is_dir():
        return fails(f"{folder} is not a folder", "set model.init to the folder with config.json, or to random")
    shape = backbone_from_hf(folder)
    shards = shard_names(folder)
    problem = next((found for found in (shard_problem(folder / n, names) for n, names in shards.items()) if found), "")
    if problem:
        return fails(*problem)
    tensors = set().union(*shards.values()) if any(shards.values()) else _names(folder / SINGLE_FILE)
    lacking = sorted(_expected(shape) - tensors)
    if lacking:
        return fails(
            f"{folder}: no tensor {lacking[0]} ({len(lacking)} lacking)",
            "check that config.json belongs to the weights",
        )
    size = sum((folder / name).stat().st_size for name in shards)
    return ok(f"{folder}: {shape.family}, {shape.layers} layers of {shape.hidden}, {len(shards)} files, {gib(size)}")


def shard_names(folder: Path) -> dict[str, set[str]]:
    """File -> tensors that the index promises in it (empty for a single file). Raises ConfigError without either."""
    index = folder / INDEX_FILE
    if not index.is_file():
        if (folder / SINGLE_FILE).is_file():
            return {SINGLE_FILE: set()}
        other = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({other[0]} is the old format: save it again with safe_serialization=True)" if other else ""
        raise ConfigError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}; download the weights again")
    try:
        placed: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} has no readable weight_map ({error!r}); download it again") from error
    shards: dict[str, set[str]] = {}
    for tensor, name in placed.items():
        shards.setdefault(name, set()).add(tensor)
    return shards


def shard_problem(path: Path, promised: set[str]) -> tuple[str, str] | None:
    """(what is wrong, remedy) of one file; None when it is whole: opening compares header and length."""
    if not path.is_file():
        return f"{path} is named by the index but missing", "download that file"
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            return f"{path} is a Git LFS pointer, not the weights", "git lfs pull"
    from safetensors import SafetensorError

    try:
        names = _names(path)
    except (OSError, SafetensorError) as error:
        return f"{path} is cut off or damaged ({error})", "download that file again"
    lacking = sorted(promised - names)
    if lacking:
        return f"{path} lacks {lacking[0]}, which the index promises", "download index and files of one revision"
    return None


def _names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return set(file.keys())


def _expected(shape: Backbone) -> set[str]:
    """A few tensors that tell whether the files belong to this shape: the ends of the model."""
    names = {"model.embed_tokens.weight", "model.norm.weight"} | ({"lm_head.weight"} if not shape.tied else set())
    last = shape.layers - 1
    return names | {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, last)}


@check("tokenizer")
def tokenizer(recipe: Recipe) -> Check:
    kind, init = recipe.data.tokenizer, recipe.model.init
    if kind in ("bpe", "codes") and init != "random":
        return fails(f"data.tokenizer={kind} beside model.init={init}", "pretrained weights need data.tokenizer=auto")
    if kind == "auto" and init == "random":
        return absent("made from the catalog")
    if kind in ("bpe", "codes"):
        return absent(f"data.tokenizer={kind} is made from the catalog")
    file = Path(init if kind == "auto" else kind).expanduser() / "tokenizer.json"
    if not file.is_file():
        return fails(f"no {file}", "copy the model's tokenizer there, or set data.tokenizer to a folder that has one")
    from tokenizers import Tokenizer

    try:
        size = Tokenizer.from_file(str(file)).get_vocab_size()
    except Exception as error:  # the library raises bare Exception
        return fails(f"{file} cannot be read ({error})", "download it again")
    return ok(f"{file}: {size} tokens")
