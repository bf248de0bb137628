"""What every planned stage will need, asked before the first one starts.

A mistake that only RL would notice must not end a run after SFT has been paid for, so ``train`` calls this once,
also under ``--dry-run``. Each check is the one that the stage itself makes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

from tawin_nemo.baselines.build import check_config
from tawin_nemo.config.lora import check_lora
from tawin_nemo.config.seams import import_paths
from tawin_nemo.data.tasks import active_tasks
from tawin_nemo.run.trained import resolve_checkpoint
from tawin_nemo.run.world import ITEM_VECTORS, World
from tawin_nemo.train.plan import Plan, plans
from tawin_nemo.util.errors import ConfigError, UserError
from tawin_nemo.util.hub import local_folder

#: Keys of code that an RL stage calls.
RL_SEAMS = ("rl.reward", "rl.advantage", "rl.candidate_weights", "rl.algorithm")


def check_requirements(world: World, continued: Collection[str] = ()) -> None:
    """Raises ConfigError that lists everything which would end a later stage of this run.

    ``continued``: the finished stages that are going to get more steps.
    """
    wrong = []
    for check in checks(world, continued):
        try:
            check()
        except UserError as error:
            wrong.append(str(error))
    if len(wrong) == 1:
        raise ConfigError(wrong[0])
    if wrong:
        raise ConfigError("".join([f"{len(wrong)} things would end this run:", *(f"\n  - {line}" for line in wrong)]))


def checks(world: World, continued: Collection[str] = ()) -> Iterator[Callable[[], object]]:
    """One function for each requirement of a stage that is not done or is ``continued``.

    Each raises a UserError when its requirement is not met.
    """
    recipe = world.recipe
    if recipe.baseline.model != "off":
        yield lambda: check_config(recipe.baseline, semantic_ids=recipe.catalog.kind == "sid")
        if recipe.baseline.items == "text":
            yield lambda: check_baseline_texts(world)
        return
    waiting = [
        plan for plan in plans(world)
        if plan.name in continued or not (world.run_dir / plan.name / "done.json").is_file()
    ]  # fmt: skip
    if recipe.model.item_tokens and not (world.run_dir / ITEM_VECTORS).is_file():
        yield lambda: check_item_tokens(world)
    if recipe.model.lora.rank:
        yield lambda: check_lora(world.shape, recipe.model.lora)
    if waiting and recipe.rollout.assist.stage:
        yield lambda: check_assist(world)
    if any(plan.start is None for plan in waiting):
        yield lambda: check_start(world)
    for plan in waiting:
        if plan.kind != "zero_shot":
            yield lambda plan=plan: check_rows(plan)  # type: ignore[misc]
        if plan.kind == "sft" and active_tasks(recipe.align):
            yield lambda: check_tasks(world)
        if plan.kind == "preference":
            yield lambda: check_preference(world)
        if plan.kind == "rl":
            yield lambda: check_widths(world)
            yield lambda: check_reward(world)


def check_item_tokens(world: World) -> None:
    """Raises ConfigError when the baseline of ``model.item_tokens`` cannot be used (``item_vectors_of``)."""
    from tawin_nemo.train.item_tokens import item_vectors_of

    item_vectors_of(world)


def check_baseline_texts(world: World) -> None:
    """Raises ConfigError or DataError when the item texts of ``baseline.items=text`` cannot be embedded."""
    from tawin_nemo.baselines.text_items import check_item_texts

    check_item_texts(world)


def check_start(world: World) -> None:
    """Raises ConfigError when the weights that the first stage starts from are not there."""
    recipe = world.recipe
    if recipe.start:
        resolve_checkpoint(recipe.start, "start")
    elif recipe.model.init != "random" and not any(
        local_folder(recipe.model.init, recipe.model.revision).glob("*.safetensors")
    ):
        raise ConfigError(
            f"model.init={recipe.model.init} holds no *.safetensors files; download the whole model, or save it with "
            "save_pretrained(..., safe_serialization=True)"
        )


def check_assist(world: World) -> None:
    """Raises ConfigError for an auxiliary recommender that cannot join the evaluation."""
    from tawin_nemo.baselines.assist import load_auxiliary_recommender

    load_auxiliary_recommender(world.recipe.rollout.assist, world.catalog.external_ids)


def check_rows(plan: Plan) -> None:
    """Raises ConfigError for a stage without rows."""
    if len(plan.rows) == 0:
        raise ConfigError(
            f"stage {plan.name} has no rows of train; change rl.fresh_share, rl.rows, sft.rows or data.train_limit"
        )


def check_widths(world: World) -> None:
    """Raises ConfigError when RL asks for more beams than the catalog has distinct token paths."""
    from tawin_nemo.rollout.engine import beams_of

    if world.recipe.rl.negatives == "beam":
        beams_of(world.recipe.rl.group_size, world.recipe.rollout.width, world.catalog.trie.num_leaves)


def check_reward(world: World) -> None:
    """Raises ConfigError or DataError when the reward's files are missing or of another catalog.

    Code of one's own is called once, on two rows of train: ConfigError also when it fails there.
    """
    from tawin_nemo.train.rewards import build_reward

    rl = world.recipe.rl
    reward = build_reward(rl, world)
    own = [(key, path) for key, path in import_paths(world.recipe, RL_SEAMS)]
    if not own:
        return
    from tawin_nemo.train.own_code import own_group_values, own_policy_loss, probe_policy_loss, probe_rollout, probed

    rollout = probe_rollout(world)
    rewards_BG = probed("rl.reward", rl.reward, lambda: reward(rollout))
    for key, path in own:
        if key == "rl.algorithm":
            probe_policy_loss(rl, own_policy_loss(path))
        elif key != "rl.reward":
            arguments = (rewards_BG, rollout) if key == "rl.advantage" else (rollout,)
            probed(key, path, partial(own_group_values(key, path, world), *arguments))


def check_tasks(world: World) -> None:
    """Raises ConfigError for texts of the alignment tasks that cannot be read."""
    from tawin_nemo.train.sft_data import wording_of

    wording_of(world)


def check_preference(world: World) -> None:
    """Raises ConfigError for an auxiliary model that cannot be used (``load_auxiliary``), or too few wrong items."""
    from tawin_nemo.baselines.auxiliary import load_auxiliary

    cfg, paths = world.recipe.preference, world.catalog.trie.num_leaves
    if cfg.aux:
        load_auxiliary(cfg.aux, world.catalog.external_ids)
    if cfg.num_negatives >= paths:
        raise ConfigError(
            f"preference.num_negatives={cfg.num_negatives}, but the catalog has {paths} distinct token paths, one of "
            f"them the target's; use at most {paths - 1}"
        )
    for _, path in import_paths(world.recipe, ("preference.negatives",)):
        from tawin_nemo.train.own_code import own_negatives, probed

        first = world.train_rows_for_preference[:2]
        probed("preference.negatives", path, partial(own_negatives(cfg, world).items, first, 0))
    drawn = cfg.negatives == "candidates" and world.samples["train"].candidates is None
    if drawn and cfg.num_candidates > paths - world.recipe.data.max_history:
        raise ConfigError(
            f"preference.num_candidates={cfg.num_candidates} leaves the history out, but the catalog has {paths} "
            f"distinct token paths; use at most {max(2, paths - world.recipe.data.max_history)}"
        )
