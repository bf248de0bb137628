"""Where metrics go besides files: the sinks of the product, sinks of one's own, and NeMo's ``exp_manager``.

This is the only module that imports NeMo. The product's sinks (``run.sinks``) need no NeMo.

NeMo is imported inside the function, because that takes seconds. The recipe's ``exp_manager`` section is passed
unchanged: its keys are NeMo's own (``create_tensorboard_logger``, ``create_wandb_logger``, ``wandb_logger_kwargs``,
``create_mlflow_logger`` ...).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tawin_nemo.config.seams import made
from tawin_nemo.run.sinks import BUILT_IN, opened, run_id
from tawin_nemo.run.stage import MetricSink
from tawin_nemo.run.world import World
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.launch import read_launch


def with_run_id(section: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The section with W&B's ``id``, the same in every attempt, so that a resumed run continues its curves.

    An id in ``wandb_logger_kwargs`` takes precedence over ``run_id``.
    """
    if not section.get("create_wandb_logger"):
        return section
    defaults = {"id": run_id(run_dir), "resume": "allow"}
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


@contextlib.contextmanager
def open_sinks(world: World) -> Iterator[MetricSink | None]:
    """What metrics are sent to inside the block: ``exp_manager`` and ``trainer.metric_sinks``; None without any.

    At the end of the block, also after an error, the product's sinks write what waits and are closed. Raises
    ConfigError as ``metric_sink``, ``seams.made`` and ``sinks.opened``.
    """
    recipe = world.recipe
    with contextlib.ExitStack() as stack:
        sinks = [metric_sink(recipe.exp_manager, world.run_dir, recipe.name)]
        for name in recipe.trainer.metric_sinks if read_launch().rank == 0 else ():
            if name in BUILT_IN:
                worker = opened(name, recipe, world.run_dir)
                stack.callback(worker.close)
                sinks.append(worker)
            else:
                sinks.append(made("trainer.metric_sinks", name, world))
        used = [sink for sink in sinks if sink is not None]

        def send(stage: str, step: int, metrics: dict[str, float]) -> None:
            for sink in used:
                sink(stage, step, metrics)

        yield send if used else None
