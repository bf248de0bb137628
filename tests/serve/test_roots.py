"""Control requests whose paths, catalogs and weights are hostile or broken: 4xx, and nothing changes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from tawin_nemo.api.control_schema import ItemToAdd, UpdateFromDistributed
from tawin_nemo.commands.serve import checker, finite, loader
from tawin_nemo.config.schema import Recipe, ServeConfig
from tawin_nemo.rollout.lm import MeteredLM
from tawin_nemo.serve.http.errors import ApiError
from tawin_nemo.serve.http.weight_updates import WeightUpdates
from tawin_nemo.util.errors import CheckpointError, TawinError
from tawin_nemo.util.trusted import OutsideRoots, read_text
from tests.models.megatron.checkpoint.checkpoint_scene import SHAPE
from tests.planted import pickled
from tests.serve.scene import IDS, TENSORS, TITLES, TOKEN, Scene, serving


def controller(scene: Scene) -> httpx.Client:
    return httpx.Client(base_url=scene.control, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)


def lines(*items: Any) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


GOOD = {"external_id": IDS[0], "title": TITLES[0]}
CATALOGS: dict[str, str | bytes] = {
    "a list": lines([1, 2]),
    "an index": lines({"0": ["<a_1>"]}),
    "a number": lines(1),
    "nothing": "",
    "null": lines(None),
    "a whole list of items": json.dumps([GOOD]),
    "ids of another kind": lines({**GOOD, "external_id": 3}),
    "a title that is a list": lines({**GOOD, "title": ["a"]}),
    "codes that are a text": lines({**GOOD, "codes": "<a_1>"}),
    "codes that are numbers": lines({**GOOD, "codes": [1]}),
    "codes that are nothing": lines({**GOOD, "codes": None}),
    "deep": "[" * 100_000,
    "two items of one name": lines(GOOD, GOOD),
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", CATALOGS)
def test_a_catalog_in_another_shape_is_refused_and_the_old_one_serves(tmp_path: Path, name: str) -> None:
    content = CATALOGS[name]
    (tmp_path / "items.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with serving(roots=[tmp_path]) as scene, controller(scene) as http:
        reply = http.post("/catalog/build", json={"path": str(tmp_path / "items.jsonl")})
        assert reply.status_code == 400, reply.text
        assert scene.engine.catalog.version == 1
        assert len(scene.client().recommend([1], n=5).items) == 5


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _circle(path: Path) -> None:
    path.symlink_to(path)


def _link_out(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _pickle(path: Path) -> None:
    path.write_bytes(pickled(path.with_name("marker")))


@pytest.mark.parametrize("make", [_pipe, _circle, _link_out, _pickle, Path.mkdir])
@pytest.mark.parametrize("route", ["/catalog/build", "/update_weights_from_disk"])
def test_what_is_no_file_of_the_roots_is_refused(tmp_path: Path, make: Callable[[Path], None], route: str) -> None:
    make(tmp_path / "odd")
    field = "path" if "build" in route else "model_path"
    with serving(roots=[tmp_path]) as scene, controller(scene) as http:
        if make is _pipe and field == "model_path":
            return  # the scene's weights are a file that its own reader opens; see the loader below
        reply = http.post(route, json={field: str(tmp_path / "odd")})
        assert 400 <= reply.status_code < 500 or (make is Path.mkdir and field == "model_path"), reply.text
        assert (scene.engine.weights, scene.engine.catalog.version) == (1, 1)
        assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "path", ["n" * 500, "a\0b", "/" + "x/" * 200, "~", ".", "\udcff".encode("utf-8", "replace").decode()]
)
def test_odd_paths_are_answered_with_4xx(tmp_path: Path, path: str) -> None:
    with serving(roots=[tmp_path]) as scene, controller(scene) as http:
        for route, field in (("/catalog/build", "path"), ("/update_weights_from_disk", "model_path")):
            reply = http.post(route, json={field: path})
            assert 400 <= reply.status_code < 500, reply.text
            assert scene.engine.weights == 1


def test_a_version_is_a_number_that_can_be_counted_on(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("3")
    with serving(roots=[tmp_path]) as scene, controller(scene) as http:
        for version in (10**30, 2**53, 0, -1, 1.5, True, "2"):
            body = {"model_path": str(tmp_path / "w"), "weight_version": version}
            assert http.post("/update_weights_from_disk", json=body).status_code == 400
        assert scene.engine.weights == 1


# -- weights ---------------------------------------------------------------------------------------------------------
def test_weights_that_are_not_finite_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    lm: Any = MeteredLM(SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert finite(lm, "these") is lm
    with torch.no_grad():
        model.weight[0, 1] = torch.nan
    with pytest.raises(CheckpointError, match="these: weight holds values that are not finite"):
        finite(lm, "these")


def test_received_weights_that_are_not_finite_are_refused_before_any_rank_has_them(tmp_path: Path) -> None:
    class Group:
        name = "g"

        def receive(self, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
            return {name: torch.full(size, torch.nan if name == "ones" else 1.0) for name, size in sizes.items()}

    names = [name for row in TENSORS for name in row]
    shapes = [list(size) for row in TENSORS for size in row.values()]
    with serving(roots=[tmp_path]) as scene:
        updates = WeightUpdates(scene.engine)
        updates._group = Group()  # type: ignore[assignment]
        body = UpdateFromDistributed(names=names, dtypes=["float32"] * len(names), shapes=shapes, group_name="g")
        with pytest.raises(ApiError, match="ones: not all values are finite") as refused:
            updates.update(body)
        assert (refused.value.status, refused.value.code) == (400, "not_finite")
        assert scene.engine.weights == 1
        assert sorted(scene.engine.leader.replica.models) == [1]


def _world(run_dir: Path) -> Any:
    return SimpleNamespace(recipe=Recipe(serve=ServeConfig()), run_dir=run_dir)


@pytest.mark.parametrize(
    "error", [TypeError("list indices must be integers"), KeyError("x"), RuntimeError("odd"), RecursionError("deep")]
)
def test_files_in_any_shape_are_a_checkpoint_error(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("tawin_nemo.commands.serve.engine_of", fails)
    monkeypatch.setattr("tawin_nemo.commands.serve.replace", lambda world, **_: world)
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'w'} cannot be loaded"):
        loader(_world(tmp_path))(str(tmp_path / "w"))


def test_files_of_weights_are_opened_below_the_roots_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").symlink_to("/etc/passwd")

    def reads(*_: Any) -> Any:
        return read_text(tmp_path / "run" / "state.json")

    monkeypatch.setattr("tawin_nemo.commands.serve.engine_of", reads)
    monkeypatch.setattr("tawin_nemo.commands.serve.replace", lambda world, **_: world)
    with pytest.raises(OutsideRoots):
        loader(_world(tmp_path / "run"))(str(tmp_path / "run"))


def test_a_fault_of_a_command_is_answered_and_logged_with_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(roots=[tmp_path]) as scene, controller(scene) as http:

        def fails(*_: Any, **__: Any) -> Iterable[Any]:
            raise ZeroDivisionError("a fault of the server")

        monkeypatch.setattr(scene.engine, "activate", fails)
        body = {"add": [ItemToAdd(external_id="N1", title="new lamp").model_dump()]}
        with caplog.at_level(logging.ERROR):
            reply = http.post("/catalog/items", json=body, headers={"X-Request-Id": "4" * 32})
        assert reply.status_code == 500
        assert reply.headers["connection"] == "close"  # the server closes it: a client must not send into it
        assert f"request {reply.headers['x-request-id']} failed" in caplog.text
        assert "ZeroDivisionError" in caplog.text
        monkeypatch.undo()
        assert scene.engine.catalog.version == 1
        assert http.post("/catalog/items", json=body).status_code == 200


ODD_FILES: dict[str, dict[str, str]] = {
    "done is a list": {"done.json": "[1, 2]"},
    "done names no step": {"done.json": "{}"},
    "done names a path": {"done.json": '{"chosen_step": "../../x"}'},
    "done is deep": {"done.json": "[" * 100_000},
    "state is a list": {"state.json": "[]"},
    "state is a text": {"state.json": '"a"'},
    "state has no checksum": {"state.json": "{}"},
    "state is no text": {"state.json": "\udcff"},
    "index is a list": {"config.json": "{}", "model.safetensors.index.json": "[1]"},
    "index has a list": {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": [1]}'},
    "index has numbers": {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": 5}}'},
    "index leads out": {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "../b"}}'},
    "index is semantic IDs": {"config.json": "{}", "model.safetensors.index.json": '{"0": ["<a_1>"]}'},
    "weights are text": {"config.json": "{}", "model.safetensors": "text"},
    "nothing": {},
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_folder_in_another_shape_is_refused_before_any_rank_loads(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for file, content in ODD_FILES[name].items():
        (folder / file).write_text(content, encoding="utf-8", errors="surrogateescape")
    world: Any = SimpleNamespace(
        recipe=Recipe(), run_dir=tmp_path, shape=SHAPE, tokenizer=SimpleNamespace(fingerprint="f")
    )
    with pytest.raises(TawinError, match=str(folder)):
        checker(world)(str(folder))
