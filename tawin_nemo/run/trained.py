"""What a verb that uses a trained model reads: the checkpoint and the run that it comes from.

A checkpoint means something only with the tokenizer, the catalog and the prompt format that it was trained with. They
lie in its run directory, so a verb reads them there and not from where it happens to be started.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tawin_nemo.config.load import differences, to_yaml
from tawin_nemo.config.schema import Recipe
from tawin_nemo.run.datasets import prepared_root, run_dir_of
from tawin_nemo.run.exported import is_export
from tawin_nemo.util.errors import CheckpointError, ConfigError
from tawin_nemo.util.log import get_logger
from tawin_nemo.util.trusted import OutsideRoots, read_text

log = get_logger(__name__)

#: Sections and keys that decide what a model's tokens and prompts mean, or which tensors it has.
BOUND = (
    "prepare.", "data.", "catalog.", "align.", "model.backbone", "model.item_tokens", "code.data.template=",
)  # fmt: skip
#: Keys among them that a verb may set: where the data lie, and how many rows are read.
SOURCES = ("data.dataset", "data.root")
FREE = (*SOURCES, "data.train_limit", "data.eval_limit")


@dataclass(frozen=True)
class Trained:
    """The model that a verb uses, and the run directory whose tokenizer, catalog and data belong to it."""

    checkpoint: str  # a finished stage or a step_N; empty: what a run would start from (``start`` or ``model.init``)
    run_dir: Path  # the recipe's own where the checkpoint lies in no run directory
    export: Path | None = None  # the exported model, with tokenizer and catalog of its own, if it is one

    def data_root(self, recipe: Recipe) -> Path:
        """The prepared data of the run, also where their sources are gone; else what ``recipe`` names.

        Raises ConfigError and DataError as ``prepared_root`` does.
        """
        stored, copy = self.run_dir / "recipe.yaml", self.run_dir / "data"
        if (copy / "manifest.json").is_file() and stored.is_file():
            changed = differences(stored.read_text(encoding="utf-8"), to_yaml(recipe))
            if not any(line.startswith(SOURCES) for line in changed):
                return copy
        return prepared_root(recipe, run_dir=self.run_dir)


def trained_model(recipe: Recipe, *, weights_follow: bool = False) -> Trained:
    """The model of ``checkpoint``; where that key is empty, of the run's newest finished stage; else where it starts.

    ``checkpoint`` may also be an export, which has tokenizer, catalog and recipe of its own; so may ``model.init``.

    ``weights_follow``: a training job sends the weights later, so without ``checkpoint`` a run's start is good enough.

    Raises ConfigError for a recipe of a baseline, when ``checkpoint`` is neither a finished stage nor a step_N, when
    there are no weights at all, and when the recipe differs from the one of the checkpoint's run in a key that the
    model depends on.
    """
    own = run_dir_of(recipe)
    if recipe.baseline.model != "off":
        raise ConfigError(
            f"baseline.model={recipe.baseline.model} trains a classic recommender, which this verb does not read: its "
            f"figures are in {own}/{recipe.baseline.model}/eval; set baseline.model=off for the language model"
        )
    if is_export(recipe.checkpoint):
        return Trained(recipe.checkpoint, own, Path(recipe.checkpoint))
    if recipe.checkpoint:
        named = recipe.checkpoint
        run_dir = run_of(resolve_checkpoint(named, "checkpoint"))
    elif weights_follow:
        return Trained("", own)
    elif (stage := newest_stage(own)) is not None:
        named, run_dir = str(stage), own
        log.info("checkpoint is empty: %s, the newest finished stage of this run", stage)
    elif recipe.start or recipe.model.init != "random":
        key = f"start={recipe.start}" if recipe.start else f"model.init={recipe.model.init}"
        log.info("checkpoint is empty and %s has no finished stage: the untrained model of %s", own, key)
        return Trained("", own, None if recipe.start or not is_export(recipe.model.init) else Path(recipe.model.init))
    else:
        raise ConfigError(
            f"checkpoint is empty, {own} has no finished stage ({unfinished(own)}) and model.init=random: there are no "
            "weights to use. Train first, or set checkpoint=RUN_DIR/STAGE, or model.init=DIR"
        )
    if run_dir is None:
        log.info("%s lies in no run directory: its tokenizer and catalog are taken from %s", named, own)
        return Trained(named, own)
    check_recipe(recipe, named, run_dir)
    return Trained(named, run_dir)


def chosen_checkpoint(stage: Path) -> Path:
    """The checkpoint of the finished stage in ``stage`` that later stages and evaluation use."""
    try:
        chosen = json.loads(read_text(stage / "done.json"))["chosen_step"]
        return stage / "checkpoints" / f"step_{int(chosen)}"
    except OutsideRoots:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{stage / 'done.json'} does not name the step that was chosen ({error!r})") from error


def resolve_checkpoint(named: str, key: str) -> Path:
    """The checkpoint at the path that recipe key ``key`` names: a finished stage's chosen one, or one step_N.

    Raises ConfigError when it is neither, with the stages that are there.
    """
    path = Path(named).expanduser()
    if (path / "done.json").is_file():
        return chosen_checkpoint(path)
    if not (path / "state.json").is_file():
        there = ", ".join(str(stage) for stage in finished_stages(path)) or unfinished(path.parent)
        raise ConfigError(
            f"{key}={named} is neither a finished stage (done.json) nor a step_N (state.json), and no export "
            f"(tawin.json); there: {there}"
        )
    return path


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that ``checkpoint`` lies in: the nearest folder above it with a recipe.yaml; else None."""
    return next((folder for folder in checkpoint.absolute().parents if (folder / "recipe.yaml").is_file()), None)


def finished_stages(run_dir: Path) -> list[Path]:
    """The stages below ``run_dir`` that have ended, the oldest first."""
    ends = {file.parent: file.stat().st_mtime_ns for file in run_dir.glob("*/done.json")}
    return sorted(ends, key=lambda stage: (ends[stage], stage.name))


def newest_stage(run_dir: Path) -> Path | None:
    """The stage that a finished run names as its last one, else the one that ended last; None without any."""
    stages = finished_stages(run_dir)
    if (summary := run_dir / "summary.json").is_file():
        final = run_dir / str(json.loads(summary.read_text(encoding="utf-8")).get("final_stage", ""))
        if final in stages:
            return final
    return stages[-1] if stages else None


def unfinished(run_dir: Path) -> str:
    """The stages below ``run_dir`` that have not ended, with their checkpoints, as text for an error."""
    begun = {folder.parent: folder for folder in sorted(run_dir.glob("*/checkpoints"))}
    steps = [f"{stage.name}: {len(list(begun[stage].glob('step_*')))} checkpoints" for stage in begun]
    return f"not finished: {'; '.join(steps)}" if steps else "nothing was trained there"


def check_recipe(recipe: Recipe, checkpoint: str, run_dir: Path) -> None:
    """Raises ConfigError when ``recipe`` gives a key of ``BOUND`` another value than the run of ``checkpoint`` had."""
    stored = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
    changed = [line for line in differences(stored, to_yaml(recipe), ignore=FREE) if line.startswith(BOUND)]
    if changed:
        raise ConfigError(
            f"{checkpoint} was trained with other values: {'; '.join(changed[:5])}. A model is used with the data, "
            f"catalog and prompts of its training: leave these keys out (without --recipe, {run_dir}/recipe.yaml is "
            "read), or train again"
        )


def check_tokenizer(checkpoint: Path, tokenizer: str) -> None:
    """Raises ConfigError when ``checkpoint`` (a step_N) was trained with another tokenizer than that fingerprint's.

    Two vocabularies of one size would otherwise exchange their tokens without a word.
    """
    trained = identity_of(checkpoint).get("tokenizer", tokenizer)
    if trained != tokenizer:
        raise ConfigError(
            f"{checkpoint} was trained with the tokenizer {trained[:12]}, but this one is {tokenizer[:12]}: use "
            "checkpoint=RUN_DIR/STAGE inside its own run directory, or bring back RUN_DIR/tokenizer"
        )


def check_catalog(checkpoint: Path, catalog: str) -> None:
    """Raises ConfigError when ``checkpoint`` (a step_N) was trained with another catalog than that fingerprint's."""
    trained = identity_of(checkpoint).get("catalog", catalog)
    if trained != catalog:
        raise ConfigError(
            f"{checkpoint} was trained with the catalog {trained[:12]}, but the data give {catalog[:12]}: bring back "
            "the data and codes of its run, or train again"
        )


def check_prompt(checkpoint: Path, prompt: str) -> None:
    """Raises ConfigError when ``checkpoint`` (a step_N) was trained with another Jinja or chat template than this one
    (``Template.fingerprint``, empty for a built-in template)."""
    trained = identity_of(checkpoint).get("prompt", "")
    if trained != prompt:
        raise ConfigError(
            f"{checkpoint} was trained with the prompts {trained[:12] or 'of a built-in template'}, but these are "
            f"{prompt[:12] or 'those of a built-in template'}: bring back prompt.json of its run, or train again"
        )


def check_item_vectors(checkpoint: Path, vectors: str) -> None:
    """Raises ConfigError when ``checkpoint`` (a step_N) was trained with other vectors of items in its prompts
    (``model.item_tokens``) than those with this fingerprint, or with none (an empty one)."""
    trained = identity_of(checkpoint).get("item_vectors", "")
    if trained != vectors:
        raise ConfigError(
            f"{checkpoint} was trained with {trained[:12] or 'no'} item vectors in its prompts, but model.item_tokens "
            f"gives {vectors[:12] or 'none'}: set that key as its run had it, or train again"
        )


def identity_of(checkpoint: Path) -> dict[str, str]:
    """The fingerprints in ``state.json`` of a step_N; empty for checkpoints that older versions wrote."""
    try:
        state = dict(dict(json.loads(read_text(checkpoint / "state.json"))).get("state", {}))
    except OutsideRoots:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / 'state.json'} is damaged ({error!r})") from error
    return {name: str(state[name]) for name in ("tokenizer", "catalog", "prompt", "item_vectors") if name in state}
