"""The pool of processes: dependencies, failures, locks, signals, commits. Shell commands stand for training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tawin_nemo.tools.study import launch, provenance
from tawin_nemo.tools.study.launch import Busy, data_finder, shown_command, start_process, train_command
from tawin_nemo.tools.study.plan import make_plan
from tawin_nemo.tools.study.record import RunRecord, read_folder
from tawin_nemo.tools.study.runner import log_tail
from tawin_nemo.util.log import get_logger
from tests.tools.study.files import FakeTraining, study_of

CHAIN = {"a": {"rl.enabled": False}, "b": {"after": "a", "rl.enabled": False}, "c": {"after": "b"}, "d": {}}


@pytest.fixture
def fake(tmp_path):
    return FakeTraining(tmp_path / "made")


def test_each_run_starts_from_the_final_stage_of_its_parent(tmp_path, fake):
    outcome = fake.run(study_of(tmp_path, arms=CHAIN), workers=3)
    assert sorted(outcome.finished) == sorted(f"{arm}.seed{seed}" for arm in CHAIN for seed in (1, 2))
    assert (outcome.failed, outcome.blocked) == ([], [])
    started = dict(fake.started)
    assert started["a.seed2"] == started["d.seed1"] == ""
    assert started["b.seed2"] == "a.seed2/sft"
    assert started["c.seed1"] == "b.seed1/sft"
    order = [name for name, _ in fake.started]
    assert order.index("a.seed1") < order.index("b.seed1") < order.index("c.seed1")
    record = RunRecord.read(tmp_path / "results" / "probe" / "c.seed1.json")
    assert (record.arm, record.seed, record.stage, record.parent.run) == ("c", 1, "rl", "probe/b.seed1")
    assert record.hardware.keys() == {"cpu", "cores", "torch"}
    assert record.command.startswith("cp -r ")


def test_a_failed_run_stops_only_its_dependants(tmp_path, fake, caplog):
    fake.failing = {"b.seed1"}
    study = study_of(tmp_path, arms=CHAIN)
    with caplog.at_level("INFO", logger="tawin_nemo"), caplogged(caplog):
        outcome = fake.run(study)
    assert (outcome.failed, outcome.blocked) == (["b.seed1"], ["c.seed1"])
    finished, failed = read_folder(tmp_path / "results" / "probe")
    assert sorted(finished) == [("a", 1), ("a", 2), ("b", 2), ("c", 2), ("d", 1), ("d", 2)]
    (lost,) = failed.values()
    assert (lost.arm, lost.seed, lost.exit_code) == ("b", 1, 2)
    assert lost.log_tail == ["line one", "tawin-nemo train: b.seed1 is broken"]
    assert "c.seed1 is not run: b.seed1 failed" in caplog.text
    assert "b.seed1 is broken" in caplog.text
    assert "repeat it with" in caplog.text

    fake.failing = set()
    outcome = fake.run(study_of(tmp_path, arms=CHAIN))
    assert outcome.finished == ["b.seed1", "c.seed1"]
    assert read_folder(tmp_path / "results" / "probe")[1] == {}
    assert not list((tmp_path / "results" / "probe").glob("*.failed.json"))
    assert [path.name for path in sorted((tmp_path / "runs/probe/b.seed1").glob("attempt.*"))] == [
        "attempt.1.log", "attempt.2.log",
    ]  # fmt: skip


@contextmanager
def caplogged(caplog):
    """The package's logger has a handler of its own; hand its lines to the test as well."""
    root = get_logger("tawin_nemo")
    root.addHandler(caplog.handler)
    try:
        yield
    finally:
        root.removeHandler(caplog.handler)


def test_a_run_that_leaves_no_summary_has_failed(tmp_path, fake):
    fake.command = lambda run, data, start: ["true"]  # type: ignore[method-assign]
    outcome = fake.run(study_of(tmp_path, arms={"a": {}}, seeds=[1]))
    assert outcome.failed == ["a.seed1"]
    (lost,) = read_folder(tmp_path / "results" / "probe")[1].values()
    assert "final_stage" in lost.log_tail[-1]


def test_the_same_study_again_runs_nothing(tmp_path, fake):
    study = study_of(tmp_path, arms=CHAIN)
    fake.run(study)
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json")}
    again = FakeTraining(tmp_path / "made")
    again.run(study)
    assert again.started == []
    assert before == {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json")}


def test_a_run_made_again_for_its_weights_keeps_its_file(tmp_path, fake):
    arms = {name: CHAIN[name] for name in "ab"}
    fake.run(study_of(tmp_path, arms=arms, seeds=[1]))
    path = tmp_path / "results" / "probe" / "a.seed1.json"
    content = json.loads(path.read_text())
    content["date"] = "2020-01-01"
    path.write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results" / "probe" / "b.seed1.json").unlink()
    outcome = fake.run(study_of(tmp_path, arms=arms, seeds=[1]))
    assert outcome.finished == ["a.seed1", "b.seed1"]
    assert RunRecord.read(path).date == "2020-01-01"


def test_no_more_processes_than_workers(tmp_path, fake):
    running, seen = tmp_path / "running", []

    def command(run, data, start):
        seen.append(len(list(running.glob("*"))))
        made = FakeTraining(tmp_path / "made").command(run, data, start)
        mark = running / run.name
        mark.mkdir(parents=True)
        return ["sh", "-c", f"sleep 0.2; rmdir {mark}; {' '.join(made)}"]

    fake.command = command  # type: ignore[method-assign]
    fake.run(study_of(tmp_path, arms={name: {} for name in "abcdef"}, seeds=[1]), workers=2)
    assert len(seen) == 6
    assert max(seen) == 1  # one beside the one that starts


def test_a_run_that_another_process_works_on_is_waited_for(tmp_path, fake, caplog):
    """A study that was killed leaves its runs going; the next call neither fails them nor works beside them."""
    plan = make_plan(study_of(tmp_path, arms={"a": {}, "b": {}, "c": {"after": "a"}}, seeds=[1]))
    left = start_process(plan.runs[0], ["sleep", "30"])
    with pytest.raises(Busy, match=rf"process {left.popen.pid} works in .*a\.seed1"):
        start_process(plan.runs[0], ["true"])
    ended: list[str] = []

    def end_it_after_b() -> None:
        wait_for(tmp_path / "results" / "probe" / "b.seed1.json")
        ended.extend(path.name for path in (tmp_path / "results" / "probe").glob("*"))
        launch.stop([left])

    timer = threading.Thread(target=end_it_after_b)
    timer.start()
    with caplog.at_level("INFO", logger="tawin_nemo"), caplogged(caplog):
        outcome = fake.run(plan.study, plan=plan)
    timer.join()
    assert sorted(ended) == ["b.seed1.json", "b.seed1.npz"]  # the other worker went on
    assert (outcome.finished, outcome.failed, outcome.blocked) == (["b.seed1", "a.seed1", "c.seed1"], [], [])
    assert caplog.text.count(f"a.seed1 waits: process {left.popen.pid} works in") == 1


def test_with_one_worker_nothing_runs_beside_a_process_that_was_left(tmp_path, fake):
    plan = make_plan(study_of(tmp_path, arms={"a": {}, "b": {}}, seeds=[1]))
    left = start_process(plan.runs[0], ["sleep", "0.5"])
    outcome = fake.run(plan.study, plan=plan, workers=1)
    assert left.popen.poll() == 0
    assert outcome.finished == ["a.seed1", "b.seed1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_processes_and_the_study_can_go_on(tmp_path, fake, number, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    fake.sleeping = {"a.seed1"}  # ignores SIGTERM
    before = [
        signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)
    ]  # a shell's background job ignores SIGINT
    study = study_of(tmp_path, arms={"a": {}}, seeds=[1])
    log = tmp_path / "runs" / "probe" / "a.seed1" / "attempt.1.log"
    timer = threading.Thread(target=lambda: (wait_for(log), time.sleep(0.3), os.kill(os.getpid(), number)))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fake.run(study)
    timer.join()
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    assert not (tmp_path / "results").exists()
    fake.sleeping = set()
    assert fake.run(study).finished == ["a.seed1"]  # nobody holds the lock any more


def test_a_process_that_is_being_started_is_ended_too(tmp_path, fake, monkeypatch):
    fake.sleeping = {"a.seed1"}
    monkeypatch.setattr(launch, "GRACE", 0.2)
    monkeypatch.setattr(provenance, "code_version", lambda: os.kill(os.getpid(), signal.SIGINT) or "abc")
    study = study_of(tmp_path, arms={"a": {}}, seeds=[1])
    with pytest.raises(KeyboardInterrupt):
        fake.run(study)
    monkeypatch.setattr(provenance, "code_version", lambda: "abc")
    fake.sleeping = set()
    assert fake.run(study).finished == ["a.seed1"]


def wait_for(path: Path) -> None:
    give_up = time.monotonic() + 20
    while not path.exists() and time.monotonic() < give_up:
        time.sleep(0.01)


# -- git -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    for key, value in (("NAME", "t"), ("EMAIL", "t@example.org")):
        monkeypatch.setenv(f"GIT_AUTHOR_{key}", value)
        monkeypatch.setenv(f"GIT_COMMITTER_{key}", value)
    git(tmp_path, "init", "-q")
    (tmp_path / "staged.txt").write_text("not mine")
    git(tmp_path, "add", "staged.txt")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_each_run_file_is_committed_alone(repository, fake):
    fake.failing = {"tawin[anchor=1].seed1"}
    arms = {"tawin": {"grid": {"rl.tawin.anchor": [0, 1]}}}
    study = study_of(repository, "commit=true", arms=arms, seeds=[1])
    fake.run(study, workers=1)
    log = git(repository, "log", "--format=%s", "--name-status").split("\n\n")
    assert git(repository, "log", "--format=%s").splitlines() == [
        "Study probe: tawin[anchor=1].seed1 failed", "Study probe: tawin[anchor=0].seed1",
    ]  # fmt: skip
    for ending in ("json", "npz"):
        assert f"A\tresults/probe/tawin.anchor=0.seed1.{ending}" in "".join(log)
    assert git(repository, "diff", "--cached", "--name-only").split() == ["staged.txt"]  # others' work is left alone
    fake.failing = set()
    fake.run(study, workers=1)
    assert git(repository, "ls-files", "results").split() == [
        f"results/probe/tawin.anchor={anchor}.seed1.{ending}" for anchor in (0, 1) for ending in ("json", "npz")
    ]  # fmt: skip


def test_a_locked_index_is_waited_for(repository, monkeypatch):
    monkeypatch.setattr(provenance, "PAUSE", 0.1)
    path = repository / "a[0].json"
    path.write_text("{}")
    lock = repository / ".git" / "index.lock"
    lock.touch()
    threading.Timer(0.5, lock.unlink).start()
    assert provenance.commit([path], "mine")
    assert git(repository, "ls-files").split() == ["a[0].json", "staged.txt"]
    assert provenance.commit([path], "again")  # nothing to do
    assert len(git(repository, "log", "--format=%s").splitlines()) == 1


def test_a_commit_that_git_refuses_is_a_warning(repository, tmp_path_factory):
    assert not provenance.commit([repository / "absent.json"], "nothing")
    outside = tmp_path_factory.mktemp("no_repository") / "a" / "b"
    with pytest.raises(ValueError, match="commit=true but"):
        provenance.require_repository(outside)
    provenance.require_repository(repository / "not" / "there" / "yet")


# -- commands ------------------------------------------------------------------------------------------------------
def test_the_train_command_of_a_run(tmp_path):
    keys = {"catalog.kind": "sid", "catalog.index": "codes.json", "data.root": str(tmp_path), "data.dataset": "inter"}
    study = study_of(tmp_path, arms={"a": {}, "b": {"after": "a", "rl.lr": 1e-5}}, set=keys)
    run = make_plan(study).runs[1]
    words = train_command(study)(run, Path("prepared"), Path("runs/probe/a.seed1/sft"))
    assert words[:6] == [sys.executable, "-m", "tawin_nemo", "train", "--recipe", str(tmp_path / "recipes/base.yaml")]
    assert {
        "data.dataset=prepared", "data.root=prepared", f"catalog.index={tmp_path}/codes.json", "seed=1", "rl.lr=1e-05",
        "start=runs/probe/a.seed1/sft", "trainer.threads=1", f"run_dir={run.run_dir}", 'eval.splits=["valid"]',
    } <= set(words)  # fmt: skip
    shown = shown_command(words, str(tmp_path))
    assert shown.startswith("python -m tawin_nemo train --recipe DIR/recipes/base.yaml")
    assert "catalog.index=DIR/codes.json" in shown
    assert str(tmp_path) not in shown


def test_raw_data_is_prepared_once_for_all_that_agree_on_it(tmp_path):
    arms = {"a": {}, "b": {"rl.lr": 0.1}, "c": {"data.max_history": 3}}
    plan = make_plan(study_of(tmp_path, arms=arms))
    asked = []

    def prepare(recipe):
        asked.append(recipe)
        return Path(recipe.run_dir) / "data"

    find = data_finder(plan.study, prepare)
    folders = {run.name: find(run) for run in plan.runs}
    assert len(asked) == 2
    assert {recipe.seed for recipe in asked} == {42}  # generated data are the same under all seeds
    assert folders["a.seed1"] == folders["b.seed2"] != folders["c.seed1"]
    assert folders["a.seed1"].is_relative_to(tmp_path / "runs" / "probe" / "data")


def test_a_process_has_one_core_and_its_own_log(tmp_path):
    run = make_plan(study_of(tmp_path, arms={"a": {}}, seeds=[1])).runs[0]
    process = start_process(run, ["sh", "-c", "echo $OMP_NUM_THREADS; echo oops >&2"])
    process.popen.wait()
    assert process.log.read_text() == "1\noops\n"
    assert log_tail(process.log, 1) == ["oops"]
