"""Runs on generation servers through the command line: the same bytes as in one process, killed and resumed or not, and
the exit codes of a run without a server that fits."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests import failpoints
from tests.crash_matrix.attempts import difference, fingerprint
from tests.distributed.launch import free_port
from tests.serve.scene import KEY, TOKEN, serving
from tests.serve.test_process import process_of
from tests.train.runs import SMALL, called, command, environment, run

SHORT = ("compare.sft_continued=false", "sft.epochs=1")


def failed(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*overrides), capture_output=True, text=True, env=environment(), timeout=500)


@pytest.mark.distributed
@pytest.mark.timeout(1800)  # three starts: minutes each on a busy machine
def test_on_a_server_a_run_writes_the_same_bytes(small_dataset: Path, tmp_path: Path) -> None:
    words = [*SMALL, *SHORT, f"data.root={small_dataset}"]
    run(*words, f"run_dir={tmp_path / 'here'}")
    file = tmp_path / "server" / "serve" / "address.json"
    there = (*words, "rollout.placement=server", f"rollout.servers=[{file}]")
    with process_of(file, *there, f"run_dir={tmp_path / 'server'}"):
        run(*there, f"run_dir={tmp_path / 'there'}")
        killed = [*there, f"run_dir={tmp_path / 'killed'}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(failpoints.VARIABLE, "rl.after_rollout=kill@3")
            assert called(*killed).returncode == -signal.SIGKILL
        run(*killed)  # the server still has the weights of the third step
    for name in ("sft/metrics.jsonl", "rl/metrics.jsonl", "rl/eval/test.per_user.parquet", "sft/eval/test.json"):
        for folder in ("there", "killed"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), (folder, name)
    expected = fingerprint(tmp_path / "here")  # weights and optimizer among it
    assert (difference(tmp_path / "there", expected), difference(tmp_path / "killed", expected)) == ("", "")


def test_without_a_server_a_run_ends_with_1(small_dataset: Path, tmp_path: Path) -> None:
    file, gone = tmp_path / "address.json", f"http://127.0.0.1:{free_port()}"
    file.write_text(json.dumps({"data": gone, "control": gone}))
    (tmp_path / "control_token").write_text(TOKEN)
    done = failed(
        *SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}", "rollout.placement=server",
        f"rollout.servers=[{file}]", "rollout.server_wait_s=0",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    assert f"no generation server is left ({file}: ConnectError" in done.stderr.splitlines()[-1]


@pytest.mark.distributed
def test_a_server_of_another_catalog_ends_with_2(small_dataset: Path, tmp_path: Path) -> None:
    with serving() as scene:
        file = tmp_path / "address.json"
        file.write_text(json.dumps({"data": scene.data, "control": scene.control}))
        (tmp_path / "control_token").write_text(TOKEN)
        (tmp_path / "key").write_text(KEY)
        done = failed(
            *SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}", "rollout.placement=server",
            f"rollout.servers=[{file}]", f"rollout.api_key_file={tmp_path / 'key'}",
        )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    last = done.stderr.splitlines()[-1]
    assert "serves another catalog" in last
    assert "start it from this run's recipe" in last
