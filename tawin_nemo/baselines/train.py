"""Classic recommenders from scratch: one loop for all of them, evaluated like any other stage.

A training row is a history and the item that follows it, as everywhere in this package; sliding-window data hold
every shorter history as a row of its own. With ``baseline.training=sequences`` a training row is a user instead
(``baselines/sequences.py``). The stage is ``RUN_DIR/MODEL``; its files are those of ``Stage``, the
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
from tawin_nemo.baselines.protocol import CausalRecommender, SequentialRecommender, left_padded, sample_negatives
from tawin_nemo.baselines.sampled_softmax import NegativeSampler, SharedNegatives
from tawin_nemo.baselines.sequences import Sequences, user_sequences
from tawin_nemo.baselines.text_items import TEXT_VECTORS, item_text_vectors, vectors_fingerprint
from tawin_nemo.config.schema import BaselineConfig
from tawin_nemo.data.batches import BatchStream, micro_batches
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.bias import sequence_counts, target_counts
from tawin_nemo.eval.result import EvalResult
from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.callbacks import Callbacks
from tawin_nemo.run.schedule import scheduled
from tawin_nemo.run.stage import MetricSink, Progress, Stage, monitored, soonest_stop
from tawin_nemo.run.world import World
from tawin_nemo.types import NO_ITEM
from tawin_nemo.util.errors import ConfigError, TawinError
from tawin_nemo.util.files import write_json
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)
#: History items in one forward pass; rows of similar length go together, so that little padding is computed.
ITEMS_PER_PASS = 512
#: The same for whole sequences with sampled negatives, whose memory does not grow with the catalog.
SAMPLED_ITEMS_PER_PASS = 4096


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
    text_IE = item_text_vectors(world, directory / TEXT_VECTORS) if recipe.baseline.items == "text" else None
    blueprint = blueprint_of(world, text_IE)
    runtime.seed_step(recipe.seed, 0)
    model = build_recommender(blueprint, text_IE).to(runtime.device())
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


def blueprint_of(world: World, text_IE: Tensor | None = None) -> Blueprint:
    """The shape of the model that the recipe and the data ask for; ``text_IE``: the vectors of the item texts."""
    recipe = world.recipe
    paths = world.catalog.paths if recipe.baseline.model == "tiger" else None
    return Blueprint(
        recipe.baseline,
        len(world.catalog),
        recipe.data.max_history,
        paths,
        items_fingerprint(world.catalog.external_ids),
        "" if text_IE is None else vectors_fingerprint(text_IE),
    )


def train_baseline(world: World, stage: BaselineStage, model: SequentialRecommender) -> None:
    """Fit until NDCG at the largest cut-off has not risen on valid for ``baseline.patience`` epochs.

    The checkpoint with the highest one is what the stage hands on. Order, dropout and negatives are pure functions of
    seed and step, so a killed run continues bit for bit from its newest checkpoint.
    """
    recipe, cfg = world.recipe, world.recipe.baseline
    train, sampler = training_rows(world), negative_sampler(world)
    batch_size = min(cfg.batch_size, len(train))
    stream = BatchStream(len(train), batch_size, seed=recipe.seed)
    per_epoch = -(-len(train) // batch_size)
    trainable = ModelAndOptimizer(model, adam(cfg, model))
    done = stage.resume(trainable)
    soonest = partial(soonest_stop, done, cfg.patience, per_epoch)
    for step in stage.steps(done.step, cfg.epochs * per_epoch, soonest=soonest):
        if done.bad_checks >= cfg.patience:
            break
        runtime.seed_step(recipe.seed, step + 1)
        lr = scheduled(cfg, step, cfg.epochs * per_epoch)
        metrics = train_step(world, trainable, train.take(stream.batch(step)), lr=lr, sampler=sampler)
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


def adam(cfg: BaselineConfig, model: SequentialRecommender) -> torch.optim.Optimizer:
    """Adam; for sequences the fused one, faster on a CPU. It rounds differently, so windows keep the other."""
    fused = True if cfg.training == "sequences" else None
    return torch.optim.Adam(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=fused)


def training_rows(world: World) -> Samples | Sequences:
    """The rows that ``baseline.rows`` selects, one per target or (``baseline.training=sequences``) one per user."""
    rows = _selected(world)
    if world.recipe.baseline.training == "windows":
        return rows
    sequences = user_sequences(rows, world.recipe.data.max_history)
    log.info("%d rows of train are %d sequences", len(rows), len(sequences))
    return sequences


def negative_sampler(world: World) -> NegativeSampler | None:
    """What draws the negatives of ``baseline.loss=sampled_softmax``; None for the other losses."""
    cfg = world.recipe.baseline
    if cfg.loss != "sampled_softmax":
        return None
    return NegativeSampler.of(
        target_counts(_selected(world), len(world.catalog)), cfg.negatives,
        popularity=cfg.negatives_from == "popularity", logq=cfg.logq_correction, device=runtime.device(),
    )  # fmt: skip


def _selected(world: World) -> Samples:
    train = world.samples["train"]
    return train.take(world.earlier_rows) if world.recipe.baseline.rows == "earlier" else train


def train_step(
    world: World, trainable: ModelAndOptimizer, rows: Samples | Sequences, *, lr: float,
    sampler: NegativeSampler | None = None,
) -> dict[str, float]:  # fmt: skip
    """One optimizer step on the mean loss over the targets of ``rows``; loss and gradient norm before clipping."""
    for group in trainable.optimizer.param_groups:
        group["lr"] = lr
    model, clip = trainable.model, world.recipe.trainer.clip_grad
    model.train()
    trainable.optimizer.zero_grad(set_to_none=True)
    lengths_R = rows.inputs.lengths if isinstance(rows, Sequences) else rows.history.lengths
    targets = rows.num_targets if isinstance(rows, Sequences) else len(rows)
    shared = None if sampler is None else sampler.draw()
    total = 0.0
    for group_R in micro_batches(lengths_R, _items_per_pass(world, rows)):
        loss = _losses(world, model, rows.take(group_R), shared).sum() / targets
        loss.backward()
        total += loss.item()
    if total != total:
        raise TawinError(f"the loss of {world.recipe.baseline.model} is not a number; lower baseline.lr")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else float("inf"))
    trainable.optimizer.step()
    return {"train/loss": total, "grad_norm": float(norm)}


def _items_per_pass(world: World, rows: Samples | Sequences) -> int:
    sampled = world.recipe.baseline.loss in ("bce", "sampled_softmax")
    return SAMPLED_ITEMS_PER_PASS if sampled and isinstance(rows, Sequences) else ITEMS_PER_PASS


def _losses(
    world: World, model: SequentialRecommender, rows: Samples | Sequences, shared: SharedNegatives | None
) -> Tensor:  # fmt: skip
    """Loss of each target of ``rows``."""
    cfg, device = world.recipe.baseline, runtime.device()
    if isinstance(rows, Sequences):
        items_BL, target_BL = (part.padded(NO_ITEM)[0].to(device) for part in (rows.inputs, rows.targets))
        target_M = target_BL[target_BL != NO_ITEM]
    else:
        items_BL, target_M = left_padded(rows.history.in_memory()), torch.from_numpy(rows.target_N.astype("int64"))
        items_BL, target_M = items_BL.to(device), target_M.to(device)
    negatives: Tensor | SharedNegatives | None = shared
    if cfg.loss == "bce":
        negatives = sample_negatives(target_M, model.num_items, cfg.negatives)
    if isinstance(rows, Sequences):
        assert isinstance(model, CausalRecommender)
        return model.sequence_loss(items_BL, target_BL, negatives)
    return model.loss(items_BL, target_M, negatives)


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
