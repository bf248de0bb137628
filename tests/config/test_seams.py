"""Import paths in recipes: what is accepted, what is refused with which words, and what the fingerprint depends on."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tawin_nemo.commands.keys import recipe_schema
from tawin_nemo.config.load import differences, load_recipe, to_yaml
from tawin_nemo.config.schema import Recipe
from tawin_nemo.config.seams import SEAMS, imported, made, reward_terms
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.imports import path_of, source_hash

MODULE = "own_seams"
SOURCE = """
    import own_helper
    LIMIT = 3
    def reward(rollout): return own_helper.scale() * rollout
    def by_name(rollout, *, scale=1.0): return rollout
    def several(rollout, weight): return rollout
    def metric(rank_B, k): return rank_B
    def advantage(rewards_BG): return rewards_BG
    class Made:
        def __init__(self, world): self.world = world
        def __call__(self, rollout): return self.world
    class Plain:
        def __call__(self, rollout): return 7
    class Greedy:
        def __init__(self, world, more): pass
        def __call__(self, rollout): return rollout
    class Dumb:
        pass
    class Broken:
        def __init__(self): raise ValueError("no file")
        def __call__(self, rollout): return rollout
    class Watcher:
        def on_log(self, stage, step, metrics): pass
    class Typo:
        def on_lgo(self, stage, step, metrics): pass
    class Short:
        def on_save(self, stage): pass
    class Outer:
        @staticmethod
        def inner(rollout): return rollout
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module of one's own that imports another one."""
    (tmp_path / f"{MODULE}.py").write_text(dedent(SOURCE))
    (tmp_path / "own_helper.py").write_text("def scale(): return 1\n")
    (tmp_path / "own_other.py").write_text("x = 1\n")
    (tmp_path / "own_syntax.py").write_text("def reward(rollout) return 1\n")
    (tmp_path / "own_missing.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "own_failing.py").write_text("x = 1\nraise RuntimeError('licence expired')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def recipe(*overrides: str) -> Recipe:
    return imported(load_recipe(None, overrides), trains=True)


def test_sums_of_rewards():
    terms = [(term.weight, term.name) for term in reward_terms("rule + 0.5 * a.b:c - 1e-2*ranking+2*rule")]
    assert terms == [(1.0, "rule"), (0.5, "a.b:c"), (-0.01, "ranking"), (2.0, "rule")]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.reward=rul", "rl.reward=rul is not one of rule, ranking, semantic, collaborative, or an import path such "
         "as package.module:name; did you mean rule?"),
        ("rl.reward=rule + rankin", "rl.reward=rankin is not one of"),
        ("rl.reward=rule ranking", "rl.reward=rule ranking is no sum of rewards; write NAME"),
        ("rl.reward=0.5 rule", "is no sum of rewards"),
        ("rl.reward=", "is no sum of rewards"),
        ("rl.reward=my.mod", "rl.reward=my.mod is not one of"),
        ("rl.algorithm=grp", "or an import path such as package.module:name; did you mean grpo?"),
        ("preference.negatives=randm", "did you mean random?"),
        ("data.template=alpca", "did you mean alpaca?"),
        ("data.dataset=amzon", "did you mean amazon?"),
        ("rl.kl=my.mod:kl", "rl.kl=my.mod:kl is not one of k3, k1, k2"),
        ("eval.metrics=mrr", "eval.metrics=mrr is not an import path such as package.module:name"),
        ("trainer.callbacks=a:b,c", "trainer.callbacks=c is not an import path"),
        ("eval.metrics=a:recall", "names a metric recall, which is taken"),
        ("eval.metrics=a:mrr,b:mrr", "names a metric mrr, which is taken"),
        ("trainer.monitor=mrr@10", "use NAME@K with a NAME of ndcg, recall and a K of"),
        ("rl.reward=semantic + a:b rl.reward_source=", ""),
        ("rl.reward=rule + a:b rl.reward_source=x.npy", "rl.reward_source=x.npy is not used"),
        ("rl.reward=rule + collaborative", "rl.reward=collaborative needs rl.reward_source"),
        ("rl.candidate_weights=a:b rl.tawin.k=2", "rl.tawin is not used by rl.candidate_weights=a:b"),
        ("rl.candidate_weights=a:b rl.tawin.enabled=false", ""),
        ("rl.advantage=a:b rl.std=sample", "rl.std=sample is not used by rl.advantage=a:b"),
        ("eval.metrics=a:mrr trainer.monitor=mrr@3", ""),
    ],
)  # fmt: skip
def test_names_are_checked_when_the_recipe_is_read(override: str, words: str):
    overrides = re.split(r" (?=rl\.|trainer\.)", override)
    if not words:
        load_recipe(None, overrides)
        return
    with pytest.raises(ConfigError) as error:
        load_recipe(None, overrides)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.reward=own_sems:reward", "rl.reward=own_sems:reward: there is no module own_sems; it is looked for in the "
         "current directory"),
        ("rl.reward=own_seams:rewad", "rl.reward=own_seams:rewad: own_seams has no rewad; did you mean reward?"),
        ("rl.reward=own_seams:xyz", "own_seams has no xyz; it should hold a function or class called as (rollout)"),
        ("rl.reward=own_syntax:reward", "importing own_syntax failed: SyntaxError"),
        ("rl.reward=own_missing:f", "importing own_missing failed: ModuleNotFoundError: No module named "
         "'not_installed_anywhere' (own_missing.py, line 1)"),
        ("rl.reward=own_failing:f", "RuntimeError: licence expired (own_failing.py, line 2)"),
        ("rl.reward=own_seams:several", "rl.reward=own_seams:several: expected a function or class called as (rollout) "
         "-> rewards_BG (float, one per candidate); found several(rollout, weight)"),
        ("rl.reward=own_seams:LIMIT", "found an object of type int"),
        ("rl.reward=own_seams:Greedy", "found a class made as Greedy(world, more), not with the world of the run"),
        ("rl.reward=own_seams:Dumb", "found the class Dumb, whose objects cannot be called"),
        ("rl.reward=rule + 0.1 * own_seams:several", "rl.reward=own_seams:several: expected"),
        ("rl.advantage=own_seams:advantage", "called as (rewards_BG, rollout) -> advantages_BG; found "
         "advantage(rewards_BG)"),
        ("rl.candidate_weights=own_seams:metric", "called as (rollout) -> omega_BG; found metric(rank_B, k)"),
        ("rl.algorithm=own_seams:reward", "called as (logp_N, terms, counts, objective) -> (loss, statistics), as "
         "maths.grpo.grpo_loss; found reward(rollout)"),
        ("preference.negatives=own_seams:reward", "called as (row_R, step, num)"),
        ("eval.metrics=own_seams:reward", "called as (rank_B, k)"),
        ("trainer.metric_sinks=own_seams:reward", "called as (stage, step, metrics)"),
        ("trainer.callbacks=own_seams:Typo", "found on_lgo, which is never called; did you mean on_log?"),
        ("trainer.callbacks=own_seams:Short", "found on_save(self, stage)"),
        ("trainer.callbacks=own_seams:Plain", "found the class Plain, which has none of them"),
        ("data.template=own_seams:Plain", "expected a subclass of tawin_nemo.data.prompts:Template; found the class"),
        ("data.dataset=own_seams:reward", "called as (root, prepare)"),
    ],
)  # fmt: skip
def test_code_that_does_not_fit_is_refused_with_what_was_expected_and_found(folder: Path, override: str, words: str):
    with pytest.raises(ConfigError) as error:
        recipe(override)
    assert words in str(error.value)
    assert error.value.exit_code == 2


def test_every_key_that_takes_code_is_covered_by_the_schema_and_the_other_way_round():
    from tawin_nemo.config.fields import leaf_fields

    marked = {key for key, item in leaf_fields(Recipe) if item.metadata.get("imports")}
    assert marked | {"data.template"} == SEAMS.keys()


def test_functions_classes_and_parts_of_classes(folder: Path):
    assert made("rl.reward", "own_seams:by_name")(4) == 4
    assert made("rl.reward", "own_seams:Made", "the world")(None) == "the world"
    assert made("rl.reward", "own_seams:Plain", "the world")(None) == 7
    assert made("rl.reward", "own_seams:Outer.inner")(5) == 5
    with pytest.raises(
        ConfigError, match=r"making Broken with no arguments failed: ValueError: no file \(own_seams.py"
    ):
        made("rl.reward", "own_seams:Broken")
    assert recipe("trainer.callbacks=own_seams:Watcher").trainer.callbacks == ["own_seams:Watcher"]


def test_the_fingerprint_follows_the_source_and_what_it_imports_from_its_own_folder(folder: Path):
    """Comments count too: the bytes are what can be compared. Other files of the folder do not count."""
    words = ("rl.reward=rule + 0.1 * own_seams:reward", "eval.metrics=own_seams:metric")
    before = recipe(*words)
    assert before.code.keys() == {"rl.reward=own_seams:reward", "eval.metrics=own_seams:metric"}
    (folder / "own_other.py").write_text("x = 2\n")
    assert recipe(*words).code == before.code
    (folder / "own_helper.py").write_text("def scale(): return 2\n")
    after = recipe(*words)
    assert after.code.keys() == before.code.keys()
    changed = differences(to_yaml(before), to_yaml(after))
    assert [line.split(": ")[0] for line in changed] == [
        "code.eval.metrics=own_seams:metric",
        "code.rl.reward=own_seams:reward",
    ]
    assert before.code["rl.reward=own_seams:reward"] in changed[1]


def test_verbs_beside_training_need_only_the_code_that_they_use(folder: Path):
    named = load_recipe(None, ["rl.reward=nowhere:reward", "eval.metrics=own_seams:metric"])
    assert imported(named, trains=False).code.keys() == {"eval.metrics=own_seams:metric"}
    with pytest.raises(ConfigError, match="there is no module nowhere"):
        imported(named, trains=True)


def test_what_a_stored_recipe_says_about_code_is_read_and_replaced(folder: Path):
    stored = folder / "recipe.yaml"
    stored.write_text(to_yaml(recipe("rl.reward=own_seams:reward")))
    (folder / "own_helper.py").write_text("def scale(): return 3\n")
    again = imported(load_recipe(stored), trains=True)
    assert list(again.code) == ["rl.reward=own_seams:reward"]
    assert again.code != load_recipe(stored).code
    assert to_yaml(load_recipe(stored)) == stored.read_text()


def test_recipes_without_code_are_what_they_were():
    assert recipe().code == {}
    assert recipe("trainer.metric_sinks=builtins:print").code == {}  # observes only: its source may change


def test_paths_of_functions(folder: Path):
    sys.path.insert(0, str(folder))
    module = importlib.import_module(MODULE)
    assert path_of(module.reward) == "own_seams:reward"
    assert path_of(module.Outer.inner) == "own_seams:Outer.inner"
    with pytest.raises(ConfigError, match="has no import path"):
        path_of(lambda rollout: rollout)
    with pytest.raises(ConfigError, match="lies in no file"):
        source_hash("rl.reward", "builtins:len")


def test_editors_accept_names_sums_and_import_paths():
    value = recipe_schema()["properties"]["rl"]["properties"]["reward"]["anyOf"]
    patterns = [part["pattern"] for part in value[0]["anyOf"] if "pattern" in part]
    assert all(any(re.search(pattern, text) for pattern in patterns) for text in ("a.b:c", "rule + 0.5 * ranking"))
    assert not any(re.search(pattern, "rul") for pattern in patterns)
