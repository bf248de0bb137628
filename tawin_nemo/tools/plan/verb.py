"""The verb ``plan``: options and a recipe in, a plan out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tawin_nemo.config.backbones import Backbone, backbone, with_vocab
from tawin_nemo.config.gpus import NODE, gpu
from tawin_nemo.config.load import check, read_recipe
from tawin_nemo.config.schema import Recipe
from tawin_nemo.tools.plan.plan import Plan, Question, make_plan
from tawin_nemo.tools.plan.timing import DEFAULT_MFU
from tawin_nemo.tools.plan.workload import default_lengths
from tawin_nemo.util.errors import ConfigError

HELP = f"""\
tawin-nemo plan --recipe F [--gpus N] [--gpu h800] [option=value ...] [key=value ...]

Memory per GPU by part and phase, what a step costs, and the best layout; a layout that is not possible or does not fit
is refused with the nearest one that does (exit code 2). Needs no GPU and starts no training.

options:
  gpus=N             GPUs in all (default: trainer.num_nodes x trainer.devices); above {NODE} a multiple of {NODE}
  gpu=NAME           h800 (default), h100, h200, a100, a100-40
  mfu=X              share of the peak that matrix products reach (default {DEFAULT_MFU:g}: an assumption, see
                     mfu/update in timings.jsonl of a run)
  prompt_tokens=N    mean tokens of a prompt, path_tokens=N of an item with its end, decision_tokens=N of an item up to
                     its last choice in the trie (defaults: 256, 29, 4 for titles; 96, 5, 4 for semantic IDs)
"""

#: Reads config.json of a Hugging Face folder; the layer above hands it in.
ReadShape = Callable[[Path], Backbone]
OPTIONS = ("gpus", "gpu", "mfu", "prompt_tokens", "path_tokens", "decision_tokens")


@dataclass(frozen=True)
class Options:
    """What is asked besides the recipe; 0 = not given."""

    gpus: int = 0
    gpu: str = "h800"
    mfu: float = DEFAULT_MFU
    prompt_tokens: int = 0
    path_tokens: int = 0
    decision_tokens: int = 0


def split_options(words: Sequence[str]) -> tuple[Options, list[str]]:
    """The planner's own options, and what is left for the recipe. Raises ConfigError for values out of limits."""
    mine = {word.split("=", 1)[0]: word.split("=", 1)[1] for word in words if word.split("=", 1)[0] in OPTIONS
            and "=" in word}  # fmt: skip
    rest = [word for word in words if word.split("=", 1)[0] not in OPTIONS or "=" not in word]
    mfu = _number("mfu", mine.get("mfu", str(DEFAULT_MFU)), float)
    if not 0.0 < mfu <= 1.0:
        raise ConfigError(f"mfu={mfu:g} must lie between 0 and 1; {DEFAULT_MFU:g} is the default")
    counts = {}
    for name in ("gpus", "prompt_tokens", "path_tokens", "decision_tokens"):
        counts[name] = int(_number(name, mine[name], int)) if name in mine else 0
        if name in mine and counts[name] < 1:
            raise ConfigError(f"{name}={counts[name]} must be 1 or more")
    return Options(gpu=mine.get("gpu", "h800"), mfu=mfu, **counts), rest


def _number(name: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{name}={text} is not a number; write for example {name}=8") from None


def plan_recipe(path: str | Path | None, words: Sequence[str], read_shape: ReadShape) -> Plan:
    """The plan of a recipe file with options and overrides. Raises ConfigError as ``make_plan``, ``load_recipe`` do."""
    options, overrides = split_options(words)
    recipe = read_recipe(path, overrides)
    if recipe.baseline.model != "off":
        raise ConfigError(f"baseline.model={recipe.baseline.model} needs one device; plan is for baseline.model=off")
    gpus = options.gpus or recipe.trainer.num_nodes * recipe.trainer.devices
    if gpus > NODE and gpus % NODE:
        raise ConfigError(
            f"gpus={gpus} is not a whole number of nodes of {NODE}; use {gpus // NODE * NODE} or "
            f"{(gpus // NODE + 1) * NODE}"
        )
    check(_without_layout(recipe))
    if recipe.rollout.devices >= gpus:
        raise ConfigError(
            f"rollout.devices={recipe.rollout.devices} of {gpus} GPUs would only search: none is left to train; lower "
            "rollout.devices or raise gpus="
        )
    shape = recipe_shape(recipe, read_shape)
    usual = default_lengths(recipe)
    lengths = replace(
        usual,
        prompt=options.prompt_tokens or usual.prompt,
        path=options.path_tokens or usual.path,
        decisions=min(options.decision_tokens or usual.decisions, options.path_tokens or usual.path),
    )
    return make_plan(Question(recipe, shape, gpus, gpu(options.gpu), lengths, options.mfu))


def _without_layout(recipe: Recipe) -> Recipe:
    """The recipe on one process, or one per side: whether its layout is right is the planner's to say."""
    apart = min(1, recipe.rollout.devices)
    return replace(
        recipe,
        model=replace(
            recipe.model, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, sequence_parallel=False
        ),
        trainer=replace(recipe.trainer, num_nodes=1, devices=1 + apart),
        rollout=replace(recipe.rollout, tensor_model_parallel_size=0, pipeline_model_parallel_size=0, devices=apart),
    )


def recipe_shape(recipe: Recipe, read_shape: ReadShape) -> Backbone:
    """The shape in ``model.init`` if that folder is here, else the named backbone; the vocabulary of backbones for a
    CPU is the tokenizer's."""
    folder = Path(recipe.model.init)
    found = recipe.model.init != "random" and folder.is_dir()
    shape = read_shape(folder) if found else backbone(recipe.model.backbone)
    return shape if shape.vocab else with_vocab(shape, recipe.data.bpe_vocab_size)
