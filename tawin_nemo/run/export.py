"""What an exported model carries beside its weights.

An export means the same wherever it lies: it holds its tokenizer, its catalog, the recipe keys that decide what a
prompt is, and the arguments with which transformers' ``generate`` gives the beams of this package. ``run.exported``
reads it.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl
from omegaconf import OmegaConf

from tawin_nemo import __version__
from tawin_nemo.catalog.export_files import write_catalog
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import Recipe
from tawin_nemo.data.jinja_prompts import JinjaTemplate
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.special_tokens import bos_ids, special_tokens, write_prompt_rule
from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.rollout.scoring import SCORE_SPACES
from tawin_nemo.run.export_card import model_card
from tawin_nemo.run.exported import COLUMNS_FILE, FORMAT, SETTINGS_FILE
from tawin_nemo.run.world import World
from tawin_nemo.util.files import sha256, write_json

PROCESSOR_FILE = "tawin_trie.py"
#: Libraries whose versions are noted.
_LIBRARIES = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors")


def special_ids(world: World) -> dict[str, int | None]:
    """The token ids of config.json, by its keys."""
    tokens = special_tokens(world.tokenizer, world.tokenizer_dir)
    return {f"{name}_token_id": value for name, value in asdict(tokens).items()}


def write_companions(world: World, folder: Path) -> None:
    """Complete an export: ``folder`` has weights, config.json and the tokenizer's files.

    Adds generation_config.json (when to stop, nothing about sampling), the prompt rule in the tokenizer's files,
    catalog.parquet, catalog.jsonl, trie.safetensors, tawin_trie.py, tawin.json, recipe.yaml and README.md.
    """
    write_prompt_rule(world.tokenizer, folder)
    write_json(folder / "generation_config.json", {
        **special_ids(world), "max_new_tokens": world.catalog.trie.max_depth,
        "transformers_version": version("transformers"),
    })  # fmt: skip
    write_catalog(folder, world.catalog, codes_of(world.catalog, world.tokenizer))
    if isinstance(world.template, JinjaTemplate) and world.template.columns.names:
        pl.DataFrame(list(world.template.columns.rows)).write_parquet(folder / COLUMNS_FILE)
    source = Path(__file__).resolve().parents[1] / "catalog" / PROCESSOR_FILE
    shutil.copyfile(source, folder / PROCESSOR_FILE)
    settings = export_settings(world) | {"tokenizer": sha256(folder / "tokenizer.json")}
    write_json(folder / SETTINGS_FILE, settings)
    (folder / "recipe.yaml").write_text(
        OmegaConf.to_yaml(OmegaConf.create(_bound_keys(world.recipe, world.template))), encoding="utf-8"
    )
    (folder / "README.md").write_text(model_card(world, settings), encoding="utf-8")


def codes_of(catalog: Catalog, tokenizer: Tokenizer) -> list[list[str]]:
    """The codes of every item; empty lists for a catalog of titles. A code is one token."""
    if catalog.kind != "sid":
        return [[] for _ in range(len(catalog))]
    return [
        [str(tokenizer.backend.id_to_token(int(token))) for token in catalog.paths[item][:-1]]
        for item in range(len(catalog))
    ]


def export_settings(world: World) -> dict[str, Any]:
    """The content of tawin.json, but for the checksum of the tokenizer."""
    recipe, template, catalog, tokenizer = world.recipe, world.template, world.catalog, world.tokenizer
    beams = min(recipe.eval.beams, catalog.trie.num_leaves)
    return {
        "format": FORMAT,
        "name": recipe.name,
        "prompt": {
            "template": template.name, "jinja": template.source if isinstance(template, JinjaTemplate) else "",
            "chat": list(template.chat), "items_as": template.kind, "head": template.head,
            "item": template.answer("{}"), "separator": template.separator, "tail": template.tail,
            "begins_with": bos_ids(tokenizer), "max_history": recipe.data.max_history,
            "max_prompt_tokens": recipe.data.max_prompt_tokens, "shows_candidates": recipe.data.show_candidates,
        },
        "end_token": {"id": tokenizer.eos_id, "text": tokenizer.eos_token},
        "score_spaces": list(SCORE_SPACES),
        "score_space": recipe.rollout.score_space,
        "generate": {
            "num_beams": beams, "num_return_sequences": beams, "do_sample": False, "early_stopping": "never",
            "length_penalty": recipe.rollout.length_penalty, "max_new_tokens": catalog.trie.max_depth,
        },
        "catalog": {
            "items": len(catalog), "paths": catalog.trie.num_leaves, "longest_path": catalog.trie.max_depth,
            "fingerprint": catalog.fingerprint,
        },
        "versions": {"tawin_nemo": __version__} | {name: _version(name) for name in _LIBRARIES},
    }  # fmt: skip


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _bound_keys(recipe: Recipe, written: Template) -> dict[str, Any]:
    """The recipe keys that belong to an export: what a prompt is, and how answers are searched. No paths."""
    template = written.source if isinstance(written, JinjaTemplate) else recipe.data.template
    data, catalog, rollout = recipe.data, recipe.catalog, recipe.rollout
    kept = ("template", "chat", "max_history", "max_prompt_tokens", "show_candidates")
    return {
        "name": recipe.name,
        "data": {name: getattr(data, name) for name in kept} | {"template": template},
        "catalog": asdict(replace(catalog, index="catalog.parquet" if catalog.kind == "sid" else "")),
        "rollout": {"score_space": rollout.score_space, "length_penalty": rollout.length_penalty},
        "eval": {"beams": recipe.eval.beams, "ks": list(recipe.eval.ks)},
    }
