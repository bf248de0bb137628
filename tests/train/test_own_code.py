"""Code of one's own in whole runs: from the command line and from Python, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tawin_nemo.data.prompts import build_template
from tawin_nemo.train.own_code import OwnGroupValues, OwnNegatives
from tawin_nemo.util.errors import ConfigError
from tests import forked
from tests.train import own_code_samples
from tests.train.runs import SMALL, called, importable, metrics, run

OWN = "tests.train.own_code_samples"
#: Ten lines: what a user writes first.
TEN_LINES = """
    import os
    from pathlib import Path

    FACTOR = 2.0

    def reward(rollout):
        Path(f"rank_{os.environ['RANK']}").touch()  # every rank computes the rewards of its own prompts
        return FACTOR * rollout.is_target_BG
"""
#: The same from a script.
SCRIPT = """
    import json
    import sys

    from my_reward import FACTOR, reward as same
    from tawin_nemo import api


    def reward(rollout):
        return same(rollout)


    if __name__ == "__main__":
        settings = dict(word.split("=", 1) for word in sys.argv[1:])
        summary = api.train(api.load_recipe(None, settings | {"trainer.devices": 2, "rl.reward": reward}))
        print(json.dumps(summary))
"""


def started(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command started from nothing in ``folder``, as a user does; the package is found through PYTHONPATH."""
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=importable(), capture_output=True, text=True, timeout=500
    )


def verb_in(folder: str, words: Sequence[str]) -> int | None:
    """The verb in ``folder``, which Python searches for modules first, as with ``python -m``."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    return forked.verb(words)


def result(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_reward.py").write_text(dedent(TEN_LINES))
    (tmp_path / "my_script.py").write_text(dedent(SCRIPT))
    return tmp_path


@pytest.mark.distributed
def test_own_reward_from_the_command_line_in_two_processes(small_dataset: Path, finished_run: Path, folder: Path):
    """Both ranks compute it, by the file in the current directory; the rewards are twice those of the rule. Continued
    with another source the run is refused; with the old one it is complete."""
    words = [*SMALL, f"data.root={small_dataset}", "run_dir=run", "trainer.devices=2", "rl.reward=my_reward:reward",
             "compare.sft_continued=false"]  # fmt: skip
    summary = result(started(folder, "-m", "tawin_nemo", "train", *words))
    assert {path.name for path in folder.glob("rank_*")} == {"rank_0", "rank_1"}
    ours, rule = metrics(folder / "run", "rl"), metrics(finished_run, "rl")
    assert ours[0]["rl/reward"] == pytest.approx(2 * rule[0]["rl/reward"])
    assert ours[0]["rl/reward"] > 0
    source = folder / "my_reward.py"
    before = source.read_text()
    source.write_text(before.replace("FACTOR = 2.0", "FACTOR = 3.0"))
    alone = [*words, "trainer.devices=1"]  # the number of processes may change; one starts sooner
    refused = called(*alone, main=partial(verb_in, str(folder)))
    assert refused.returncode == 2
    assert "run holds a run of another recipe (code.rl.reward=my_reward:reward: " in refused.stderr
    assert "bring back the source of the code that it names, or choose another name=" in refused.stderr
    source.write_text(before)
    assert result(called(*alone, main=partial(verb_in, str(folder))))["rl"] == summary["rl"]


@pytest.mark.full
@pytest.mark.distributed
def test_own_reward_from_python_in_two_processes(small_dataset: Path, finished_run: Path, folder: Path):
    """A function of the script itself; the processes import the script by its name."""
    words = [*SMALL, f"data.root={small_dataset}", "run_dir=run", "compare.sft_continued=false"]
    summary = result(started(folder, "my_script.py", *words))
    assert summary == json.loads((folder / "run" / "summary.json").read_text())
    assert {path.name for path in folder.glob("rank_*")} == {"rank_0", "rank_1"}
    assert "reward: my_script:reward" in (folder / "run" / "recipe.yaml").read_text()
    rule = metrics(finished_run, "rl")[0]["rl/reward"]
    assert metrics(folder / "run", "rl")[0]["rl/reward"] == pytest.approx(2 * rule)


@pytest.mark.slow
def test_the_built_in_ones_by_import_path_give_the_same_run(small_dataset: Path, finished_run: Path, tmp_path: Path):
    """Reward, advantage, weights and loss by import path: the metrics of every step equal those of the built-in ones.
    Callback, sink and metric beside them see what the run does and change nothing."""
    own = {"rl.reward": "rule", "rl.advantage": "group", "rl.candidate_weights": "window", "rl.algorithm": "clipped",
           "trainer.callbacks": "Diary", "trainer.metric_sinks": "Board", "eval.metrics": "mrr"}  # fmt: skip
    summary = run(
        *SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}", "compare.sft_continued=false",
        "trainer.monitor=mrr@3", "trainer.val_check_interval=2", *(f"{key}={OWN}:{name}" for key, name in own.items()),
    )  # fmt: skip
    ours = metrics(tmp_path, "rl")
    steps = [line for line in ours if "rl/reward" in line]
    assert steps == metrics(finished_run, "rl")
    validated = [line for line in ours if "rl/reward" not in line]
    assert [line["step"] for line in validated] == [2, 4]
    assert {"valid/recall@3", "valid/ndcg@3", "valid/mrr@1", "valid/mrr@3"} <= validated[0].keys()
    assert summary["rl"]["recall@1"] == summary["rl"]["mrr@1"] <= summary["rl"]["mrr@3"] <= summary["rl"]["recall@3"]
    diary = [json.loads(line) for line in (tmp_path / "diary.jsonl").read_text().splitlines()]
    told = [line[:3] for line in diary if line[1] == "rl"]
    assert told[0] == ["start", "rl", 0]
    assert told[-1] == ["end", "rl", 4]
    assert [step for event, _, step in told if event == "save"] == [1, 2, 3, 4]
    board = [json.loads(line) for line in (tmp_path / "board.jsonl").read_text().splitlines()]
    sent = [metrics for stage, step, metrics in board if stage == "rl" and step == 1]
    assert steps[0].items() <= ({"step": 1} | sent[0]).items()
    assert "mrr@3" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"rl.reward={OWN}:several", "expected a function or class called as (rollout)"),
        (f"data.dataset={OWN}:rule", "expected a function or class called as (root, prepare)"),
    ],
)
def test_a_wrong_signature_ends_with_2_before_any_data_are_prepared(tmp_path: Path, override: str, words: str):
    done = called("data.dataset=synthetic", override, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"rl.reward={OWN}:one_each", "returned shape [2]; expected one finite number per candidate, [2, 3]"),
        (f"rl.reward={OWN}:not_numbers", "returned 6 values that are not finite; expected"),
        (f"rl.reward={OWN}:words", "returned an object of type str; expected"),
        (f"rl.reward={OWN}:failing", "failed on two rows of train: KeyError: 'price' (own_code_samples.py, line"),
        (f"rl.advantage={OWN}:mrr", "failed on two rows of train: "),
        (f"rl.candidate_weights={OWN}:one_each", "rl.candidate_weights=tests.train.own_code_samples:one_each returned"),
        (f"rl.algorithm={OWN}:loss_alone", "returned an object of type Tensor; expected (loss, statistics)"),
        (f"rl.algorithm={OWN}:loss_without_gradient", "returned a loss without a gradient"),
        (f"rl.reward=rule + 0.2 * {OWN}:failing", "failed on two rows of train: KeyError"),
    ],
)
def test_what_fails_on_two_rows_ends_a_dry_run(small_dataset: Path, tmp_path: Path, override: str, words: str):
    """Before anything is trained, all faults of a run at once; here one."""
    done = called(*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}", override, "--dry-run")
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.slow
def test_own_rejected_items_of_preference_optimisation(small_dataset: Path, tmp_path: Path):
    arguments = [*SMALL, f"data.root={small_dataset}", "rl.enabled=false", "sft.epochs=1", "preference.enabled=true",
                 "preference.algorithm=simpo", "preference.max_steps=2", "preference.global_batch_size=16",
                 "compare.sft_continued=false"]  # fmt: skip
    run(*arguments, f"run_dir={tmp_path / 'run'}", f"preference.negatives={OWN}:Neighbours")
    lines = metrics(tmp_path / "run", "preference")
    assert [line["preference/negatives_per_row"] for line in lines] == [3, 3]
    done = called(*arguments, f"run_dir={tmp_path / 'wrong'}", f"preference.negatives={OWN}:targets", "--dry-run")
    assert done.returncode == 2
    assert "returned shape [2, 4] of int64; expected [2, 3] of int64" in done.stderr


def test_rejected_items_are_checked():
    class Samples:
        target_N = np.array([0, 3])

    def negatives(items: list[list[int]]) -> np.ndarray:
        leaf_I = np.array([5, 5, 6, 7])  # items 0 and 1 are written alike
        own = OwnNegatives("a:b", lambda rows, step, num: np.array(items), Samples(), leaf_I, 2)
        return own.items(np.array([0, 1]), 0)

    assert negatives([[2, -1], [0, 1]]).tolist() == [[2, -1], [0, 1]]
    with pytest.raises(ConfigError, match="the target of a row among its rejected items, or an item written like it"):
        negatives([[1, 2], [0, 2]])
    with pytest.raises(ConfigError, match=r"items that do not exist; expected 0 \.\. 3, or -1 for none"):
        negatives([[2, 4], [0, 2]])


@pytest.mark.slow
def test_own_template_and_own_reader(tmp_path: Path):
    """A log in a format of one's own, prompts in words of one's own."""
    (tmp_path / "raw").mkdir()
    lines = [f"u{user} i{(user + 3 * n) % 12} {20 * n + user}" for user in range(20) for n in range(8)]
    (tmp_path / "raw" / "notes.txt").write_text("\n".join(lines) + "\n")
    words = [f"data.dataset={OWN}:read_notes", f"data.root={tmp_path / 'raw'}", f"run_dir={tmp_path / 'run'}",
             "prepare.k_core=2", "data.bpe_vocab_size=320", "model.backbone=nano"]  # fmt: skip
    assert run(*words, verb="prepare")["prepared"] == str(tmp_path / "run" / "data")
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert manifest["request"]["parameters"]["source"] == f"{OWN}:read_notes"
    planned = run(*words, f"data.template={OWN}:Spoken", "rl.group_size=4", "eval.beams=4", "eval.ks=[1]", "--dry-run")
    assert planned["items"] == 12
    refused = called(*words[1:], f"data.dataset={OWN}:no_frames", verb="prepare")
    assert refused.returncode == 2
    assert "returned list; expected two polars frames, log and items" in refused.stderr


def test_own_template():
    template = build_template(f"{OWN}:Spoken", "title")
    assert isinstance(template, own_code_samples.Spoken)
    assert template.prompt(["a", "b"]) == "Seen: a; b Next: "
    with pytest.raises(ConfigError, match=r"data\.template=alpca is not known; use compact, alpaca"):
        build_template("alpca", "title")


def test_the_current_directory_is_searched_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tawin_nemo.config.seams import loaded

    (tmp_path / "own_here.py").write_text("def reward(rollout): return 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", os.getcwd())])
    assert loaded("rl.reward", "own_here:reward")(None) == 1


def test_one_reward_that_is_no_number_is_left_to_the_step_and_one_weight_is_an_error():
    """The step leaves the candidate out of its group and counts it; a weight or an advantage has no such place."""
    rollout = SimpleNamespace(valid_BG=torch.tensor([[True, True, False]]))
    given = torch.tensor([[1.0, float("nan"), float("nan")]])
    found = OwnGroupValues("rl.reward", "own:fn", lambda _: given)(rollout)
    assert found[0, 0] == 1.0
    assert bool(found[0, 1].isnan())
    assert found[0, 2] == 0.0
    with pytest.raises(ConfigError, match=r"rl\.candidate_weights=own:fn returned 1 values that are not finite"):
        OwnGroupValues("rl.candidate_weights", "own:fn", lambda _: given)(rollout)
    nothing = torch.full((1, 3), float("nan"))
    with pytest.raises(ConfigError, match=r"rl\.reward=own:fn returned 2 values that are not finite"):
        OwnGroupValues("rl.reward", "own:fn", lambda _: nothing)(rollout)
