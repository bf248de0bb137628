"""The Python interface: recipes from dictionaries, evaluation, recommendations, the notebook."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tawin_nemo import api
from tawin_nemo.util.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.train import own_code_samples
from tests.train.runs import importable, run

NOTEBOOK = REPOSITORY / "recipes" / "tutorial" / "python.ipynb"


def python(*words: str) -> str:
    """What a new process says in its last line; it must end with 0."""
    done = subprocess.run([sys.executable, *words], env=importable(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_client_needs_nothing_of_training():
    code = (
        "import sys; import tawin_nemo.api.client; print([n for n in sys.modules if 'facade' in n or 'megatron' in n])"
    )
    assert python("-c", code) == "[]"


def test_overrides_are_words_or_a_dictionary():
    words = ["rl.lr=1e-5", "eval.ks=[1,3]", "name=007", "compare.sft_all=true", "rl.max_steps=3"]
    values = {"rl.lr": 1e-5, "eval.ks": [1, 3], "name": "007", "compare.sft_all": True, "rl.max_steps": 3}
    assert api.load_recipe(None, words) == api.load_recipe(None, values)
    assert api.load_recipe(None, {"rl.max_steps": 3, "rl.init": "base"}).rl.init == "base"


def test_functions_stand_for_their_import_paths():
    own = "tests.train.own_code_samples"
    recipe = api.load_recipe(None, {"rl.reward": own_code_samples.rule, "trainer.callbacks": [own_code_samples.Diary]})
    assert recipe.rl.reward == f"{own}:rule"
    assert recipe.trainer.callbacks == [f"{own}:Diary"]
    with pytest.raises(ConfigError, match="it into a file of its own and name it package"):
        api.load_recipe(None, {"rl.reward": lambda rollout: rollout})


def test_what_needs_one_process_says_so():
    with pytest.raises(ConfigError, match=r"asks for 2 processes, .*trainer\.devices=1"):
        api.evaluate(api.load_recipe(None, {"trainer.devices": 2}))


def test_folders_without_a_run_or_a_catalog(tmp_path: Path):
    with pytest.raises(ConfigError, match="is no run directory and lies in none"):
        api.Recommender.from_run(tmp_path)
    with pytest.raises(ConfigError, match=r"has no tawin\.json, recipe\.yaml, config\.json, so it is no export with a"):
        api.Recommender.from_export(tmp_path)


def test_every_public_name_is_documented():
    assert set(api.__all__) <= set(dir(api))
    for name in api.__all__:
        thing = getattr(api, name)
        assert inspect.getdoc(thing), name
        methods = inspect.getmembers(thing, inspect.isroutine) if inspect.isclass(thing) else []
        assert all(inspect.getdoc(method) for member, method in methods if not member.startswith("_")), name
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = api.trian


@pytest.mark.slow
def test_evaluate_and_recommend_as_the_verbs_do(finished_run: Path, tmp_path: Path):
    """The same figures and items as the command line; one model at a time; names by id or number. The export gives the
    same items as the run that it was made of."""
    export = ""
    if importlib.util.find_spec("tawin_nemo.run.exported"):
        export = str(tmp_path / "export")
        run(f"checkpoint={finished_run / 'rl'}", f"run_dir={finished_run}", f"convert.output={export}", verb="convert")
    found = json.loads(python(str(Path(__file__).parent / "recommender_worker.py"), str(finished_run), export))
    assert (
        found["evaluated"]["test"]["recall@3"]
        == json.loads((finished_run / "summary.json").read_text())["rl"]["recall@3"]
    )
    told = run("--recipe", str(finished_run / "recipe.yaml"), f"run_dir={finished_run}", "generate.history=3,17",
               "generate.n=4", verb="generate")  # fmt: skip
    expected = [(item["item"], item["title"]) for item in told["recommendations"][0]["items"]]
    assert [(item["item"], item["title"]) for item in found["recommended"][0]] == expected
    assert found["second"].endswith("is open in this process; close() it first")
    assert "evaluate cannot start while a Recommender is open" in found["evaluating"]
    assert "no such item" in found["unknown"]
    assert "n=0" in found["none"]
    assert found["closed"] == "this Recommender is closed; open another one"
    assert found["stage"] == str(finished_run / "sft")
    assert found["planned"]["dry_run"] is True


def text_of(output: Any) -> str:
    """What a cell shows; empty for its log."""
    if output.get("name") == "stderr":
        return ""
    return str(output.get("text") or output.get("data", {}).get("text/plain", ""))


@pytest.mark.full
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every cell, in the repository's folder, with runs below another one; what the cells show is what they say."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; tests/run.sh installs it")
    import nbformat

    for name, value in importable().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    for cell in notebook.cells:
        for name, place in (("notebook_reward", "own"), ("notebook", "run")):
            cell.source = cell.source.replace(
                f'"name": "{name}"', f'"name": "{place}", "run_dir": "{tmp_path}/{place}"'
            )
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = ["".join(map(text_of, cell.outputs)) for cell in cells]
    assert shown[0] == "('rule', [1, 3])"
    assert "did you mean rl.reward?" in shown[1]
    assert "'sft'" in shown[2]
    assert shown[3].endswith(", 0.0)")
    assert len(shown[4].strip().splitlines()) == 5
    assert "class SameWord" in shown[5]
    assert 0 <= float(shown[6]) <= 1
    assert "recipes.tutorial.own_reward:SameWord" in (tmp_path / "own" / "recipe.yaml").read_text()
