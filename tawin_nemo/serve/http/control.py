"""The routes for operators and training jobs: weights, catalog, pause and shutdown; separate port and token."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from fastapi import FastAPI
from fastapi.responses import Response

from tawin_nemo import __version__
from tawin_nemo.api import control_schema as schema
from tawin_nemo.api.schema import ERRORS, Health
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.jobs import Rejected
from tawin_nemo.serve.engine.saved_changes import SavedChanges
from tawin_nemo.serve.engine.weight_sources import FromDisk
from tawin_nemo.serve.http.catalog_changes import CatalogChanges
from tawin_nemo.serve.http.errors import ApiError, add_error_handlers, without_422
from tawin_nemo.serve.http.middleware import add_middleware
from tawin_nemo.serve.http.paths import allowed_path
from tawin_nemo.serve.http.requests import ServerContext
from tawin_nemo.serve.http.weight_updates import WeightUpdates
from tawin_nemo.util.errors import CheckpointError


class ControlPlane:
    """The handlers of the control plane's routes. They run in worker threads and may block.

    ``roots``: folders that all paths in requests must lie in; ``drain(seconds)``: makes the process finish its
    requests within so many seconds and end. ``saved``: where changes of the catalog are kept for a restart.
    """

    def __init__(
        self, engine: Engine, context: ServerContext, *, roots: Sequence[Path], saved: SavedChanges,
        drain: Callable[[float], None],
    ) -> None:  # fmt: skip
        self.engine, self.context = engine, context
        self._roots, self._drain = [root.resolve() for root in roots], drain
        self.followed: Callable[[], str | None] = lambda: None  # set by a server that follows published versions
        self.refused: Callable[[], str | None] = lambda: None
        self.updates = WeightUpdates(engine)
        self.changes = CatalogChanges(engine, context, roots=self._roots, saved=saved)

    # -- weights and requests -----------------------------------------------------------------------------------------
    def update_weights_from_disk(self, body: schema.UpdateWeights) -> schema.Reply:
        """Load weights from disk beside those in use and activate them for new requests.

        With several ranks the engine answers no requests while all ranks load. If loading fails (400) the current
        weights stay active.
        """
        self._check_not_following()
        path = allowed_path(self._roots, body.model_path, "model_path")
        try:
            version = self.engine.update_weights(FromDisk(str(path)), body.weight_version)
        except CheckpointError as error:  # the current weights stay active
            raise ApiError(400, str(error), param="model_path", code="checkpoint_unusable") from error
        return self._reply(f"weights of {path.name} are active as version {version}")

    def rollback(self, body: schema.Nothing) -> schema.Reply:
        """Go back to the weights and the catalog that were in use before the last change, for new requests.

        `serve.keep_versions` says how many changes can be taken back; 409 where none is left. The version that is left
        is forgotten, its number is not given again.
        """
        try:
            left = self.changes.rollback()
        except Rejected as error:
            raise ApiError(409, str(error), code="no_version_before") from error
        return self._reply(f"back from {left}")

    def init_weights_update_group(self, body: schema.InitGroup) -> schema.Reply:
        """Join a process group with a training job; returns when all ranks have joined."""
        self._check_not_following()
        return self._reply(self.updates.init(body))

    def update_weights_from_distributed(self, body: schema.UpdateFromDistributed) -> schema.Reply:
        """Receive all weights by broadcast from rank 0 of the process group and activate them for new requests.

        Names, shapes and dtypes are checked before the transfer. If it fails (503) the current weights stay active.
        """
        return self._reply(f"weights of {body.group_name} are active as version {self.updates.update(body)}")

    def destroy_weights_update_group(self, body: schema.DestroyGroup) -> schema.Reply:
        """Leave the process group; the weights that came through it stay active."""
        return self._reply(self.updates.destroy(body))

    def pause_generation(self, body: schema.Pause) -> schema.Reply:
        """Reject new requests with 503 until `continue_generation`; wait for running requests, or abort them."""
        self.engine.close("paused")
        aborted = self.engine.abort() if body.abort else 0
        self.engine.wait_idle(body.wait_s)
        return self._reply(f"paused; {self.engine.busy} requests still run, {aborted} were aborted")

    def continue_generation(self, body: schema.Nothing) -> schema.Reply:
        """Accept requests again after a pause; 503 while the server drains."""
        self.engine.open()
        return self._reply("serving")

    def flush_cache(self, body: schema.Nothing) -> schema.Reply:
        """Release unused memory to the system. The server keeps no cache of results, so nothing else is flushed."""

        def collect() -> None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

        self.engine.call(collect).result()
        return self._reply("unused memory was released")

    def drain(self, body: schema.Pause) -> schema.Reply:
        """Reject new requests for good and wait up to `wait_s` seconds for running ones; the process stays alive."""
        self.engine.close("draining")
        if body.abort:
            self.engine.abort()
        idle = self.engine.wait_idle(body.wait_s)
        return self._reply("idle" if idle else f"{self.engine.busy} requests still run")

    def shutdown(self, body: schema.Pause) -> schema.Reply:
        """Drain the server and end the process after at most `wait_s` seconds; returns at once."""
        self.engine.close("draining")
        if body.abort:
            self.engine.abort()
        self._drain(body.wait_s)
        return self._reply("the server ends when its requests are finished")

    # -- catalog ------------------------------------------------------------------------------------------------
    def build(self, body: schema.Build) -> schema.CatalogReply:
        """Build a candidate catalog beside the active one, from a file or from added and removed items."""
        return self.changes.build(body)

    def validate(self, body: schema.Candidate) -> schema.CatalogReply:
        """Check that the model can generate every item of a candidate catalog, and prepare the candidate for use."""
        return self.changes.validate(body.catalog_version)

    def activate(self, body: schema.Candidate) -> schema.CatalogReply:
        """Activate a validated candidate for new requests; running requests keep the catalog that they started with."""
        return self.changes.activate(body.catalog_version)

    def items(self, body: schema.Change) -> schema.CatalogReply:
        """Add and remove items of the active catalog: build, validate and activate in one call."""
        return self.changes.change(body)

    # -- status ----------------------------------------------------------------------------------------------
    def status(self) -> schema.StatusReply:
        """Report the server's state, its number of requests, and the versions in use and in memory."""
        replica = self.engine.leader.replica
        return schema.StatusReply(
            state=self.engine.closed or "serving", requests=self.engine.busy, candidates=self.changes.candidates,
            weights_in_memory=sorted(replica.models), catalogs_in_memory=sorted(replica.tries),
            weight_version=self.engine.weights, catalog_version=self.engine.catalog.version,
            weight_update_group=self.updates.group_name,
            followed_version=self.followed(), refused_version=self.refused(),
        )  # fmt: skip

    def health(self) -> Health:
        """Liveness: the HTTP server answers. Needs no token."""
        return Health(status="alive")

    def metrics(self) -> Response:
        """Metrics of the server in Prometheus' text format, the same as on the data plane."""
        return Response(self.engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _check_not_following(self) -> None:
        """Raises ApiError for weights from elsewhere: a followed version's vocabulary may not be theirs."""
        if root := self.context.settings.follow:
            text = f"this server follows {root}/latest (serve.follow); publish weights there instead"
            raise ApiError(409, text, code="server_follows")

    def _reply(self, message: str) -> schema.Reply:
        return schema.Reply(
            message=message, weight_version=self.engine.weights, catalog_version=self.engine.catalog.version
        )


def control_app(plane: ControlPlane | None, *, token: str = "") -> FastAPI:
    """The control plane as an ASGI application with all middleware; ``token``: the bearer key that it requires.

    Without a plane the application has no middleware and serves only to write its OpenAPI document. Raises Rejected
    for a plane without a token.
    """
    app = FastAPI(
        title="tawin_nemo control plane", version=__version__, docs_url=None, redoc_url=None,
        description="Weights, catalog and shutdown of a server. Not for users: separate port and token.",
    )  # fmt: skip
    routes = plane if plane is not None else ControlPlane.__new__(ControlPlane)
    errors = {**ERRORS, 403: {**ERRORS[404], "description": "the path is outside of serve.roots"}}
    names = (
        "update_weights_from_disk", "rollback", "init_weights_update_group", "update_weights_from_distributed",
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
        settings = plane.context.settings
        add_middleware(
            app, plane="control", metrics=plane.engine.metrics, keys=[token], open_paths=("/health",),
            max_body_bytes=64 * 1024 * settings.max_body_kb, read_timeout_s=settings.read_timeout_s,
        )  # fmt: skip
    return app
