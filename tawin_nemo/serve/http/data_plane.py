"""The routes for users and training jobs, and the playground page at ``/``. J: items of the catalog's trie."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import re
import time
from collections.abc import Callable, Collection
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from tawin_nemo import __version__
from tawin_nemo.api import schema
from tawin_nemo.api.arrays import MEDIA_TYPE
from tawin_nemo.serve.engine.catalog import ServedCatalog
from tawin_nemo.serve.engine.engine import Engine
from tawin_nemo.serve.engine.jobs import JobResult, Rejected
from tawin_nemo.serve.engine.telemetry import write_event
from tawin_nemo.serve.http import replies, requests
from tawin_nemo.serve.http.errors import ApiError, add_error_handlers, without_422
from tawin_nemo.serve.http.middleware import add_middleware
from tawin_nemo.serve.http.requests import ParsedRequest, ServerContext

#: Paths that need no key: they reveal nothing about users.
OPEN_PATHS = ("/", "/health", "/ready")
PLAYGROUND = Path(__file__).with_name("playground.html")


class DataPlane:
    """The handlers of the data plane's routes. Model work runs in the engine, parsing in worker threads."""

    def __init__(self, engine: Engine, context: ServerContext) -> None:
        self.engine, self.context = engine, context
        self._created = int(time.time())

    async def recommendations(self, body: schema.RecommendationRequest, request: Request) -> Response:
        """Return the n best catalog items for a history of items or a raw prompt, best first.

        `allow`, `deny` and `filter` restrict the search itself, so that the result is the best of the allowed items.
        With `exact` the search is repeated with twice the beams until the ranking is proven, up to the server's limit.
        """
        end, current = time.monotonic() + (body.timeout_s or math.inf), body
        while True:
            parse = partial(requests.parse_recommendation, current, context=self.context)
            parsed, result = await self._run(request, parse)
            wider = requests.widened(current, parsed, result, self.context)
            if wider is None:
                break
            seconds = max(1e-3, min(end, parsed.job.deadline) - time.monotonic())
            current = wider.model_copy(update={"timeout_s": seconds})
        self._log_history(request, body)
        penalised = self.context.length_penalty != 0
        name = request.state.request_id
        return _json_response(replies.recommendation(body, parsed, result, name, penalised=penalised))

    async def score(self, body: schema.ScoreRequest, request: Request) -> Response:
        """Return the log-probability of each listed item, in the order of the request."""
        parse = partial(requests.parse_score, body, context=self.context)
        parsed, result = await self._run(request, parse)
        self._log_history(request, body)
        return _json_response(replies.score(parsed, result, request.state.request_id))

    async def completions(self, body: schema.CompletionRequest, request: Request) -> Response:
        """Complete prompts with whole catalog items, in the format of OpenAI's completions API.

        `use_beam_search` returns the n best items of each prompt; otherwise n items are drawn independently, and the
        same `seed` gives the same draws.
        """
        parse = partial(requests.parse_completion, body, context=self.context)
        parsed, result = await self._run(request, parse)
        self._log_history(request, body)
        return _json_response(replies.completion(body, parsed, result, f"cmpl-{request.state.request_id}"))

    async def rollouts(self, body: schema.RolloutRequest, request: Request) -> Response:
        """Return the candidates of a batch of B token prompts, best first, as a safetensors file.

        Arrays: `items`, `lengths` and `scores` of shape [B, W], `tokens` and `logprobs` of shape [B, W, T], for W
        candidates of up to T tokens. Metadata: `instance`, `catalog`, `weight_version`, `catalog_version`.
        """
        parse = partial(requests.parse_rollout, body, context=self.context)
        parsed, result = await self._run(request, parse)
        data = await run_in_threadpool(replies.rollout, parsed, result, self.context)
        return Response(data, media_type=MEDIA_TYPE)

    def rollout_terms(self) -> schema.RolloutTerms:
        """Return what a training job must match before it uses this server, and the limits of a rollout request."""
        context, settings, catalog = self.context, self.context.settings, self.engine.catalog
        own = catalog.prompt_format  # that of a followed version may have another tokenizer than the first one
        return schema.RolloutTerms(
            instance=context.instance, catalog=catalog.fingerprint,
            tokenizer=own.tokenizer.fingerprint if own.generation else context.tokenizer,
            precision=context.precision, length_penalty=context.length_penalty, max_beams=settings.max_beams,
            max_body_kb=settings.max_body_kb, token_budget=settings.token_budget, row_budget=settings.row_budget,
            weight_version=self.engine.weights, catalog_version=catalog.version,
        )  # fmt: skip

    def items(
        self,
        q: Annotated[str, Query(max_length=200, description="part of a title, in any case; empty: all items")] = "",
        limit: Annotated[int, Query(ge=1, le=100, description="items to return")] = 20,
        offset: Annotated[int, Query(ge=0, le=10**9, description="matching items to skip")] = 0,
    ) -> schema.ItemsReply:
        """Search the catalog's items by a part of their titles."""
        catalog = self.engine.catalog
        key = q.casefold()
        matches = [index for index, title in enumerate(catalog.search_keys) if key in title]
        page = [int(catalog.number_J[index]) for index in matches[offset : offset + limit]]
        return schema.ItemsReply(
            items=[schema.Item(item=i, external_id=catalog.external_ids[i], title=catalog.titles[i]) for i in page],
            total=len(matches), weight_version=self.engine.weights, catalog_version=catalog.version,
        )  # fmt: skip

    def models(self) -> schema.ModelsReply:
        """List the served model with its weight version and the catalog's version, fingerprint and size."""
        served = self.engine.history.list()
        catalog, weights = served[0].catalog, served[0].weights
        history = [
            schema.ServedVersions(
                weight_version=pair.weights, catalog_version=pair.catalog.version, since=int(pair.since)
            )
            for pair in served
        ]
        card = schema.ModelCard(
            id=self.context.model_id, created=self._created, catalog=catalog.fingerprint, items=catalog.trie.num_items,
            item_fields=self.context.filters.fields.names, weight_version=weights, catalog_version=catalog.version,
            history=history,
        )  # fmt: skip
        return schema.ModelsReply(data=[card], weight_version=weights, catalog_version=catalog.version)

    async def health(self) -> schema.Health:
        """Liveness: the HTTP server answers. Needs no key."""
        return schema.Health(status="alive")

    async def ready(self) -> schema.Ready:
        """Readiness: every rank of the engine answers and requests are accepted; 503 otherwise. Needs no key."""
        if self.engine.closed:
            raise ApiError(503, f"the server is {self.engine.closed}", reason=self.engine.closed, retry_after=1)
        try:
            async with asyncio.timeout(self.context.settings.probe_s):
                await asyncio.wrap_future(self.engine.probe())
        except Exception as error:  # whatever the error, this server cannot answer now
            text = f"the engine does not answer ({type(error).__name__})"
            raise ApiError(503, text, reason="fault", retry_after=1) from error
        return schema.Ready(
            status="ready", ranks=self.engine.leader.ranks.size,
            weight_version=self.engine.weights, catalog_version=self.engine.catalog.version,
        )  # fmt: skip

    async def metrics(self) -> Response:
        """Metrics of the server in Prometheus' text format."""
        return Response(self.engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _run(
        self, request: Request, parse: Callable[[ServedCatalog], ParsedRequest]
    ) -> tuple[ParsedRequest, JobResult]:
        """Submit a request's job and wait for its result. Raises ApiError (499, 504) or Rejected.

        The job is cancelled when its deadline passes or the client disconnects.
        """
        if self.engine.closed:
            raise Rejected(self.engine.closed, f"the server is {self.engine.closed}; try again later")
        parsed = await self._submit(parse)
        job, future = parsed.job, asyncio.wrap_future(parsed.job.future)
        future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # may end after the response
        try:
            outcome = await _first_of(future, request, job.deadline - time.monotonic())
        finally:
            if not future.done():
                self.engine.cancel(job)
        if outcome == "disconnected":
            raise ApiError(499, "the client has disconnected", reason="disconnected")
        if outcome == "deadline":
            raise ApiError(504, "the deadline passed; the request was cancelled", reason="deadline", code="deadline")
        result = future.result()
        request.state.log_fields.update(
            width=job.width, draws=job.draws, prompts=len(job.prompts), tokens=len(job.prompts.flat),
            queue_ms=round(1000 * result.queue_s, 2), run_ms=round(1000 * result.run_s, 2),
            weight_version=result.weight_version, catalog_version=result.catalog_version,
        )  # fmt: skip
        return parsed, result

    async def _submit(self, parse: Callable[[ServedCatalog], ParsedRequest]) -> ParsedRequest:
        while True:
            parsed = await run_in_threadpool(parse, self.engine.catalog)
            try:
                self.engine.submit(parsed.job)
            except Rejected as rejected:
                if rejected.reason == "stale_catalog":  # replaced while the request was parsed: parse it again
                    continue
                raise
            return parsed

    def _log_history(self, request: Request, body: schema.Strict) -> None:
        if self.context.settings.log_history:
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


def _json_response(reply: BaseModel) -> Response:
    """The reply as JSON, without FastAPI's second validation of what is a valid model already."""
    return Response(reply.model_dump_json(), media_type="application/json")


async def playground() -> HTMLResponse:
    """The page ``playground.html``. Its policy allows its own script and style only, and requests to this server."""
    text, headers = _playground_page()
    return HTMLResponse(text, headers=headers)


@cache
def _playground_page() -> tuple[str, dict[str, str]]:
    text = PLAYGROUND.read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.S)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; connect-src 'self'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {
        "content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }  # fmt: skip


def data_app(plane: DataPlane | None, *, keys: Collection[str] = ()) -> FastAPI:
    """The data plane as an ASGI application with all middleware; ``keys``: accepted bearer keys, none = open to all.

    Without a plane the application has no middleware and serves only to write its OpenAPI document.
    """
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
        settings = plane.context.settings
        add_middleware(
            app, plane="data", metrics=plane.engine.metrics, keys=keys, open_paths=OPEN_PATHS,
            max_body_bytes=1024 * settings.max_body_kb, read_timeout_s=settings.read_timeout_s,
            cors_origins=settings.cors_origins,
        )  # fmt: skip
    return app
