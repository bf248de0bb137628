"""The run directory and the prepared dataset of a recipe."""

from __future__ import annotations

from pathlib import Path

from tawin_nemo.config.schema import PrepareConfig, Recipe
from tawin_nemo.data.interactions import MANIFEST
from tawin_nemo.util.errors import ConfigError


def run_dir_of(recipe: Recipe) -> Path:
    """The run directory: ``run_dir``, or ``runs/NAME`` where that is empty."""
    return Path(recipe.run_dir or f"runs/{recipe.name}")


def prepares(recipe: Recipe) -> bool:
    """Whether ``prepared_root`` writes RUN_DIR/data: not where ``data.root`` holds prepared data."""
    source, root = recipe.data.dataset, Path(recipe.data.root)
    return source == "synthetic" or (
        bool(recipe.data.root) and source != "prepared" and not (source == "auto" and (root / MANIFEST).is_file())
    )


def prepared_root(recipe: Recipe, *, run_dir: Path | None = None, prepare: PrepareConfig | None = None) -> Path:
    """The folder of the prepared dataset: ``data.root`` itself, or raw (or synthetic) data prepared into RUN_DIR/data.

    A folder that was prepared from the same sources with the same parameters is reused. ``run_dir`` and ``prepare``
    override those of the recipe. Data that a stage of the run was trained on are never prepared again with other
    parameters. Raises ConfigError for ``data.root`` empty or not a folder, DataError for
    data that cannot be used.
    """
    from tawin_nemo.data_prep.prepare import detect
    from tawin_nemo.data_prep.prepare import prepare as prepare_data

    source, root = recipe.data.dataset, Path(recipe.data.root)
    if not recipe.data.root and source != "synthetic":
        raise ConfigError(f"data.dataset={source} but data.root is empty; set data.root=DIR or data.dataset=synthetic")
    if recipe.data.root and not root.is_dir():
        raise ConfigError(f"data.root={recipe.data.root} is not a folder; name the one that holds the data")
    if source == "auto":
        source = detect(root, recipe.prepare)
    if source == "prepared":
        return prepare_data(source, root, root, prepare=recipe.prepare, data=recipe.data, seed=recipe.seed)
    run_dir = run_dir or run_dir_of(recipe)
    out = run_dir / "data"
    trained = next(run_dir.glob("*/checkpoints/step_*"), None) or next(run_dir.glob("*/done.json"), None)
    keys = prepare or recipe.prepare
    return prepare_data(
        source, root, out, prepare=keys, data=recipe.data, seed=recipe.seed, name=recipe.name,
        used_by=trained,
    )  # fmt: skip
