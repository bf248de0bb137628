"""Study files: what they may say, what they unfold to, and errors that name the nearest word."""

import subprocess
import sys
from pathlib import Path

import pytest

from tawin_nemo.tools.study.arms import Parent, read_study
from tawin_nemo.tools.study.plan import arm_recipe
from tawin_nemo.util.errors import ConfigError
from tests.tools.study.files import ARMS, study_of, write_study

STUDIES = sorted((Path(__file__).parents[3] / "recipes" / "studies").glob("*.yaml"))


def test_a_grid_unfolds_into_named_arms_with_their_keys(tmp_path):
    study = study_of(tmp_path)
    assert [arm.name for arm in study.arms] == [
        "sft", "more",
        "tawin[anchor=0,window=centred]", "tawin[anchor=0,window=start]",
        "tawin[anchor=1,window=centred]", "tawin[anchor=1,window=start]",
        "tawin[anchor=2,window=centred]", "tawin[anchor=2,window=start]",
    ]  # fmt: skip
    arm = study.arm("tawin[anchor=1,window=start]")
    assert arm.keys == {
        "sft.enabled": False, "rl.init": "base", "rl.tawin.anchor": 1, "rl.tawin.window": "start",
    }  # fmt: skip
    assert (arm.base, arm.slug, arm.parent, arm.seeds) == (
        "tawin", "tawin.anchor=1,window=start", Parent("", "sft"), (1, 2),
    )  # fmt: skip


def test_grid_keys_with_the_same_last_word_keep_their_whole_name(tmp_path):
    study = study_of(tmp_path, arms={"a": {"grid": {"sft.lr": [0.001], "rl.lr": [1e-4, 1e-5], "rl.beta": [0.0]}}})
    assert [arm.name for arm in study.arms] == [
        "a[sft.lr=0.001,rl.lr=0.0001,beta=0.0]", "a[sft.lr=0.001,rl.lr=1e-05,beta=0.0]",
    ]  # fmt: skip


def test_the_command_line_wins_key_by_key(tmp_path):
    path = write_study(tmp_path, set={"data.max_history": 5, "rl": {"lr": 1e-3}})
    study = read_study(path, ["set.rl.lr=1e-5", "seeds=[7]", "arms.more.sft.lr=0.5", "arms.more.after=sft"])
    assert study.keys == {"data.max_history": 5, "rl.lr": 1e-5}
    assert study.file.seeds == [7]
    more = study.arm("more")
    assert (more.keys["sft.lr"], more.keys["sft.rows"], more.parent) == (0.5, "fresh", Parent("", "sft"))
    recipe = arm_recipe(study, more)
    assert (recipe.rl.lr, recipe.sft.lr, recipe.data.max_history) == (1e-5, 0.5, 5)
    assert (recipe.trainer.threads, recipe.eval.splits) == (1, ["valid"])


def test_an_arm_may_have_its_own_splits_seeds_and_threads(tmp_path):
    arms = {"a": {"eval.splits": ["valid", "test"], "seeds": [3, 4, 5]}, "b": {"trainer.threads": 2}}
    study = study_of(tmp_path, arms=arms)
    assert (study.arm("a").seeds, study.arm("b").seeds) == ((3, 4, 5), (1, 2))
    assert arm_recipe(study, study.arm("a")).eval.splits == ["valid", "test"]
    assert arm_recipe(study, study.arm("b")).trainer.threads == 2


def test_after_finds_arms_of_other_studies(tmp_path):
    arms = {"a": {"after": "pretrained/sft"}, "b": {"after": "sft"}, "c": {"after": "a"}}
    study = study_of(tmp_path, arms=arms, shared_from="common")
    assert [arm.parent for arm in study.arms] == [Parent("pretrained", "sft"), Parent("common", "sft"), Parent("", "a")]


def test_parents_come_first_whatever_the_order_of_the_file(tmp_path):
    arms = {"c": {"after": "b"}, "a": {}, "b": {"after": "a"}, "d": {}}
    assert [arm.name for arm in study_of(tmp_path, arms=arms).arms] == ["a", "d", "b", "c"]


def test_pairs_unfold_point_by_point_and_by_pattern(tmp_path):
    arms = {**ARMS, "grpo": {**ARMS["tawin"], "rl.tawin.enabled": False}}
    points = [f"[anchor={a},window={w}]" for a in (0, 1, 2) for w in ("centred", "start")]
    study = study_of(tmp_path, arms=arms, compare=[["tawin", "grpo"], ["tawin*anchor=2*", "sft"], ["other/x", "more"]])
    assert study.pairs == (
        *((f"tawin{point}", f"grpo{point}") for point in points),
        ("tawin[anchor=2,window=centred]", "sft"), ("tawin[anchor=2,window=start]", "sft"), ("other/x", "more"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"seedz": [1]}, ["unknown key seedz", "did you mean seeds?"]),
        ({"seeds": "abc"}, ["seeds", "abc"]),
        ({"seeds": []}, ["seeds"]),
        ({"study": ""}, ["study"]),
        ({"study": "a/b"}, ["study='a/b'"]),
        ({"recipe": ""}, ["recipe is missing"]),
        ({"arms": {}}, ["arms is empty"]),
        ({"metrics": ["recall"]}, ["recall@K"]),
        ({"workers": -1}, ["workers=-1"]),
        ({"set": {"rl.lrr": 1}}, ["rl.lrr", "set of", "did you mean rl.lr?"]),
        ({"set": {"seed": 1}}, ["seed", "use seeds"]),
        ({"arms": {"a": {"rl.tawn.k": 1}}}, ["rl.tawn.k", "arm a", "did you mean rl.tawin.k?"]),
        ({"arms": {"a": {"aftr": "b"}}}, ["aftr", "did you mean after?"]),
        ({"arms": {"a": {"grid": {"rl.lrr": [1]}}}}, ["rl.lrr", "did you mean rl.lr?"]),
        ({"arms": {"a": {"grid": {"rl.lr": 1}}}}, ["grid rl.lr=1", "a list"]),
        ({"arms": {"a[0]": {}}}, ["a[0]", "letters"]),
        ({"arms": {"a": {"seeds": ["x"]}}}, ["seeds=['x']"]),
        ({"arms": {"a": 3}}, ["arms.a=3"]),
        ({"arms": {"base": {}, "a": {"after": "bas"}}}, ["after=bas", "did you mean base?"]),
        ({"arms": {**ARMS, "a": {"after": "tawin"}}}, ["is a grid", "tawin[anchor=0,window=centred]"]),
        ({"arms": {"a": {"after": "b"}, "b": {"after": "a"}}}, ["wait for each other"]),
        ({"arms": {"a": {"seeds": [1]}, "b": {"after": "a"}}}, ["seeds [2]"]),
        ({"arms": {"a": {}, "b": {"after": "a", "start": "x"}}}, ["both after=a and start"]),
        ({"arms": {"a": {"grid": {"data.root": ["x/y", "x|y"]}}}}, ["share their files"]),
        ({"compare": [["tawn", "sft"]]}, ["tawn", "did you mean tawin?"]),
        ({"compare": [["sft"]]}, ["[ours, theirs]"]),
        ({"sweeps": [{"arm": "tawin", "y": "rl.tawin.anchor"}]}, ["unknown key y", "sweeps"]),
        ({"sweeps": [{"arm": "tawin", "x": "rl.tawin.k"}]}, ["x=rl.tawin.k", "rl.tawin.anchor"]),
        ({"sweeps": [{"arm": "tawin", "x": "rl.tawin.window"}]}, ["'centred'", "numbers"]),
        ({"sweeps": [{"arm": "tawin", "x": "rl.tawin.anchor", "beside": ["mor"]}]}, ["did you mean more?"]),
        ({"sweeps": [{"arm": "tawin", "x": "rl.tawin.anchor", "minus": "tawin"}]}, ["minus=tawin", "one arm"]),
    ],
)
def test_mistakes_are_named_with_their_remedy(tmp_path, keys, parts):
    with pytest.raises(ConfigError) as caught:
        study_of(tmp_path, **keys)
    for part in parts:
        assert part in str(caught.value)


def test_a_recipe_that_cannot_be_used_names_the_arm(tmp_path):
    study = study_of(tmp_path, arms={"a": {"rl.kl": "k4"}})
    with pytest.raises(ConfigError, match=r"arm a of .*rl\.kl=k4"):
        arm_recipe(study, study.arm("a"))


def test_a_missing_file_names_the_nearest(tmp_path):
    write_study(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean .*probe\.yaml"):
        read_study(tmp_path / "recipes" / "prob.yaml")
    with pytest.raises(ConfigError, match="study needs --recipe"):
        read_study(None)


def test_the_command_line_exits_with_2(tmp_path):
    path = write_study(tmp_path, seedz=[1])
    arguments = [sys.executable, "-m", "tawin_nemo", "study", "--recipe", str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "did you mean seeds?" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_shows_a_study_file():
    arguments = [sys.executable, "-m", "tawin_nemo", "study", "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for word in ("arms:", "grid:", "after: sft", "report=true", "--dry-run"):
        assert word in done.stdout


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_load(path):
    study = read_study(path)
    assert study.file.study == path.stem
    assert study.file.about
    for arm in study.arms:
        arm_recipe(study, arm)
