"""Combinations of recipe keys that make no sense, each with the reason and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from tawin_nemo.config.layout import SEQUENCE_PARALLEL_NEEDS_TP, rollout_layout, training_layout
from tawin_nemo.config.overlap_checks import overlap_combinations
from tawin_nemo.config.placement_checks import ahead_combinations, aligned, placement_combinations
from tawin_nemo.config.precision_checks import precision_combinations
from tawin_nemo.config.preference_checks import preference_combinations, prefers_reference
from tawin_nemo.config.schema import TEMPLATES, Recipe
from tawin_nemo.config.seam_checks import metric_kinds, seam_combinations
from tawin_nemo.config.seams import reward_names
from tawin_nemo.util.imports import is_import_path


def combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    """(is wrong, message) of every combination of keys that makes no sense; the message names a remedy."""
    m, t, rl = r.model, r.trainer, r.rl
    training, world = training_layout(r), r.processes
    searching = rollout_layout(r, training)
    yield from placement_combinations(r)
    yield from overlap_combinations(t)
    yield from _template_combinations(r)
    yield (
        not training.divides(r.training_processes),
        f"trainer.num_nodes={t.num_nodes} x trainer.devices={t.devices} = {world} processes"
        + (f", less rollout.devices={r.rollout.devices} that only search," if r.rollout.devices else "")
        + f" cannot be divided into model.tensor_model_parallel_size={m.tensor_model_parallel_size} x "
        f"model.pipeline_model_parallel_size={m.pipeline_model_parallel_size}; set trainer.devices to a multiple "
        f"of {training.model_ranks}" + (" more than rollout.devices" if r.rollout.devices else ""),
    )
    yield training.sequence_parallel_alone, f"{SEQUENCE_PARALLEL_NEEDS_TP}; set it to false"
    yield (
        r.catalog.kind == "sid" and not r.catalog.index,
        "catalog.kind=sid needs catalog.index, a JSON file of codes; or use catalog.kind=title",
    )
    yield (
        rl.enabled and rl.beta > 0 and r.reference.mode == "off",
        f"rl.beta={rl.beta} needs a reference but reference.mode=off; set rl.beta=0 or reference.mode=copy",
    )
    yield (
        rl.enabled and rl.init == "sft" and not r.sft.enabled,
        "rl.init=sft but sft.enabled=false; set rl.init=base or sft.enabled=true",
    )
    yield (
        uses_fresh_rows(r) and not 0 < rl.fresh_share < 1,
        f"rows=fresh needs rl.fresh_share between 0 and 1, not {rl.fresh_share}; or set rl.rows=all",
    )
    yield (
        0 < r.rollout.width < rl.group_size,
        f"rollout.width={r.rollout.width} is below rl.group_size={rl.group_size}; a group needs that many beams",
    )
    yield (
        r.rollout.devices == 0 and not searching.divides(world),
        f"rollouts with tensor_model_parallel_size={searching.tp} x "
        f"pipeline_model_parallel_size={searching.pp} cannot be laid out over {world} processes; set "
        "rollout.tensor_model_parallel_size and rollout.pipeline_model_parallel_size so that their "
        "product divides them, or to 0 (as in training)",
    )
    yield (
        rl.max_steps == 0 and rl.epochs == 0 and rl.enabled,
        "rl.max_steps=0 and rl.epochs=0: RL would take no step; set one of them, or rl.enabled=false",
    )
    yield from _align_combinations(r)
    yield from precision_combinations(r)
    yield from _space_combinations(r)
    yield from _semantic_id_combinations(r)
    yield from seam_combinations(r)
    yield from preference_combinations(r)
    yield from _prepare_combinations(r)
    if rl.enabled:
        yield from _rl_combinations(r)
        yield from ahead_combinations(r)


def uses_fresh_rows(r: Recipe) -> bool:
    """A stage of the recipe trains on the last ``rl.fresh_share`` of train."""
    return "fresh" in (r.sft.rows, r.rl.enabled and r.rl.rows, r.preference.enabled and r.preference.rows)


def _near(template: str) -> str:
    found = difflib.get_close_matches(template, TEMPLATES, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _template_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    data = r.data
    yield (
        data.template not in TEMPLATES and not data.jinja and not is_import_path(data.template),
        f"data.template={data.template} is not one of compact, alpaca, a Jinja file (NAME.jinja), Jinja text with "
        f"{{{{ }}}}, or an import path such as package.module:name{_near(data.template)}; data.chat=true puts the "
        "tokenizer's chat template around it",
    )
    yield (
        data.chat and data.template == "compact",
        "data.chat=true puts a message into the tokenizer's chat template, but data.template=compact has no words; set "
        "data.template=alpaca, or a Jinja template",
    )
    codes = data.tokenizer == "codes" or (data.tokenizer == "auto" and r.model.init == "random")
    yield (
        data.jinja and r.catalog.kind == "sid" and codes,
        f"data.template={data.template} needs words, and data.tokenizer={data.tokenizer} writes codes only; set "
        "data.tokenizer=bpe, or model.init=DIR",
    )


def _align_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    used = aligned(r)
    yield (
        bool(used) and (r.catalog.kind != "sid" or r.data.tokenizer == "codes"),
        f"{', '.join(used)} ties codes to words; set catalog.kind=sid and data.tokenizer=bpe (or a tokenizer's folder)",
    )
    yield (
        bool(used) and r.data.tokenizer == "auto" and r.model.init == "random",
        f"{', '.join(used)} needs words, and data.tokenizer=auto without model.init writes codes only; set "
        "data.tokenizer=bpe",
    )
    yield (
        (r.align.intention_to_sid > 0) != bool(r.align.intentions),
        f"align.intention_to_sid={r.align.intention_to_sid:g} and align.intentions={r.align.intentions!r} belong "
        "together; set both or none",
    )
    yield (
        r.model.freeze_backbone and r.model.init == "random",
        "model.freeze_backbone=true trains the new tokens of pretrained weights, but model.init=random; set model.init "
        "to a Hugging Face directory, or freeze_backbone=false",
    )
    yield (
        r.model.freeze_backbone and r.model.pipeline_model_parallel_size > 2,
        f"model.freeze_backbone=true leaves the middle ones of model.pipeline_model_parallel_size="
        f"{r.model.pipeline_model_parallel_size} stages without anything to train; use 1 or 2",
    )


def _rl_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    rl = r.rl
    yield (
        rl.max_refill_batches > 0 and rl.algorithm != "dapo",
        f"rl.max_refill_batches={rl.max_refill_batches} is DAPO's dynamic sampling but rl.algorithm={rl.algorithm}; "
        "set rl.algorithm=dapo or rl.max_refill_batches=0",
    )
    yield (
        rl.max_refill_batches > 0 and rl.ensure_target != "off",
        f"rl.max_refill_batches={rl.max_refill_batches} replaces groups without a hit, but "
        f"rl.ensure_target={rl.ensure_target} gives every group one; set one of them to its default",
    )
    yield (
        rl.inserted_weight != 1.0 and rl.ensure_target == "off",
        f"rl.inserted_weight={rl.inserted_weight} weighs groups whose target was put in; "
        "set rl.ensure_target=replace_last",
    )
    yield (
        rl.inserted_correction == "ratio" and rl.ensure_target == "off",
        "rl.inserted_correction=ratio weighs groups whose target was put in; set rl.ensure_target=replace_last",
    )
    searched = r.rollout.score_space if rl.negatives == "beam" else "trie"
    yield (
        rl.inserted_correction == "ratio" and (searched != rl.policy_space or r.rollout.length_penalty != 0),
        f"rl.inserted_correction=ratio compares log-probs with the search's scores; set rl.policy_space={searched} "
        "and rollout.length_penalty=0",
    )
    yield (
        rl.algorithm == "dapo" and rl.length_norm == "branching",
        "rl.algorithm=dapo divides by the tokens of all candidates; rl.length_norm=branching is not defined there: "
        "use full",
    )
    behaviour_space = r.rollout.score_space if rl.negatives == "beam" else "trie"
    yield (
        rl.importance_cap > 0 and (behaviour_space != rl.policy_space or rl.ensure_target != "off"),
        f"rl.importance_cap={rl.importance_cap} needs the rollout's own log-probs of every candidate; set "
        f"rl.policy_space={behaviour_space} (what the rollout scores) and rl.ensure_target=off",
    )
    yield (
        r.reference.refresh != "off" and (rl.beta == 0 or r.reference.mode == "off") and not prefers_reference(r),
        f"reference.refresh={r.reference.refresh} but there is no reference (rl.beta={rl.beta}, "
        f"reference.mode={r.reference.mode}); set rl.beta above 0 and reference.mode=copy, or refresh=off",
    )
    yield (
        "collaborative" in reward_names(rl.reward) and not rl.reward_source,
        "rl.reward=collaborative needs rl.reward_source, the directory of a finished baseline (RUN_DIR/sasrec)",
    )
    yield (
        bool(rl.reward_source) and not {*reward_names(rl.reward)} & {"semantic", "collaborative"},
        f"rl.reward_source={rl.reward_source} is not used by rl.reward={rl.reward}; leave it empty",
    )
    yield (
        rl.rows == "fresh" and r.sft.enabled and r.sft.rows == "fresh",
        "sft.rows=fresh trains SFT on the rows that RL uses; with rl.rows=fresh set sft.rows=auto or rl.enabled=false",
    )


def _space_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    rl, ks = r.rl, r.eval.ks
    yield (
        rl.negatives != "beam" and r.rollout.score_space == "vocab",
        f"rl.negatives={rl.negatives} draws in trie space; set rollout.score_space=trie or rl.negatives=beam",
    )
    yield (
        rl.length_norm == "branching" and rl.policy_space == "vocab",
        "rl.length_norm=branching counts branching tokens, which only rl.policy_space=trie scores; use full",
    )
    splits = r.eval.splits
    yield (
        not splits or not set(splits) <= {"valid", "test"} or len(set(splits)) < len(splits),
        f"eval.splits={list(splits)} must be valid, test or both",
    )
    yield (
        r.trainer.monitor not in ("", *(f"{kind}@{k}" for kind in metric_kinds(r.eval) for k in ks)),
        f"trainer.monitor={r.trainer.monitor} is not measured; use NAME@K with a NAME of "
        f"{', '.join(reversed(metric_kinds(r.eval)))} and a K of eval.ks={list(ks)}",
    )
    yield (
        r.eval.candidates > 0 and r.rollout.placement != "colocated",
        f"eval.candidates={r.eval.candidates} decodes freely, which rollout.placement={r.rollout.placement} cannot; "
        "set rollout.placement=colocated or eval.candidates=0",
    )
    yield (
        r.eval.grounding > 0 and (r.rollout.placement != "colocated" or r.catalog.kind != "title"),
        f"eval.grounding={r.eval.grounding} writes free text and embeds titles, but catalog.kind={r.catalog.kind} and "
        f"rollout.placement={r.rollout.placement}; set catalog.kind=title and rollout.placement=colocated, or "
        "eval.grounding=0",
    )
    yield (
        r.eval.candidates == 1,
        "eval.candidates=1 would be the target alone; set it to 2 or more (the papers: 20), or to 0",
    )
    yield (not ks, "eval.ks=[] must hold cut-offs >= 1")
    yield (
        bool(ks) and max(ks) > r.eval.beams,
        f"eval.beams={r.eval.beams} is below the largest of eval.ks={list(ks)}; raise eval.beams",
    )


def _semantic_id_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    ids, text = r.semantic_ids, r.semantic_ids.text
    yield (
        text.encoder in ("hf", "file") and not text.source and not ids.grow_from,
        f"semantic_ids.text.encoder={text.encoder} needs semantic_ids.text.source, "
        + ("a .npy with one row per item" if text.encoder == "file" else "a Hugging Face folder"),
    )
    yield (
        bool(text.source) and text.encoder in ("tfidf", "minilm") and not ids.grow_from,
        f"semantic_ids.text.source={text.source} is not read by semantic_ids.text.encoder={text.encoder}: empty it",
    )
    yield (
        bool(ids.given and ids.grow_from),
        f"semantic_ids.given={ids.given} and semantic_ids.grow_from={ids.grow_from} both say where codes come "
        "from; set one of them (import first, then grow from the folder that this writes)",
    )


def _prepare_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    p = r.prepare
    dates = f"prepare.valid_start={p.valid_start} and prepare.test_start={p.test_start}"
    yield (
        p.split == "date" and not (p.valid_start and p.test_start),
        f"prepare.split=date begins valid and test on days, but {dates}; set both, YYYY-MM-DD",
    )
    yield (
        p.split != "date" and bool(p.valid_start or p.test_start),
        f"{dates} belong to prepare.split=date, not {p.split}; set it, or leave them empty",
    )
    yield (
        bool(p.valid_start and p.test_start) and p.test_start <= p.valid_start,
        f"{dates}: test must begin after valid; exchange them",
    )
