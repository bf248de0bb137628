"""One real study through the command line: SFT and RL that starts from it, two seeds, on generated data."""

import json
from pathlib import Path

import pytest
import yaml

from tawin_nemo.config.load import load_recipe
from tawin_nemo.tools.study.record import RunRecord
from tests.train.runs import SMALL, called, prepare_dataset

STUDY = {
    "study": "tiny",
    "about": "Two arms, two seeds.",
    "recipe": "base.yaml",
    "seeds": [1, 2],
    "splits": ["valid", "test"],
    "arms": {
        "sft": {"rl.enabled": False, "sft.rows": "earlier"},
        "tawin": {"after": "sft", "sft.enabled": False, "rl.init": "base", "rl.beta": 0.0, "reference.mode": "off"},
    },
    "compare": [["tawin", "sft"]],
    "metrics": ["recall@1", "recall@3", "ndcg@3"],
    "curves": ["valid/loss"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    root = prepare_dataset(folder / "dataset")
    (folder / "base.yaml").write_text("name: tiny\n", encoding="utf-8")
    places = {"results": str(folder / "results/tiny"), "run_root": str(folder / "runs/tiny")}
    keys = dict(item.split("=", 1) for item in [*SMALL, f"data.root={root}"])
    content = {**STUDY, **places, "set": {key: yaml.safe_load(value) for key, value in keys.items()}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def study(folder: Path, *arguments: str) -> tuple[dict, str]:
    done = called("--recipe", str(folder / "tiny.yaml"), *arguments, verb="study", timeout=550)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def first(folder) -> tuple[dict, str]:
    return study(folder, "workers=2")


def test_every_run_has_its_file_and_the_page_its_tables(folder, first):
    line, errors = first
    assert (line["finished"], line["skipped"], line["failed"], line["blocked"]) == (4, 0, [], [])
    names = sorted(path.name for path in (folder / "results/tiny").iterdir())
    assert names == [
        "README.md", "curve.valid_loss.png",
        *(f"{arm}.seed{seed}.{ending}" for arm in ("sft", "tawin") for seed in (1, 2) for ending in ("json", "npz")),
    ]  # fmt: skip
    page = Path(line["report"]).read_text(encoding="utf-8")
    assert "| `tawin` | 2 |" in page
    assert "`tawin` - `sft`" in page
    assert "[4/4]" in errors
    assert "min to go" in errors


@pytest.mark.usefixtures("first")
def test_run_files_say_what_the_runs_found(folder):
    for arm, stage in (("sft", "sft"), ("tawin", "rl")):
        record = RunRecord.read(folder / "results/tiny" / f"{arm}.seed2.json")
        run_dir = folder / "runs/tiny" / f"{arm}.seed2"
        assert (record.stage, record.seed, set(record.splits)) == (stage, 2, {"valid", "test"})
        for split, result in record.splits.items():
            stored = json.loads((run_dir / stage / "eval" / f"{split}.json").read_text())
            assert result.means == stored["means"]
            assert result.values("recall@3").mean() == pytest.approx(stored["means"]["recall@3"], abs=1e-12)
        recipe = load_recipe(run_dir / "recipe.yaml")
        assert (recipe.seed, recipe.trainer.threads, recipe.name) == (2, 1, f"tiny.{arm}")
    assert recipe.start == str(folder / "runs/tiny/sft.seed2/sft")
    assert record.parent.run == "tiny/sft.seed2"
    assert record.settings["rl.max_steps"] == 4
    assert record.steps == 4
    assert "data.root=DIR" in record.command


@pytest.mark.usefixtures("first")
def test_the_same_command_runs_nothing_and_a_lost_file_is_made_again(folder):
    page = folder / "results/tiny/README.md"
    before = {path: path.read_bytes() for path in page.parent.iterdir()}
    line, _ = study(folder)
    assert (line["finished"], line["skipped"]) == (0, 4)
    assert before == {path: path.read_bytes() for path in page.parent.iterdir()}

    lost = folder / "results/tiny/tawin.seed1.json"
    stored = RunRecord.read(lost)
    lost.unlink()
    line, _ = study(folder)
    assert (line["finished"], line["skipped"]) == (1, 3)
    again = RunRecord.read(lost)
    for split, result in stored.splits.items():
        assert again.splits[split].per_user_sha256 == result.per_user_sha256
    assert (again.recipe_hash, again.steps, again.curves) == (stored.recipe_hash, stored.steps, stored.curves)


@pytest.mark.usefixtures("first")
def test_a_changed_recipe_is_refused(folder):
    done = called("--recipe", str(folder / "tiny.yaml"), "arms.tawin.rl.lr=0.5", verb="study")
    assert done.returncode == 2
    assert "rl.lr: 0.001 -> 0.5" in done.stderr
    assert "tawin.seed1.json" in done.stderr
