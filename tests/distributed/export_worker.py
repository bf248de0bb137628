"""What every rank does for the matrix of exports: build a run's world, search its beams, export it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tawin_nemo.commands.convert import export
from tawin_nemo.commands.session import codes_path
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.data.samples import PromptEncoder
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.scoring import SCORE_SPACES
from tawin_nemo.run.world import World, build_world
from tawin_nemo.train.start import engine_of
from tawin_nemo.types import TokenRows
from tawin_nemo.util.files import write_json

WIDTH = 6
#: Access rights are those of the umask: its octal digits -> folder of the export.
UMASKS = {"022": "wide", "077": "narrow"}
HISTORIES = ([0], [3, 17, 5], [8, 1])


def world_of(source: Path, run_dir: Path, kind: str, tp: int) -> World:
    """A run from the weights and tokenizer in ``source``; data and codes lie beside it."""
    recipe = load_recipe(None, [
        f"data.root={source.parent / 'data'}", "data.dataset=prepared", f"model.init={source}", f"run_dir={run_dir}",
        f"catalog.kind={kind}", f"catalog.index={source.parent / 'index.json' if kind == 'sid' else ''}",
        "data.train_limit=4", "data.eval_limit=4", "data.max_history=4", f"eval.beams={WIDTH}", "eval.ks=1,3",
        f"model.tensor_model_parallel_size={tp}", f"trainer.devices={tp}", "trainer.threads=1",
    ])  # fmt: skip
    return build_world(recipe, run_dir, Path(recipe.data.root), codes_path=codes_path(recipe))


def beams(world: World) -> dict[str, Any]:
    """Prompts, and items, token paths and scores of their beams in both score spaces."""
    texts = [world.template.prompt([world.item_texts[item] for item in history]) for history in HISTORIES]
    encoder = PromptEncoder(world.item_texts, world.tokenizer, world.template)
    prompts = encoder.encode(TokenRows.from_lists(list(HISTORIES)))
    found: dict[str, Any] = {"texts": texts, "prompts": [prompts[row].tolist() for row in range(len(prompts))]}
    engine = engine_of(world)
    for space in SCORE_SPACES:
        best = engine.search(prompts, WIDTH, score_space=space)
        lengths = best.lengths_BW.tolist()
        paths = [
            [tokens[:length] for tokens, length in zip(row, many, strict=True)]
            for row, many in zip(best.tokens_BWT.tolist(), lengths, strict=True)
        ]
        found[space] = {"items": best.items_BW.tolist(), "scores": best.scores_BW.tolist(), "paths": paths}
    return found


def make(source: Path, out: Path, kind: str, tp: int) -> None:
    """Write ``out``/wide, ``out``/narrow (exports under each umask) and ``out``/beams.json."""
    world = world_of(source, out / "run", kind, tp)
    found = beams(world)
    for digits, name in UMASKS.items():
        before = os.umask(int(digits, 8))
        export(world, "", out / name)
        os.umask(before)
    if runtime.world_rank() == 0:
        write_json(out / "beams.json", found)
    runtime.barrier()


def main() -> None:
    tp, root = int(sys.argv[1]), Path(sys.argv[2])
    runtime.initialize(ModelConfig(tensor_model_parallel_size=tp), seed=0)
    torch.set_num_threads(1)
    for cell in json.loads(sys.argv[3]):
        make(root / cell["source"], root / cell["out"], cell["kind"], tp)
    runtime.shutdown()


if __name__ == "__main__":
    main()
