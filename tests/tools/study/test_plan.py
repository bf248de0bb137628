"""Plans: order, what exists, what a changed recipe means, other studies, times."""

import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tawin_nemo.config.load import load_recipe
from tawin_nemo.tools.study.plan import (
    AGAIN,
    DONE,
    TO_RUN,
    arm_keys,
    as_override,
    make_plan,
    plan_table,
    recipe_hash,
    settings_of,
)
from tawin_nemo.tools.study.record import RunRecord
from tawin_nemo.util.errors import ConfigError
from tests.tools.study.files import ARMS, FakeTraining, study_of

CHAIN = {"a": {"rl.enabled": False}, "b": {"after": "a", "rl.enabled": False}, "c": {"after": "b"}}


def states(plan) -> dict[str, str]:
    return {run.name: plan.state[run.key] for run in plan.runs}


def expected(plan) -> dict[str, float | None]:
    return {run.name: plan.seconds(run) for run in plan.runs}


def test_parents_first_and_seed_by_seed(tmp_path):
    plan = make_plan(study_of(tmp_path, arms=CHAIN, seeds=[5, 3]))
    assert [run.name for run in plan.runs] == ["a.seed5", "b.seed5", "c.seed5", "a.seed3", "b.seed3", "c.seed3"]
    assert set(states(plan).values()) == {TO_RUN}
    run = plan.runs[1]
    assert run.parent_key == ("a", 5)
    assert run.parent_dir == tmp_path / "runs" / "probe" / "a.seed5"
    assert run.file == tmp_path / "results" / "probe" / "b.seed5.json"
    assert (run.settings["seed"], run.settings["rl.enabled"]) == (5, False)


def test_grid_arms_write_to_paths_without_brackets(tmp_path):
    run = make_plan(study_of(tmp_path)).runs[2]
    assert run.name == "tawin[anchor=0,window=centred].seed1"
    assert run.run_dir.name == "tawin.anchor=0,window=centred.seed1"
    assert run.file.name == "tawin.anchor=0,window=centred.seed1.json"
    assert run.failed_file.name == "tawin.anchor=0,window=centred.seed1.failed.json"


def test_finished_runs_are_skipped_and_times_are_estimated(tmp_path):
    study = study_of(tmp_path)
    assert make_plan(study).seconds(make_plan(study).runs[0]) is None
    FakeTraining(tmp_path / "made").run(study_of(tmp_path, "seeds=[1]"))
    plan = make_plan(study)
    assert [run.name for run in plan.runs if plan.state[run.key] == DONE] == [run.name for run in plan.runs[:8]]
    assert [run.seed for run in plan.waiting] == [2] * 8
    assert plan.seconds(plan.waiting[0]) == 30.0
    text = plan_table(plan, workers=2)
    assert "tawin[anchor=2,window=start].seed2" in text
    assert "8 of 16 runs to do, about 2 min with 2 at once" in text


def test_times_come_from_the_nearest_relatives(tmp_path):
    FakeTraining(tmp_path / "made").run(study_of(tmp_path, "seeds=[1]"))
    for path in (tmp_path / "results" / "probe").glob("*.json"):
        content = json.loads(path.read_text())
        content["process_s"] = 100.0 if content["arm"] == "tawin[anchor=0,window=start]" else 10.0
        content["wall_s"] = 5.0
        path.write_text(json.dumps(content))
    study = study_of(tmp_path, arms={**ARMS, "late": {}})
    by_name = expected(make_plan(study))
    assert by_name["tawin[anchor=0,window=start].seed2"] == 100.0  # the same arm
    assert by_name["sft.seed2"] == 10.0
    assert by_name["late.seed1"] == pytest.approx((100 + 7 * 10) / 8)  # all runs
    (tmp_path / "results" / "probe" / "tawin.anchor=0,window=centred.seed1.json").unlink()
    by_name = expected(make_plan(study))
    assert by_name["tawin[anchor=0,window=centred].seed1"] == pytest.approx((100 + 4 * 10) / 5)  # its grid


def test_a_changed_recipe_names_the_key_and_the_remedy(tmp_path):
    FakeTraining(tmp_path / "made").run(study_of(tmp_path, arms=CHAIN))
    with pytest.raises(ConfigError) as caught:
        make_plan(study_of(tmp_path, arms={**CHAIN, "c": {"after": "b", "rl.lr": 0.5}}))
    for part in ("c.seed1.json", "rl.lr: 0.0001 -> 0.5", "rename the arm, or delete the file"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"after: probe/b\.seed1 -> probe/a\.seed1"):
        make_plan(study_of(tmp_path, arms={**CHAIN, "c": {"after": "a"}}))
    with pytest.raises(ConfigError, match=r"after: probe/b\.seed1 -> nothing"):
        make_plan(study_of(tmp_path, arms={**CHAIN, "c": {}}))


def test_a_parent_that_was_made_again_with_another_recipe_is_noticed(tmp_path):
    FakeTraining(tmp_path / "made").run(study_of(tmp_path, arms=CHAIN, seeds=[1]))
    for folder, name in (("results", "a.seed1.json"), ("runs", "a.seed1")):
        path = tmp_path / folder / "probe" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    other = {"a": {"rl.enabled": False, "sft.lr": 0.5}, "b": CHAIN["b"]}
    results = tmp_path / "results" / "probe"
    child = (results / "b.seed1.json").read_text()
    (results / "b.seed1.json").unlink()
    (results / "c.seed1.json").unlink()
    FakeTraining(tmp_path / "made").run(study_of(tmp_path, arms={"a": other["a"]}, seeds=[1]))
    (results / "b.seed1.json").write_text(child)
    with pytest.raises(ConfigError, match=r"b\.seed1\.json .*after: probe/a\.seed1 has another recipe"):
        make_plan(study_of(tmp_path, arms=other, seeds=[1]))


def test_where_a_run_is_made_does_not_matter(tmp_path):
    study = study_of(tmp_path, arms=CHAIN)
    FakeTraining(tmp_path / "made").run(study)
    moved = study_of(
        tmp_path, "set.trainer.threads=4", "set.data.root=elsewhere", f"run_root={tmp_path / 'x'}", arms=CHAIN
    )
    assert set(states(make_plan(moved)).values()) == {DONE}


def test_a_key_that_a_later_version_adds_counts_as_its_default(tmp_path):
    study = study_of(tmp_path, arms=CHAIN)
    FakeTraining(tmp_path / "made").run(study)
    path = tmp_path / "results" / "probe" / "a.seed1.json"
    content = json.loads(path.read_text())
    del content["settings"]["rl.importance_cap"]
    path.write_text(json.dumps(content))
    assert set(states(make_plan(study)).values()) == {DONE}
    content["settings"]["rl.gone"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"rl\.gone: 1 -> no such key"):
        make_plan(study)


def test_more_splits_mean_that_the_run_is_evaluated_again(tmp_path):
    study = study_of(tmp_path, arms=CHAIN)
    FakeTraining(tmp_path / "made").run(study)
    more = study_of(tmp_path, "splits=[valid,test]", arms=CHAIN)
    assert set(states(make_plan(more)).values()) == {TO_RUN}
    FakeTraining(tmp_path / "made").run(more)
    assert set(states(make_plan(more)).values()) == {DONE}
    assert set(states(make_plan(study)).values()) == {DONE}  # a file with more than what is asked for does
    assert set(RunRecord.read(tmp_path / "results" / "probe" / "c.seed1.json").splits) == {"valid", "test"}


def test_weights_that_are_gone_are_made_again_only_for_children(tmp_path):
    FakeTraining(tmp_path / "made").run(study_of(tmp_path, arms=CHAIN, seeds=[1]))
    shutil.rmtree(tmp_path / "runs")
    study = study_of(tmp_path, arms=CHAIN, seeds=[1])
    assert states(make_plan(study)) == {"a.seed1": DONE, "b.seed1": DONE, "c.seed1": DONE}
    (tmp_path / "results" / "probe" / "c.seed1.json").unlink()
    assert states(make_plan(study)) == {"a.seed1": AGAIN, "b.seed1": AGAIN, "c.seed1": TO_RUN}


def test_arms_of_another_study_must_be_there_with_their_weights(tmp_path):
    common = study_of(tmp_path, arms={"sft": {"rl.enabled": False}}, study="common",
                      results=str(tmp_path / "results/common"), run_root=str(tmp_path / "runs/common"))  # fmt: skip
    keys = {"arms": {"x": {"after": "common/sft"}}, "seeds": [1]}
    with pytest.raises(ConfigError, match=r"x\.seed1 starts from common/sft, but there is no run file"):
        make_plan(study_of(tmp_path, **keys))
    FakeTraining(tmp_path / "made").run(common)
    fake = FakeTraining(tmp_path / "made")
    fake.run(study_of(tmp_path, **keys))
    assert fake.started == [("x.seed1", "sft.seed1/sft")]
    record = RunRecord.read(tmp_path / "results" / "probe" / "x.seed1.json")
    parent = RunRecord.read(tmp_path / "results" / "common" / "sft.seed1.json")
    assert (record.parent.run, record.parent.recipe_hash) == ("common/sft.seed1", parent.recipe_hash)
    shutil.rmtree(tmp_path / "runs")
    assert set(states(make_plan(study_of(tmp_path, **keys))).values()) == {DONE}  # nothing has to start from it
    (tmp_path / "results" / "probe" / "x.seed1.json").unlink()
    with pytest.raises(ConfigError, match=r"sft\.seed1 holds no finished run"):
        make_plan(study_of(tmp_path, **keys))


def test_the_hash_follows_what_matters(tmp_path):
    recipe = load_recipe(None, ["data.dataset=synthetic"])
    plain = recipe_hash(settings_of(recipe), None)
    assert recipe_hash(settings_of(replace(recipe, run_dir="x", name="y")), None) == plain
    assert recipe_hash(settings_of(replace(recipe, seed=1)), None) != plain
    without = {key: value for key, value in settings_of(recipe).items() if key != "rl.importance_cap"}
    assert recipe_hash(without, None) == plain


@given(st.one_of(
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(lambda text: "${" not in text),
    st.sampled_from("off|true|null|1e3|1e-4|0x1|1_000|a: b|a #b|~|[1|nan| a|1:30".split("|")),
))  # fmt: skip
def test_strings_survive_the_command_line(text):
    assert OmegaConf.from_dotlist([as_override("model.init", text)]).model.init == text


@pytest.mark.parametrize("value", [True, False, 3, 1e-5, 0.1, [1, 3, 10], ["valid", "test"], []])
def test_values_survive_the_command_line(value):
    found = OmegaConf.to_container(OmegaConf.from_dotlist([as_override("k", value)]))["k"]
    assert found == value
    assert type(found) is type(value)


def test_the_arms_own_keys_come_last(tmp_path):
    study = study_of(
        tmp_path, arms={"a": {"sft.lr": 0.1, "eval.splits": ["test"]}}, set={"sft": {"lr": 0.2, "epochs": 3}}
    )
    assert arm_keys(study, study.arm("a")) == {
        "trainer.threads": 1, "eval.splits": ["test"], "sft.lr": 0.1, "sft.epochs": 3,
    }  # fmt: skip
