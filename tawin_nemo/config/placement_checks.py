"""Combinations of keys about where rollouts run that make no sense; messages as in ``checks``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from tawin_nemo.config.layout import rollout_layout, training_layout
from tawin_nemo.config.schema import AS_MODEL, AssistConfig, Recipe


def aligned(r: Recipe) -> list[str]:
    """Alignment tasks that the recipe uses, as ``align.NAME=weight``."""
    weights = {item.name: getattr(r.align, item.name) for item in fields(r.align) if "_to_" in item.name}
    return [f"align.{name}={weight:g}" for name, weight in weights.items() if weight > 0]


def ahead_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    rl = r.rl
    behaviour_space = r.rollout.score_space if rl.negatives == "beam" else "trie"
    yield (
        r.rollout.ahead > 0 and (behaviour_space != rl.policy_space or rl.ensure_target != "off"),
        f"rollout.ahead={r.rollout.ahead} corrects for older weights with the rollout's own log-probs of every "
        f"candidate; set rl.policy_space={behaviour_space} (what the rollout scores) and rl.ensure_target=off, or "
        "rollout.ahead=0",
    )
    yield (
        r.rollout.ahead > 0 and rl.max_refill_batches > 0,
        f"rl.max_refill_batches={rl.max_refill_batches} rolls out again where a step's groups teach nothing, which is "
        "known only once they are there; set it to 0, or rollout.ahead=0",
    )


def placement_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    rollout, searching = r.rollout, rollout_layout(r, training_layout(r))
    apart = rollout.placement == "separate"
    yield (
        not apart and rollout.devices > 0,
        f"rollout.devices={rollout.devices} processes would only search, but rollout.placement={rollout.placement}; "
        "set rollout.placement=separate or rollout.devices=0",
    )
    yield (
        not apart and rollout.ahead > 0,
        f"rollout.ahead={rollout.ahead} searches while training goes on, which needs processes of its own; "
        "set rollout.placement=separate and rollout.devices, or rollout.ahead=0",
    )
    graphs = rollout.cuda_graphs == "on"
    yield (
        graphs and (rollout.placement == "server" or rollout.score_space == "vocab"),
        f"rollout.cuda_graphs=on has no use with rollout.placement={rollout.placement} and "
        f"rollout.score_space={rollout.score_space}: servers search in their own way, and fixed shapes exist in trie "
        "space; set rollout.cuda_graphs=off",
    )
    yield (
        graphs and (searching.pp > 1 or r.rollout_precision.startswith("fp8")),
        f"rollout.cuda_graphs=on cannot run {searching.pp} pipeline stages in {_rollout_precision(r)}: "
        "fixed shapes need one stage in fp32 or bf16; set rollout.cuda_graphs=off",
    )
    yield (
        apart and not 0 < rollout.devices < r.processes,
        f"rollout.placement=separate with rollout.devices={rollout.devices} of {r.processes} processes "
        "(trainer.num_nodes x trainer.devices); at least one must search and at least one must train: set "
        "rollout.devices between 1 and all but one, or rollout.placement=colocated",
    )
    yield (
        apart and not searching.divides(rollout.devices),
        f"rollout.devices={rollout.devices} cannot be divided into rollout tensor_model_parallel_size={searching.tp} x "
        f"pipeline_model_parallel_size={searching.pp} (rollout.*, 0 = as model.*); set rollout.devices to a multiple "
        f"of {searching.model_ranks} or lower these sizes",
    )
    yield (
        apart and r.baseline.model != "off",
        f"baseline.model={r.baseline.model} trains in one process and has no rollouts; set rollout.placement=colocated "
        "and rollout.devices=0",
    )
    yield from _server_combinations(r)
    yield from _assist_combinations(r)


def _assist_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    assist = r.rollout.assist
    yield (
        bool(assist.stage) and r.rollout.placement != "colocated",
        f"rollout.assist.stage={assist.stage} joins searches of this process, which "
        f"rollout.placement={r.rollout.placement} leaves to others; set rollout.placement=colocated, or evaluate the "
        "finished run with it",
    )
    yield (
        not assist.stage and assist.weight != AssistConfig().weight,
        f"rollout.assist.weight={assist.weight:g} weighs the model against rollout.assist.stage, which is empty; name "
        "the directory of a finished baseline (RUN_DIR/sasrec), or leave out the weight",
    )


def _key(r: Recipe, section: str) -> str:
    """The key that decides about the precision of a section's searches."""
    own = {"rollout": r.rollout.precision, "eval": r.eval.precision}[section]
    return "model.precision" if own == AS_MODEL else f"{section}.precision"


def _rollout_precision(r: Recipe) -> str:
    return f"{_key(r, 'rollout')}={r.rollout_precision}"


def _server_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    rollout, served = r.rollout, r.rollout.placement == "server"
    yield (
        served and not rollout.servers,
        "rollout.placement=server needs rollout.servers, the address.json of every server "
        "(RUN_DIR/serve/address.json of tawin-nemo serve)",
    )
    yield (
        not served and bool(rollout.servers),
        f"rollout.servers={list(rollout.servers)} are not used by rollout.placement={rollout.placement}; set "
        "rollout.placement=server, or leave rollout.servers empty",
    )
    yield (
        len(set(rollout.servers)) < len(rollout.servers),
        f"rollout.servers={list(rollout.servers)} names a server twice; name each once",
    )
    yield (
        served and r.processes > 1 and rollout.server_wait_s >= 60 * r.trainer.collective_timeout,
        f"rollout.server_wait_s={rollout.server_wait_s:g}: the other ranks give up before, after "
        f"trainer.collective_timeout={r.trainer.collective_timeout:g} minutes; lower the one or raise the other",
    )
    own = (rollout.tensor_model_parallel_size, rollout.pipeline_model_parallel_size)
    yield (
        served and any(own),
        f"rollout.tensor_model_parallel_size={own[0]} and rollout.pipeline_model_parallel_size={own[1]} say nothing "
        "about servers, whose layout is chosen where they are started (model.tensor_model_parallel_size there); set "
        "both to 0",
    )
    yield (
        served and r.baseline.model != "off",
        f"baseline.model={r.baseline.model} has no rollouts; set rollout.placement=colocated and rollout.servers=[]",
    )
    yield (
        served and r.eval_precision != r.rollout_precision,
        f"{_key(r, 'eval')}={r.eval_precision} but servers search in one number format, {_rollout_precision(r)}; set "
        f"eval.precision={rollout.precision}, or evaluate the finished run without servers",
    )
    yield (
        served and bool(aligned(r)),
        f"{', '.join(aligned(r))}: tasks are checked by searches over other catalogs than the one that servers hold; "
        "set rollout.placement=colocated for a run with SFT tasks, then RL with start=RUN_DIR/sft on servers",
    )
