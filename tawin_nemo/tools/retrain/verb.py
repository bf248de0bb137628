"""``tawin-nemo retrain``: new interactions -> train from the published model -> export -> gate -> publish.

All ranks call it. Everything is written once and found again, so that the same command and date continue a run that
was killed, and do nothing when it is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tawin_nemo.commands.session import finish_saving, started, writing
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.parallel import disaggregated, runtime
from tawin_nemo.placement.rollout_ranks import serve
from tawin_nemo.run import signals
from tawin_nemo.run.datasets import prepared_root
from tawin_nemo.run.failures import attempt_logs
from tawin_nemo.run.published import GATE_FILE
from tawin_nemo.tools.retrain import webhook
from tawin_nemo.tools.retrain.gate import Decision
from tawin_nemo.tools.retrain.judge import SPLIT, gate
from tawin_nemo.tools.retrain.night import night_codes, train_and_export
from tawin_nemo.tools.retrain.publish_root import PublishRoot
from tawin_nemo.tools.retrain.registry import check_registry, registered
from tawin_nemo.train.item_tokens import check_no_item_tokens
from tawin_nemo.util import times
from tawin_nemo.util.errors import REFUSED, ConfigError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


def run_retrain(recipe: Recipe) -> tuple[dict[str, Any], int]:
    """(result for the last line on stdout, exit code of this rank): 0 published, ``REFUSED`` on rank 0 if refused.

    Raises ConfigError for a recipe that cannot be used, Preempted after a signal or trainer.max_time.
    """
    day, root = check_recipe(recipe), PublishRoot(Path(recipe.retrain.root))
    with started(recipe), contextlib.ExitStack() as stack:
        if disaggregated.is_rollout_rank():
            serve()
            return {}, 0
        stack.enter_context(writing(root.folder, "retrain"))
        stack.callback(finish_saving)
        result = runtime.on_rank_0(lambda: finished(root, day))
        if result is None:
            run = runtime.on_rank_0(lambda: root.nightly_run(day, data_of(recipe, day), warm=recipe.retrain.warm_start))
            stack.enter_context(attempt_logs(root.run_dir(day)))
            stack.enter_context(signals.listening())
            codes = night_codes(recipe, run, root)
            train_and_export(recipe, run, root, codes)
            decision = gate(recipe, run, root, codes)
            result = runtime.on_rank_0(lambda: conclude(recipe, root, decision))
        if result["published"]:
            result |= runtime.on_rank_0(lambda: registered(recipe, root.folder, root.version(day)))
        runtime.barrier()
        return result, REFUSED if not result["published"] and runtime.world_rank() == 0 else 0


def check_recipe(recipe: Recipe) -> str:
    """The date. Raises ConfigError for keys that retraining cannot work with, before anything long starts."""
    wanted, known = recipe.retrain.metrics, [f"{kind}@{k}" for kind in ("recall", "ndcg") for k in recipe.eval.ks]
    unknown = [metric for metric in wanted if metric not in known]
    if not recipe.retrain.root:
        raise ConfigError("retrain.root is empty; name the folder of runs, versions and the link `latest`")
    if unknown or not wanted:
        raise ConfigError(f"retrain.metrics={list(wanted)} must be some of {', '.join(known)} (eval.ks)")
    if SPLIT not in recipe.eval.splits:
        raise ConfigError(f"eval.splits={list(recipe.eval.splits)} lacks {SPLIT}, which the gate looks at; add it")
    if recipe.baseline.model != "off" or recipe.start or recipe.checkpoint or recipe.run_dir:
        raise ConfigError("retrain sets start, checkpoint and run_dir itself and needs baseline.model=off; remove them")
    webhook.check_webhook(recipe.retrain.webhook)
    check_no_item_tokens(recipe, "a nightly run publishes an export")
    check_registry(recipe)
    return times.day(recipe.retrain.date)


def finished(root: PublishRoot, day: str) -> dict[str, Any] | None:
    """The result if there is nothing left to do: this date is published, or a later one is.

    Raises ConfigError for a date before the published one, and for one whose version was taken back.
    """
    published = root.published()
    if published is not None and published.name > day:
        raise ConfigError(
            f"retrain.date={day} is older than the published version {published.name}; a nightly run never "
            f"replaces a later one (to go back: tawin-nemo retrain rollback retrain.root={root.folder})"
        )
    if day in root.rolled_back():
        raise ConfigError(
            f"the version of retrain.date={day} was taken back; train a later date, or make it live again: "
            f"tawin-nemo retrain rollback retrain.root={root.folder} retrain.date={day}"
        )
    if published is None or published.name < day:
        return None
    return {"date": day, "published": True, "latest": str(published), "gate": str(published / GATE_FILE)}


def data_of(recipe: Recipe, day: str) -> Callable[[Path], Path]:
    """Prepares the interactions up to ``day`` in a run directory."""
    window = replace(recipe.prepare, end=recipe.prepare.end or day)
    return lambda run_dir: prepared_root(recipe, run_dir=run_dir, prepare=window)


def conclude(recipe: Recipe, root: PublishRoot, decision: Decision) -> dict[str, Any]:
    """Publish, or say why not.

    Raises ConfigError when another version has become live since the candidate was judged.
    """
    day = decision.date
    gate_file = root.run_dir(day) / GATE_FILE
    result = {"date": day, "published": decision.passed, "gate": str(gate_file)}
    if decision.passed:
        with root.changing("retrain"):
            live = root.published()
            if (live.name if live else "") != decision.against:
                raise ConfigError(
                    f"{root.latest} moved from {decision.against or 'nothing'} to {live.name if live else 'nothing'} "
                    "while the model was judged; run the same command again: it is judged anew, not trained"
                )
            root.publish(day, against=decision.against)
        log.info("published %s: %s", day, root.latest)
        return {**result, "latest": str(root.version(day))}
    log.warning("not published, %s stays: %s", root.latest, "; ".join(decision.reasons))
    result |= {"latest": str(root.published() or ""), "reasons": decision.reasons}
    if recipe.retrain.webhook:
        body = {"event": "refused", "name": recipe.name, "root": str(root.folder), **result}
        webhook.post(recipe.retrain.webhook, body, seconds=recipe.retrain.webhook_s)
    return result
