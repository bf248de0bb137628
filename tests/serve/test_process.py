"""``tawin-nemo serve`` as a process of its own, with a real model: answers, new weights, signals, two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import openai
import psutil
import pyarrow.parquet as pq
import pytest

from tawin_nemo.api.client import Client, ControlClient, ServerError
from tawin_nemo.config.load import load_recipe
from tests.rollout.rankings import SCORE_TOLERANCE, assert_same_ranking
from tests.serve.scene import KEY, metric_in
from tests.train.runs import SMALL, called, command, environment, prepare_dataset, run

LIMIT = 240  # seconds for a start on a machine that is busy


@dataclass
class Served:
    process: subprocess.Popen[str]
    data: str
    control: str
    token: str

    def client(self) -> Client:
        return Client(self.data, KEY)

    def controller(self) -> ControlClient:
        return ControlClient(self.control, self.token)

    def end(self, limit: float = 60) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=limit)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained stage with two checkpoints."""
    dataset, directory = prepare_dataset(tmp_path_factory.mktemp("dataset")), tmp_path_factory.mktemp("run")
    run(*SMALL, f"data.root={dataset}", f"run_dir={directory}", "rl.enabled=false", "sft.epochs=1", "sft.rows=all")
    (directory / "keys").write_text(KEY)
    return directory / "sft"


def process(stage: Path, *overrides: str, log: IO[str] | int = subprocess.PIPE) -> AbstractContextManager[Served]:
    """A server of a stage's weights."""
    keys = f"serve.api_keys_file={stage.parent / 'keys'}"
    return process_of(stage.parent / "serve" / "address.json", f"checkpoint={stage}", keys, *overrides, log=log)


@contextmanager
def process_of(file: Path, *overrides: str, log: IO[str] | int = subprocess.PIPE) -> Iterator[Served]:
    """A server that writes ``file`` when it is ready, and its log to ``log``: a file for more than some hundred
    requests, since a pipe that nobody reads fills up and then holds the server."""
    folder = file.parent
    file.unlink(missing_ok=True)
    words = ["serve.port=0", "serve.control_port=0"]
    started = subprocess.Popen(
        command(*words, *overrides, verb="serve"), stdout=subprocess.PIPE, stderr=log, text=True,
        env=environment(),
    )  # fmt: skip
    try:
        end = time.monotonic() + LIMIT
        while not file.is_file():
            assert started.poll() is None, (started.communicate()[1] or "")[-4000:]
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.1)
        place = json.loads(file.read_text())
        yield Served(started, place["data"], place["control"], (folder / "control_token").read_text().strip())
    finally:
        if started.poll() is None:
            for child in psutil.Process(started.pid).children(recursive=True):
                child.kill()
            started.kill()
        started.communicate()


@pytest.fixture(scope="module")
def served(stage: Path) -> Iterator[Served]:
    with process(stage) as running:
        yield running


def ranking(reply) -> list[tuple[tuple[int, ...], float]]:
    return [(tuple(item.tokens), item.score) for item in reply.items]


def test_the_server_answers_as_the_verb_generate_does(served: Served, stage: Path) -> None:
    result = run(f"checkpoint={stage}", "generate.history=[3,5]", "generate.n=6", verb="generate")
    expected = result["recommendations"][0]["items"]
    with served.client() as client:
        reply = client.recommend([3, 5], n=6)
    assert [(item.item, item.title) for item in reply.items] == [(item["item"], item["title"]) for item in expected]
    for item, other in zip(reply.items, expected, strict=True):
        assert item.score == pytest.approx(other["score"], abs=SCORE_TOLERANCE)


def test_items_are_filtered_by_the_fields_of_the_prepared_data(served: Served, stage: Path) -> None:
    root = load_recipe(stage.parent / "recipe.yaml", []).data.root
    rows = pq.read_table(Path(root) / "items.parquet").to_pylist()
    brand = rows[7]["brand"]
    listed = [row["item"] for row in rows if row["brand"] == brand]
    assert 0 < len(listed) < len(rows)
    with served.client() as client:
        assert {"brand", "category", "title"} <= set(client.models().data[0].item_fields)
        filtered, expected = client.recommend([3], filter={"brand": brand}), client.recommend([3], allow=listed)
        with pytest.raises(ServerError, match="items have no field 'colour'; they have brand, category,"):
            client.recommend([3], filter={"colour": "red"})
    assert filtered.items == expected.items


def test_many_at_once_get_what_they_get_alone(served: Served) -> None:
    """Within SCORE_TOLERANCE: other prompts in a matrix product change the order of its sums."""
    asked = [{"history": [item, item + 1], "n": 4, "beams": 6 + item % 3, "return_tokens": True} for item in range(12)]
    with served.client() as client, ThreadPoolExecutor(12) as pool:
        alone = [client.recommend(**body) for body in asked]
        before = httpx.get(f"{served.data}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        joint = list(pool.map(lambda body: client.recommend(**body), asked))
        after = httpx.get(f"{served.data}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    for one, other in zip(alone, joint, strict=True):
        assert_same_ranking(ranking(other), ranking(one), SCORE_TOLERANCE)
    steps, shared = (
        metric_in(after, f"tawin_requests_per_branch_step_{end}")
        - metric_in(before, f"tawin_requests_per_branch_step_{end}")
        for end in ("count", "sum")
    )
    assert shared > steps


def test_openais_own_client_completes(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.data}/v1", api_key=KEY, max_retries=0)
    (model,) = client.models.list().data
    beams = client.completions.create(
        model=model.id, prompt="<|item|>", n=3, logprobs=1, extra_body={"use_beam_search": True}
    )
    draws = [client.completions.create(model=model.id, prompt="<|item|>", n=4, seed=5).choices for _ in range(2)]
    scores = [sum(choice.logprobs.token_logprobs) for choice in beams.choices]
    assert scores == sorted(scores, reverse=True)
    assert len({choice.text for choice in beams.choices}) == 3
    assert [choice.text for choice in draws[0]] == [choice.text for choice in draws[1]]
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4' is not served here"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.data}/v1", api_key="wrong", max_retries=0).models.list()


def test_weights_come_from_another_checkpoint_and_from_an_export(served: Served, stage: Path) -> None:
    steps = sorted((stage / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    export = stage.parent / "export"
    run(f"checkpoint={stage}", f"convert.output={export}", verb="convert")
    with served.client() as client, served.controller() as control:
        first = client.recommend([3, 5], n=6)
        assert control.update_weights(str(steps[0])).weight_version == first.weight_version + 1
        other = client.recommend([3, 5], n=6)
        control.update_weights(str(export))
        exported = client.recommend([3, 5], n=6)
        control.update_weights(str(stage))
        again = client.recommend([3, 5], n=6)
    assert other.items != first.items
    assert again.items == first.items
    assert exported.items == first.items
    versions = [reply.weight_version for reply in (first, other, exported, again)]
    assert versions == list(range(versions[0], versions[0] + 4))


def test_an_export_is_served_with_its_own_catalog(served: Served, stage: Path, tmp_path: Path) -> None:
    run(f"checkpoint={stage}", f"convert.output={tmp_path / 'hf'}", verb="convert")
    with served.client() as client:
        expected = client.recommend([3, 5], n=6)
    file, keys = tmp_path / "run" / "serve" / "address.json", f"serve.api_keys_file={stage.parent / 'keys'}"
    words = (f"checkpoint={tmp_path / 'hf'}", f"run_dir={tmp_path / 'run'}", keys)
    with process_of(file, *words) as other, other.client() as client:
        assert client.recommend([3, 5], n=6).items == expected.items


def test_sigterm_drains_and_ends_well(stage: Path) -> None:
    with process(stage) as served, served.client() as client:
        assert client.recommend([1]).items
        served.process.send_signal(signal.SIGTERM)
        code, out, err = served.end()
    assert code == 0, err
    assert json.loads(out.strip().splitlines()[-1])["served"] is True
    assert "SIGTERM: draining" in err
    assert '"history"' not in err  # nobody's history is in the log


def test_sigusr1_drains_and_asks_to_be_started_again(stage: Path) -> None:
    with process(stage) as served:
        served.process.send_signal(signal.SIGUSR1)
        code, _, err = served.end()
    assert code == 75, err


def test_a_port_that_is_taken_is_a_mistake_of_the_user(served: Served, stage: Path) -> None:
    port = served.data.rsplit(":", 1)[1]
    done = called(f"checkpoint={stage}", f"serve.port={port}", verb="serve", timeout=LIMIT)
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"serve.port={port}" in done.stderr


def is_ready(served: Served) -> bool:
    try:
        return httpx.get(f"{served.data}/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.full
@pytest.mark.distributed
def test_two_ranks_answer_as_generate_does_with_an_auxiliary_recommender(stage: Path, tmp_path: Path) -> None:
    """TP 2 and ``rollout.assist``: rank 0 alone asks the recommender, both ranks search with what it says."""
    root = load_recipe(stage.parent / "recipe.yaml").data.root
    words = [*SMALL, f"data.root={root}", f"run_dir={tmp_path}", "baseline.model=sasrec", "baseline.hidden=16"]
    run(*words, "baseline.epochs=2")
    assist = [f"rollout.assist.stage={tmp_path / 'sasrec'}", "rollout.assist.weight=0.3"]
    histories = [[item, item + 1] for item in range(4)]
    options = ["generate.n=6", f"checkpoint={stage}", *assist]
    with process(stage, "trainer.devices=2", "model.tensor_model_parallel_size=2", *assist) as pair:
        with pair.client() as client, ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda history: client.recommend(history, n=6), histories))
        pair.process.send_signal(signal.SIGTERM)
        assert pair.end()[0] == 0
    for history, reply in zip(histories, replies, strict=True):
        said = run(f"generate.history={history}", *options, verb="generate")["recommendations"][0]["items"]
        assert [item.title for item in reply.items] == [item["title"] for item in said]
        for item, other in zip(reply.items, said, strict=True):
            assert item.score == pytest.approx(other["score"], abs=SCORE_TOLERANCE)


@pytest.mark.distributed
def test_two_ranks_answer_as_one_does_and_end_together(served: Served, stage: Path) -> None:
    """TP 2: the same rankings, weights that both ranks load, and no reply from half a model."""
    asked = [{"history": [item, item + 1], "n": 4, "return_tokens": True} for item in range(4)]
    layout = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    with served.client() as client:
        expected = [client.recommend(**body) for body in asked]
    with process(stage, *layout) as pair, pair.client() as client, pair.controller() as control:
        assert client.ready().ranks == 2
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda body: client.recommend(**body), asked))
        for one, other in zip(expected, found, strict=True):
            assert_same_ranking(ranking(other), ranking(one), SCORE_TOLERANCE)
        control.update_weights(str(stage))
        again = client.recommend(**asked[0])
        assert again.weight_version == 2
        assert_same_ranking(ranking(again), ranking(expected[0]), SCORE_TOLERANCE)
        control.change_items(remove=[again.items[0].external_id])
        assert client.recommend(**asked[0]).items[0].item != again.items[0].item
        ranks = [child for child in psutil.Process(pair.process.pid).children() if "serve" in child.cmdline()]
        assert len(ranks) == 2
        leader = json.loads((stage.parent / "serve" / "address.json").read_text())["pid"]
        (other,) = [rank for rank in ranks if rank.pid != leader]
        other.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        while is_ready(pair):
            time.sleep(0.05)
        assert time.monotonic() - killed < 2, "still ready 2 s after a rank was killed"
        code, _, err = pair.end(90)
    assert code != 0
    assert "rank 1" in err
    assert "SIGKILL" in err


@pytest.mark.distributed
def test_two_ranks_drain_on_sigterm(stage: Path) -> None:
    with process(stage, "trainer.devices=2", "model.tensor_model_parallel_size=2") as pair, pair.client() as client:
        assert client.recommend([1]).items
        os.kill(pair.process.pid, signal.SIGTERM)
        code, _, err = pair.end(90)
    assert code == 0, err
