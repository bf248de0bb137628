"""The recipe keys that take code from outside by import path, and what each of them expects.

``imported`` checks all that a recipe names and records the hash of every source in the recipe's section ``code``, so
that a run continues with the code that it was started with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tawin_nemo.config.fields import value_of
from tawin_nemo.config.schema import Recipe
from tawin_nemo.config.sinks import check_sinks
from tawin_nemo.util.imports import Seam, is_import_path, load, make, source_hash

#: What a callback may have; see ``run.callbacks.Callback``.
EVENTS = {
    "on_stage_start": ("stage", "step"), "on_log": ("stage", "step", "metrics"), "on_save": ("stage", "step"),
    "on_stage_end": ("stage", "step"),
}  # fmt: skip

#: Recipe key -> what its import path must name. Axes as in ``types``; R rows, N rejected items of a row.
SEAMS = {
    "rl.reward": Seam(("rollout",), "rewards_BG (float, one per candidate)"),
    "rl.advantage": Seam(("rewards_BG", "rollout"), "advantages_BG"),
    "rl.candidate_weights": Seam(("rollout",), "omega_BG"),
    "rl.algorithm": Seam(("logp_N", "terms", "counts", "objective"), "(loss, statistics), as maths.grpo.grpo_loss"),
    "preference.negatives": Seam(("row_R", "step", "num"), "items_RN (int64, -1 where there are fewer than num)"),
    "eval.metrics": Seam(("rank_B", "k"), "values_B, as maths.ranking.recall_at_k"),
    "trainer.callbacks": Seam(events=EVENTS),
    "trainer.metric_sinks": Seam(("stage", "step", "metrics"), "None, on rank 0"),
    "data.template": Seam(base="tawin_nemo.data.prompts:Template"),
    "data.dataset": Seam(("root", "prepare"), "data_prep.raw.RawData"),
}
#: Those that verbs beside training use as well: a model is evaluated and served with them.
EVERYWHERE = ("data.template", "data.dataset", "eval.metrics")
#: Those that cannot change what is computed; their source may change while a run goes on.
OBSERVERS = ("trainer.metric_sinks",)


@dataclass(frozen=True)
class Term:
    """One summand of ``rl.reward``."""

    weight: float
    name: str


_TERM = re.compile(
    r"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?(?P<name>[A-Za-z_][\w.:]*)\s*"
)


def reward_terms(text: str) -> tuple[Term, ...]:
    """The summands of a reward such as ``rule + 0.5 * my.mod:fn``.

    Raises ValueError for anything else.

    >>> reward_terms("rule - 1e-2 * my.mod:fn")
    (Term(weight=1.0, name='rule'), Term(weight=-0.01, name='my.mod:fn'))
    """
    terms: list[Term] = []
    at = 0
    while at < len(text) or not terms:
        term = _TERM.match(text, at)
        if term is None or (terms and not term["sign"]):
            raise ValueError("is no sum of rewards; write NAME, or for example rule + 0.5 * package.module:name")
        terms.append(Term(float(f"{term['sign']}{term['weight'] or 1}"), term["name"]))
        at = term.end()
    return tuple(terms)


def reward_names(text: str) -> list[str]:
    """The names in ``rl.reward``; the text itself where it cannot be read (``load.check`` says why)."""
    try:
        return [term.name for term in reward_terms(text)]
    except ValueError:
        return [text]


def names_in(key: str, value: Any) -> list[str]:
    """The names and import paths that the value of a key consists of."""
    if key == "rl.reward":
        return reward_names(value)
    return list(value) if isinstance(value, list) else [value]


def import_paths(recipe: Recipe, keys: Sequence[str] = tuple(SEAMS)) -> Iterator[tuple[str, str]]:
    """(key, import path) of all code from outside that ``recipe`` names under ``keys``."""
    for key in keys:
        yield from ((key, name) for name in names_in(key, value_of(recipe, key)) if is_import_path(name))


def loaded(key: str, path: str) -> Any:
    """The function, object or class at import path ``path``. Raises ConfigError as ``util.imports.load``."""
    return load(key, path, SEAMS[key])


def made(key: str, path: str, world: Any = None) -> Any:
    """``loaded``, with an object made of a class. Raises ConfigError as ``util.imports.make``."""
    return make(key, path, SEAMS[key], world)


def imported(recipe: Recipe, *, trains: bool) -> Recipe:
    """``recipe`` with section ``code``: the hash of the source behind every import path that this process will use.

    ``trains``: all of them, else those of ``EVERYWHERE``. Raises ConfigError for code that cannot be imported, does not
    fit its key, or lies in no file, and for a metric sink whose library or server is missing.
    """
    code: dict[str, str] = {}
    if trains:
        check_sinks(recipe)
    for key, path in import_paths(recipe, tuple(SEAMS) if trains else EVERYWHERE):
        loaded(key, path)
        if key not in OBSERVERS:
            code[f"{key}={path}"] = source_hash(key, path)
    return replace(recipe, code=code)
