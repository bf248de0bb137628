"""Where metrics go besides files: TensorBoard, W&B, MLflow through NeMo's ``exp_manager``, and sinks of one's own.

This is the only module that imports NeMo.

NeMo is imported inside the function, because that takes seconds. The recipe's ``exp_manager`` section is passed
unchanged: its keys are NeMo's own (``create_tensorboard_logger``, ``create_wandb_logger``, ``wandb_logger_kwargs``,
``create_mlflow_logger`` ...).
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tawin_nemo.config.seams import made
from tawin_nemo.run.stage import MetricSink
from tawin_nemo.run.world import World
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.files import atomic_path
from tawin_nemo.util.launch import read_launch


def with_run_id(section: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The section with W&B's ``id``, the same in every attempt, so that a resumed run continues its curves.

    The id is drawn once and stored in ``RUN_DIR/run_id``; an id in ``wandb_logger_kwargs`` takes precedence.
    """
    if not section.get("create_wandb_logger"):
        return section
    kept = run_dir / "run_id"
    if not kept.is_file():
        with atomic_path(kept) as temporary:
            temporary.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    defaults = {"id": kept.read_text(encoding="utf-8"), "resume": "allow"}
    return {**section, "wandb_logger_kwargs": defaults | dict(section.get("wandb_logger_kwargs") or {})}


def metric_sink(section: dict[str, Any], run_dir: Path, name: str) -> MetricSink | None:
    """A function that forwards metrics to the loggers ``exp_manager`` makes; None when the section is empty.

    Raises ConfigError when NeMo rejects the section (unknown key, missing package).
    """
    if not section or read_launch().rank != 0:
        return None
    from lightning.pytorch import Trainer
    from nemo.utils.exp_manager import exp_manager

    config = {
        "explicit_log_dir": str(run_dir / "exp_manager"),
        "name": name,
        "create_checkpoint_callback": False,
        "resume_if_exists": False,
        "use_datetime_version": False,
        **with_run_id(section, run_dir),
    }
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=1,
    )  # fmt: skip
    try:
        exp_manager(trainer, OmegaConf.create(config))
    except Exception as error:  # NeMo raises its own and OmegaConf's types
        raise ConfigError(f"exp_manager={section} was rejected by NeMo: {error}") from error
    loggers = list(trainer.loggers)

    def send(stage: str, step: int, metrics: dict[str, float]) -> None:
        for logger in loggers:
            logger.log_metrics({f"{stage}/{key}": value for key, value in metrics.items()}, step=step)
            logger.save()

    return send


def build_sink(world: World) -> MetricSink | None:
    """What metrics are sent to: the loggers of ``exp_manager`` and ``trainer.metric_sinks``; None without any.

    Raises ConfigError as ``metric_sink`` and ``seams.made``.
    """
    recipe = world.recipe
    sinks = [metric_sink(recipe.exp_manager, world.run_dir, recipe.name)]
    if read_launch().rank == 0:
        sinks += [made("trainer.metric_sinks", path, world) for path in recipe.trainer.metric_sinks]
    used = [sink for sink in sinks if sink is not None]

    def send(stage: str, step: int, metrics: dict[str, float]) -> None:
        for sink in used:
            sink(stage, step, metrics)

    return send if used else None
