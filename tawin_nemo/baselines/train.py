"""Classic recommenders from scratch: one loop for GRU4Rec, Caser, SASRec and TIGER, evaluated like any other stage.

A training row is a history and the item that follows it, as everywhere in this package; sliding-window data hold
every shorter history as a row of its own. The stage is ``RUN_DIR/MODEL``; its files are those of ``Stage``, the
checkpoints are described in ``baselines/load.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tawin_nemo.baselines.build import Blueprint, build_recommender, check_config, items_fingerprint
from tawin_nemo.baselines.evaluate import baseline_candidates, evaluate_baseline, valid_metrics
from tawin_nemo.baselines.load import MODEL_FILE, ModelAndOptimizer, find_problem, load_checkpoint, save_checkpoint
from tawin_nemo.baselines.protocol import SequentialRecommender, left_padded, sample_negatives
from tawin_nemo.data.batches import BatchStream, micro_batches
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.bias import sequence_counts
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.callbacks import Callbacks
from tawin_nemo.run.schedule import scheduled
from tawin_nemo.run.stage import MetricSink, Progress, Stage, monitored, soonest_stop
from tawin_nemo.run.world import World
from tawin_nemo.util.errors import ConfigError, TawinError
from tawin_nemo.util.files import write_json
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)
#: History items in one forward pass; rows of similar length go together, so that little padding is computed.
ITEMS_PER_PASS = 512


class BaselineStage(Stage):
    """A stage whose weights are a plain torch module, in one process: the files of ``Stage``, other checkpoints.

    ``resume`` and ``save`` take a ``ModelAndOptimizer`` instead of a Trainable.
    """

    def resume(self, trainable: Any) -> Progress:
        """Load the newest valid checkpoint; returns its progress, or that of step 0 if there is none."""
        newest = checkpoint.newest_valid(self.checkpoints, find_problem)
        if newest is None:
            self._rewind(-1)
            return Progress()
        progress = Progress(**load_checkpoint(newest, trainable.model, trainable.optimizer)["progress"])
        checkpoint.set_aside(self.checkpoints, progress.step)
        self._rewind(progress.step)
        log.info("%s continues after step %d", self.name, progress.step)
        return progress

    def save(self, trainable: Any, progress: Progress) -> None:
        """Write ``checkpoints/step_N`` and remove checkpoints beyond ``trainer.keep_last``.

        The best checkpoint is always kept: it is the result of the stage.
        """
        self._flush()
        state = {"progress": vars(progress), "stage": self.name}
        save_checkpoint(self.checkpoints / f"step_{progress.step}", trainable, state)
        self._saved_step = progress.step
        checkpoint.prune(self.checkpoints, keep_last=self.trainer.keep_last, keep={progress.best_step})
        self._callbacks.call("on_save", self, progress.step)


def run_baseline(world: World, sink: MetricSink | None = None, callbacks: Callbacks | None = None) -> EvalResult:
    """Train ``baseline.model`` on ``baseline.rows`` and evaluate it on ``eval.splits``, each unless that is done.

    Returns the result on the last of these splits. Raises ConfigError for a combination of keys that makes no sense,
    or for more than one process.
    """
    recipe = world.recipe
    check_config(recipe.baseline, semantic_ids=recipe.catalog.kind == "sid")
    if runtime.world_size() > 1:
        raise ConfigError(
            f"baseline.model={recipe.baseline.model} trains in one process, not in {runtime.world_size()}; "
            "set trainer.num_nodes=1 and trainer.devices=1"
        )
    directory = world.run_dir / recipe.baseline.model
    stage = BaselineStage(
        directory, recipe.trainer, deadline=world.deadline, sink=sink, profile=recipe.profile, callbacks=callbacks
    )
    splits = recipe.eval.splits
    endings = [".json", *([".candidates.json"] if recipe.eval.candidates else [])]
    expected = [directory / "eval" / f"{split}{ending}" for split in splits for ending in endings]
    if stage.done and all(file.is_file() for file in expected):
        log.info("%s is done", stage.name)
        return EvalResult.read(directory / "eval", splits[-1])
    blueprint = blueprint_of(world)
    runtime.seed_step(recipe.seed, 0)
    model = build_recommender(blueprint).to(runtime.device())
    if not stage.done:
        write_json(directory / MODEL_FILE, blueprint.to_json())
        train_baseline(world, stage, model)
    load_checkpoint(stage.chosen_checkpoint, model)
    popularity_I = sequence_counts(world.samples["train"], len(world.catalog))
    for split in splits:
        rows, label = world.samples[split], f"{stage.name} {split}"
        result = evaluate_baseline(model, rows, world.catalog, recipe.eval, label=label, popularity_I=popularity_I)
        result = result.named(world.dataset)
        result.write(directory / "eval", split)
        if recipe.eval.candidates:
            among = baseline_candidates(model, rows, world.catalog, recipe.eval, seed=recipe.seed, label=label)
            among.named(world.dataset).write(directory / "eval", split)
            log.info("%s among candidates: hit_ratio@1 %.4f", label, among.means["hit_ratio@1"])
    return result


def blueprint_of(world: World) -> Blueprint:
    """The shape of the model that the recipe and the data ask for."""
    recipe = world.recipe
    paths = world.catalog.paths if recipe.baseline.model == "tiger" else None
    return Blueprint(
        recipe.baseline,
        len(world.catalog),
        recipe.data.max_history,
        paths,
        items_fingerprint(world.catalog.external_ids),
    )


def train_baseline(world: World, stage: BaselineStage, model: SequentialRecommender) -> None:
    """Fit until NDCG at the largest cut-off has not risen on valid for ``baseline.patience`` epochs.

    The checkpoint with the highest one is what the stage hands on. Order, dropout and negatives are pure functions of
    seed and step, so a killed run continues bit for bit from its newest checkpoint.
    """
    recipe, cfg = world.recipe, world.recipe.baseline
    train = world.samples["train"]
    if cfg.rows == "earlier":
        train = train.take(world.earlier_rows)
    batch_size = min(cfg.batch_size, len(train))
    stream = BatchStream(len(train), batch_size, seed=recipe.seed)
    per_epoch = -(-len(train) // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    trainable = ModelAndOptimizer(model, optimizer)
    done = stage.resume(trainable)
    soonest = partial(soonest_stop, done, cfg.patience, per_epoch)
    for step in stage.steps(done.step, cfg.epochs * per_epoch, soonest=soonest):
        if done.bad_checks >= cfg.patience:
            break
        runtime.seed_step(recipe.seed, step + 1)
        lr = scheduled(cfg, step, cfg.epochs * per_epoch)
        metrics = train_step(world, trainable, train.take(stream.batch(step)), lr=lr)
        done.step = step + 1
        stage.write(done.step, {"epoch": done.step / per_epoch, **metrics, "lr": lr})
        if done.step % per_epoch == 0:
            _check(world, stage, trainable, done)
        elif done.step % recipe.trainer.save_interval == 0:
            stage.save(trainable, done)
        stage.save_or_stop(lambda: stage.save(trainable, done), done)
    if done.bad_checks < cfg.patience:
        log.warning(
            "%s used all baseline.epochs=%d without early stopping; raise baseline.epochs", stage.name, cfg.epochs
        )
    stage.finish(done, chosen_step=done.best_step)


def train_step(world: World, trainable: ModelAndOptimizer, samples: Samples, *, lr: float) -> dict[str, float]:
    """One optimizer step on the mean loss of ``samples``; the loss and the gradient norm before clipping."""
    for group in trainable.optimizer.param_groups:
        group["lr"] = lr
    model, clip = trainable.model, world.recipe.trainer.clip_grad
    model.train()
    trainable.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for rows in micro_batches(samples.history.lengths, ITEMS_PER_PASS):
        loss = _row_losses(world, model, samples.take(rows)).sum() / len(samples)
        loss.backward()
        total += loss.item()
    if total != total:
        raise TawinError(f"the loss of {world.recipe.baseline.model} is not a number; lower baseline.lr")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else float("inf"))
    trainable.optimizer.step()
    return {"train/loss": total, "grad_norm": float(norm)}


def _row_losses(world: World, model: SequentialRecommender, samples: Samples) -> Tensor:
    cfg, device = world.recipe.baseline, runtime.device()
    history_BL = left_padded(samples.history).to(device)
    target_B = torch.from_numpy(samples.target_N.astype("int64")).to(device)
    negatives_BN = None
    if cfg.loss == "bce":
        negatives_BN = sample_negatives(target_B, model.num_items, cfg.negatives)
    return model.loss(history_BL, target_B, negatives_BN)


def _check(world: World, stage: BaselineStage, trainable: ModelAndOptimizer, done: Progress) -> None:
    """Metrics on valid, best so far, checkpoint. The checkpoint is written after the log line that it counts on."""
    means = valid_metrics(trainable.model, world.samples["valid"], world.recipe.eval)
    watched = monitored(world.recipe.trainer, world.recipe.eval.ks)
    value = -means[watched]  # Progress keeps the smallest
    better = done.best_value is None or value < done.best_value
    done.bad_checks = 0 if better else done.bad_checks + 1
    if better:
        done.best_value, done.best_step = value, done.step
    stage.write(done.step, {f"valid/{name}": mean for name, mean in means.items()})
    log.info("%s step %d valid %s %.4f%s", stage.name, done.step, watched, -value, " (best)" if better else "")
    stage.save(trainable, done)
