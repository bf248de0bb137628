"""The routes that operators and training jobs call, on a port and with a token of their own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from fastapi import FastAPI
from fastapi.responses import Response

from tawin_nemo import __version__
from tawin_nemo.api import control_schema as schema
from tawin_nemo.api.schema import ERRORS, Health
from tawin_nemo.serve.engine.catalog import NewItem, ServedCatalog, read_items
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.jobs import Rejected
from tawin_nemo.serve.engine.weight_sources import FromDisk
from tawin_nemo.serve.http.errors import ApiError, add_error_handlers, without_422
from tawin_nemo.serve.http.middleware import add_middleware
from tawin_nemo.serve.http.requests import Terms
from tawin_nemo.serve.http.weight_updates import WeightUpdates
from tawin_nemo.util.errors import CheckpointError


class ControlPlane:
    """Handlers run in worker threads and may wait. One change of the catalog is made at a time.

    ``roots``: folders that paths are confined to; ``leave(seconds)``: asks the process to drain and end.
    """

    def __init__(self, engine: Engine, terms: Terms, *, roots: Sequence[Path], leave: Callable[[float], None]) -> None:
        self.engine, self.terms = engine, terms
        self._roots, self._leave = [root.resolve() for root in roots], leave
        self.updates = WeightUpdates(engine)
        self._building = threading.Lock()
        self._candidates: dict[int, tuple[ServedCatalog, int]] = {}  # by version, with the version it was built on
        self._valid: set[int] = set()
        self._last_version = engine.catalog.version

    # -- weights and flow -----------------------------------------------------------------------------------------
    def update_weights_from_disk(self, body: schema.UpdateWeights) -> schema.Reply:
        path = self._confined(body.model_path)
        try:
            version = self.engine.update_weights(FromDisk(str(path)), body.weight_version)
        except CheckpointError as error:  # those in use stay
            raise ApiError(400, str(error), param="model_path", code="checkpoint_unusable") from error
        return self._reply(f"weights of {path.name} are version {version}")

    def init_weights_update_group(self, body: schema.InitGroup) -> schema.Reply:
        """Meet a training job in a process group of its own; returns when all ranks are there."""
        return self._reply(self.updates.init(body))

    def update_weights_from_distributed(self, body: schema.UpdateFromDistributed) -> schema.Reply:
        """Receive all weights through the group, check them, and use them for requests that come from then on."""
        return self._reply(f"weights of {body.group_name} are version {self.updates.update(body)}")

    def destroy_weights_update_group(self, body: schema.DestroyGroup) -> schema.Reply:
        return self._reply(self.updates.destroy(body))

    def pause_generation(self, body: schema.Pause) -> schema.Reply:
        self.engine.close("paused")
        given_up = self.engine.abort() if body.abort else 0
        self.engine.wait_idle(body.wait_s)
        return self._reply(f"paused; {self.engine.busy} requests still run, {given_up} were given up")

    def continue_generation(self, body: schema.Nothing) -> schema.Reply:
        self.engine.open()
        return self._reply("serving")

    def flush_cache(self, body: schema.Nothing) -> schema.Reply:
        """Give memory that nobody uses back. No answer is ever taken from a cache: nothing else is to be flushed."""

        def collect() -> None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

        self.engine.call(collect).result()
        return self._reply("memory that was not in use was given back")

    def drain(self, body: schema.Pause) -> schema.Reply:
        self.engine.close("draining")
        if body.abort:
            self.engine.abort()
        idle = self.engine.wait_idle(body.wait_s)
        return self._reply("idle" if idle else f"{self.engine.busy} requests still run")

    def shutdown(self, body: schema.Pause) -> schema.Reply:
        self.engine.close("draining")
        if body.abort:
            self.engine.abort()
        self._leave(body.wait_s)
        return self._reply("the server ends when its requests have ended")

    # -- catalog ------------------------------------------------------------------------------------------------
    def build(self, body: schema.Build) -> schema.CatalogReply:
        """Make a candidate beside the catalog in use."""
        if body.path is not None and (body.add or body.remove):
            raise ApiError(400, "path is a whole catalog; it does not go with add and remove", param="path")
        with self._building, _no_collection():
            return self._shown(self._built(body))

    def validate(self, body: schema.Candidate) -> schema.CatalogReply:
        with self._building, _no_collection():
            version = self._candidate(body.catalog_version).version
            self._validated(version)
            return self._shown(version)

    def activate(self, body: schema.Candidate) -> schema.CatalogReply:
        """Requests that come from now on get the candidate; those that are here keep theirs."""
        with self._building:
            version = body.catalog_version
            self._candidate(version)
            if version not in self._valid:
                raise ApiError(409, f"candidate {version} was not validated; POST /catalog/validate first")
            return self._activated(version)

    def items(self, body: schema.Change) -> schema.CatalogReply:
        """Add and remove items live: build, validate and activate in one."""
        with self._building, _no_collection():
            version = self._built(schema.Build(add=body.add, remove=body.remove))
            try:
                self._validated(version)
                return self._activated(version)
            finally:
                self._candidates.pop(version, None)

    def _built(self, body: schema.Build) -> int:
        here = self.engine.catalog
        version = self._last_version + 1
        if body.path is not None:
            made = here.replaced(read_items(self._confined(body.path)), version)
        else:
            added = [NewItem(item.external_id, item.title, tuple(item.codes)) for item in body.add]
            made = here.changed(added, body.remove, version)
        self._last_version = version
        self._candidates = {version: (made, here.version)}  # an older candidate gives way: each holds a whole trie
        return version

    def _validated(self, version: int) -> None:
        candidate = self._candidate(version)
        candidate.validate(vocab=self.terms.vocab, positions=self.terms.positions)
        candidate.warm()
        self._valid = {version}

    def _activated(self, version: int) -> schema.CatalogReply:
        candidate, base = self._candidates[version]
        if base != self.engine.catalog.version:
            raise ApiError(409, f"candidate {version} was built on {base}; {self.engine.catalog.version} is in use now")
        self.engine.activate(candidate)
        reply = self._shown(version)
        del self._candidates[version]
        return reply

    def _candidate(self, version: int) -> ServedCatalog:
        if version not in self._candidates:
            raise ApiError(404, f"there is no candidate {version}; there are {sorted(self._candidates)}")
        return self._candidates[version][0]

    def _shown(self, version: int) -> schema.CatalogReply:
        made = self._candidates[version][0]
        return schema.CatalogReply(
            candidate=version, items=made.trie.num_items, paths=made.trie.num_leaves, fingerprint=made.fingerprint,
            validated=version in self._valid, weight_version=self.engine.weights,
            catalog_version=self.engine.catalog.version,
        )  # fmt: skip

    # -- what is there ----------------------------------------------------------------------------------------------
    def status(self) -> schema.StatusReply:
        replica = self.engine.leader.replica
        return schema.StatusReply(
            state=self.engine.closed or "serving", requests=self.engine.busy, candidates=sorted(self._candidates),
            weights_in_memory=sorted(replica.models), catalogs_in_memory=sorted(replica.tries),
            weight_version=self.engine.weights, catalog_version=self.engine.catalog.version,
            weight_update_group=self.updates.group_name,
        )  # fmt: skip

    def health(self) -> Health:
        return Health(status="alive")

    def metrics(self) -> Response:
        return Response(self.engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _reply(self, message: str) -> schema.Reply:
        return schema.Reply(
            message=message, weight_version=self.engine.weights, catalog_version=self.engine.catalog.version
        )

    def _confined(self, name: str) -> Path:
        """The path without links and dots. Raises ApiError when it is not below one of the roots or not there."""
        if "\0" in name:
            raise ApiError(400, "a path has no zero bytes", param="path")
        path = Path(name).resolve()
        if not any(path.is_relative_to(root) for root in self._roots):
            raise ApiError(403, "the path is not below serve.roots", param="path", code="path_not_allowed")
        if not path.exists():
            raise ApiError(404, "the path does not exist", param="path")
        return path


@contextmanager
def _no_collection() -> Iterator[None]:
    """A million new items would be looked through for garbage again and again, while every request waits."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def control_app(plane: ControlPlane | None, *, token: str = "") -> FastAPI:
    """The control plane's application; without a plane only its OpenAPI document can be had."""
    app = FastAPI(
        title="tawin_nemo control plane", version=__version__, docs_url=None, redoc_url=None,
        description="Weights, catalog and life of a server. Not for users: it has a port and a token of its own.",
    )  # fmt: skip
    routes = plane if plane is not None else ControlPlane.__new__(ControlPlane)
    errors = {**ERRORS, 403: {**ERRORS[404], "description": "a path outside of serve.roots"}}
    names = (
        "update_weights_from_disk", "init_weights_update_group", "update_weights_from_distributed",
        "destroy_weights_update_group", "pause_generation", "continue_generation", "flush_cache", "drain", "shutdown",
    )  # fmt: skip
    for name in names:
        app.add_api_route(f"/{name}", getattr(routes, name), methods=["POST"], responses=errors)
    for name in ("build", "validate", "activate", "items"):
        handler = getattr(routes, name)
        app.add_api_route(f"/catalog/{name}", handler, methods=["POST"], responses=errors)
        app.add_api_route(
            f"/catalogue/{name}", handler, methods=["POST"], response_model=schema.DeprecatedCatalogReply,
            deprecated=True, include_in_schema=False,
        )  # fmt: skip
    for name in ("status", "health"):
        app.add_api_route(f"/{name}", getattr(routes, name), methods=["GET"], responses=errors)
    app.add_api_route("/metrics", routes.metrics, methods=["GET"], responses=errors, response_class=Response)
    add_error_handlers(app)
    app.openapi = without_422(app.openapi)  # type: ignore[method-assign]
    if plane is not None:
        if not token:
            raise Rejected("invalid", "the control plane needs a token")
        settings = plane.terms.settings
        add_middleware(
            app, plane="control", metrics=plane.engine.metrics, keys=[token], open_paths=("/health",),
            max_body_bytes=64 * 1024 * settings.max_body_kb, read_timeout_s=settings.read_timeout_s,
        )  # fmt: skip
    return app
