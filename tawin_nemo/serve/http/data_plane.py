"""The routes that users call."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from tawin_nemo import __version__
from tawin_nemo.api import schema
from tawin_nemo.api.arrays import MEDIA_TYPE
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.jobs import Done, Rejected
from tawin_nemo.serve.engine.telemetry import write_event
from tawin_nemo.serve.http import replies, requests, rollouts
from tawin_nemo.serve.http.errors import ApiError, add_error_handlers, without_422
from tawin_nemo.serve.http.middleware import add_middleware
from tawin_nemo.serve.http.playground import playground
from tawin_nemo.serve.http.requests import Asked, Terms

#: Reachable without a key: they say nothing about users.
OPEN_PATHS = ("/", "/health", "/ready")


class DataPlane:
    """The routes' handlers; they wait for the engine and compute nothing themselves that takes long."""

    def __init__(self, engine: Engine, terms: Terms) -> None:
        self.engine, self.terms = engine, terms
        self._created = int(time.time())

    async def recommendations(self, body: schema.RecommendationRequest, request: Request) -> Response:
        end, wanted = time.monotonic() + (body.timeout_s or math.inf), body
        while True:
            ask = partial(requests.recommendation, wanted, terms=self.terms)
            asked, done = await self._answered(request, ask)
            again = requests.wider(wanted, asked, done, self.terms)
            if again is None:
                break
            wanted = again.model_copy(update={"timeout_s": max(1e-3, min(end, asked.job.deadline) - time.monotonic())})
        self._remember(request, body)
        penalised = self.terms.length_penalty != 0
        return _as_json(replies.recommendation(body, asked, done, request.state.request_id, penalised=penalised))

    async def score(self, body: schema.ScoreRequest, request: Request) -> Response:
        asked, done = await self._answered(request, lambda here: requests.score(body, here, self.terms))
        self._remember(request, body)
        return _as_json(replies.score(asked, done, request.state.request_id))

    async def completions(self, body: schema.CompletionRequest, request: Request) -> Response:
        asked, done = await self._answered(request, lambda here: requests.completion(body, here, self.terms))
        self._remember(request, body)
        return _as_json(replies.completion(body, asked, done, f"cmpl-{request.state.request_id}"))

    async def rollouts(self, body: schema.RolloutRequest, request: Request) -> Response:
        """Candidates of a batch of token prompts, best first, as a safetensors file: items, lengths and scores [B, W],
        tokens and logprobs [B, W, T]; its metadata hold instance, catalog, weight_version, catalog_version."""
        asked, done = await self._answered(request, lambda here: rollouts.asked(body, here, self.terms))
        data = await run_in_threadpool(rollouts.reply, asked, done, self.terms)
        return Response(data, media_type=MEDIA_TYPE)

    def rollout_terms(self) -> schema.RolloutTerms:
        return rollouts.terms_of(self.engine, self.terms)

    def items(
        self,
        q: Annotated[str, Query(max_length=200, description="part of a title, in any case; empty: all items")] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    ) -> schema.ItemsReply:
        here = self.engine.catalog
        key = q.casefold()
        places = [place for place, title in enumerate(here.search_keys) if key in title]
        shown = [int(here.number_J[place]) for place in places[offset : offset + limit]]
        return schema.ItemsReply(
            items=[schema.Item(item=i, external_id=here.external_ids[i], title=here.titles[i]) for i in shown],
            total=len(places), weight_version=self.engine.weights, catalog_version=here.version,
        )  # fmt: skip

    def models(self) -> schema.ModelsReply:
        here, weights = self.engine.catalog, self.engine.weights
        card = schema.ModelCard(
            id=self.terms.model_id, created=self._created, catalog=here.fingerprint, items=here.trie.num_items,
            weight_version=weights, catalog_version=here.version,
        )  # fmt: skip
        return schema.ModelsReply(data=[card], weight_version=weights, catalog_version=here.version)

    async def health(self) -> schema.Health:
        return schema.Health(status="alive")

    async def ready(self) -> schema.Ready:
        if self.engine.closed:
            raise ApiError(503, f"the server is {self.engine.closed}", reason=self.engine.closed, retry_after=1)
        try:
            async with asyncio.timeout(self.terms.settings.probe_s):
                await asyncio.wrap_future(self.engine.probe())
        except Exception as error:  # whatever it is, this server cannot answer now
            text = f"the engine does not answer ({type(error).__name__})"
            raise ApiError(503, text, reason="fault", retry_after=1) from error
        return schema.Ready(
            status="ready", ranks=self.engine.leader.ranks.size,
            weight_version=self.engine.weights, catalog_version=self.engine.catalog.version,
        )  # fmt: skip

    async def metrics(self) -> Response:
        return Response(self.engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _answered(self, request: Request, make: Callable[[ServedCatalog], Asked]) -> tuple[Asked, Done]:
        """Enqueue and wait, until the answer, the deadline or the client's leave, whichever is first."""
        if self.engine.closed:
            raise ApiError.of(Rejected(self.engine.closed, f"the server is {self.engine.closed}; try again later"))
        asked = await self._submitted(make)
        job, future = asked.job, asyncio.wrap_future(asked.job.future)
        future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # it may come too late
        try:
            outcome = await _first_of(future, request, job.deadline - time.monotonic())
        finally:
            if not future.done():
                self.engine.cancel(job)
        if outcome == "disconnected":
            raise ApiError(499, "the client is gone", reason="disconnected")
        if outcome == "deadline":
            raise ApiError(504, "the deadline passed; the work was given up", reason="deadline", code="deadline")
        done = future.result()
        request.state.log_fields.update(
            width=job.width, draws=job.draws, prompts=len(job.prompts), tokens=len(job.prompts.flat),
            queue_ms=round(1000 * done.queue_s, 2), run_ms=round(1000 * done.run_s, 2),
            weight_version=done.weight_version, catalog_version=done.catalog_version,
        )  # fmt: skip
        return asked, done

    async def _submitted(self, make: Callable[[ServedCatalog], Asked]) -> Asked:
        while True:
            asked = await run_in_threadpool(make, self.engine.catalog)
            try:
                self.engine.submit(asked.job)
            except Rejected as rejected:
                if rejected.reason == "stale_catalog":  # replaced in between: read the request once more
                    continue
                raise
            return asked

    def _remember(self, request: Request, body: schema.Strict) -> None:
        if self.terms.settings.log_history:
            write_event("history", id=request.state.request_id, body=body.model_dump())


async def _first_of(work: asyncio.Future[Any], request: Request, seconds: float) -> str:
    """Wait for the first of: the work is ``done``, the client has ``disconnected``, the ``deadline`` has passed."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({work, gone}, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        return "done" if work.done() else "disconnected" if gone.done() else "deadline"
    finally:
        gone.cancel()


def _as_json(reply: BaseModel) -> Response:
    """Replies are checked as they are made: FastAPI would check them once more."""
    return Response(reply.model_dump_json(), media_type="application/json")


def data_app(plane: DataPlane | None, *, keys: Collection[str] = ()) -> FastAPI:
    """The data plane's application; without a plane only its OpenAPI document can be had."""
    app = FastAPI(
        title="tawin_nemo", version=__version__, docs_url=None, redoc_url=None,
        description="Recommendations by trie-constrained generation: every answer is a catalog item.",
    )  # fmt: skip
    routes = plane if plane is not None else DataPlane.__new__(DataPlane)
    post, get = {"methods": ["POST"], "responses": schema.ERRORS}, {"methods": ["GET"], "responses": schema.ERRORS}
    for path, handler, reply in (
        ("/v1/recommendations", routes.recommendations, schema.RecommendationReply),
        ("/v1/completions", routes.completions, schema.CompletionReply),
        ("/v1/score", routes.score, schema.ScoreReply),
    ):
        app.add_api_route(path, handler, response_model=reply, **post)  # type: ignore[arg-type]
    arrays = {**schema.ERRORS, 200: {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}}
    app.add_api_route("/v1/rollouts", routes.rollouts, methods=["POST"], response_class=Response, responses=arrays)
    app.add_api_route("/v1/rollouts", routes.rollout_terms, **get)  # type: ignore[arg-type]
    app.add_api_route("/v1/items/search", routes.items, **get)  # type: ignore[arg-type]
    app.add_api_route("/v1/models", routes.models, **get)  # type: ignore[arg-type]
    app.add_api_route("/health", routes.health, **get)  # type: ignore[arg-type]
    app.add_api_route("/ready", routes.ready, **get)  # type: ignore[arg-type]
    app.add_api_route("/metrics", routes.metrics, response_class=Response, **get)  # type: ignore[arg-type]
    app.add_api_route("/", playground, include_in_schema=False)
    add_error_handlers(app)
    app.openapi = without_422(app.openapi)  # type: ignore[method-assign]
    if plane is not None:
        settings = plane.terms.settings
        add_middleware(
            app, plane="data", metrics=plane.engine.metrics, keys=keys, open_paths=OPEN_PATHS,
            max_body_bytes=1024 * settings.max_body_kb, read_timeout_s=settings.read_timeout_s,
            cors_origins=settings.cors_origins,
        )  # fmt: skip
    return app
