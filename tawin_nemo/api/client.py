"""Typed HTTP clients of the server: ``Client`` for the data plane, ``ControlClient`` for the control plane.

with Client("http://127.0.0.1:8000", key) as shop:
    for item in shop.recommend(history=["B0001", "B0002"], n=10).items:
        print(item.title, item.probability)
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from tawin_nemo.api import control_schema, schema
from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.util.errors import TawinError

Reply = TypeVar("Reply", bound=BaseModel)
#: Seconds until an attempt to connect fails.
CONNECT_S = 10.0


class ServerError(TawinError):
    """An error response.

    ``status``: the HTTP status; ``error``: the parsed body; ``retry_after``: seconds from the Retry-After header, or
    None without one.
    """

    def __init__(self, status: int, error: schema.ErrorInfo, retry_after: float | None) -> None:
        """An error with this status and body."""
        super().__init__(f"{status} {error.type}: {error.message}")
        self.status, self.error, self.retry_after = status, error, retry_after


class _Caller:
    """A connection pool to one plane; use it as a context manager, or call ``close``.

    ``url``: address of the plane; ``key``: bearer key, empty = none; ``timeout_s``: limit for every request. All calls
    raise ServerError for an error response and httpx.TransportError when the server cannot be reached or is too slow.
    """

    def __init__(self, url: str, key: str = "", *, timeout_s: float = 60.0) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limit = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))
        self._http = httpx.Client(base_url=url, headers=headers, timeout=limit)
        self._sockets: list[socket.socket] = []  # of open connections

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def abort(self) -> None:
        """Make requests that are in flight in other threads fail with httpx.TransportError at once.

        Closing a connection would not wake a thread that reads from it. Later requests connect anew.
        """
        for connection in self._sockets:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Note the socket of a new connection (httpx's extension ``trace``)."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            made = info["return_value"].get_extra_info("socket")
            self._sockets = [*(kept for kept in self._sockets if kept.fileno() >= 0), made]

    def _call(self, kind: type[Reply], method: str, path: str, **options: Any) -> Reply:
        return kind.model_validate_json(self._answer(method, path, **options).content)

    def _answer(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self._http.request(method, path, extensions={"trace": self._trace}, **options)
        if answer.status_code >= 400:
            after = answer.headers.get("retry-after", "")
            raise ServerError(answer.status_code, _error_in(answer), float(after) if after.isdigit() else None)
        return answer

    def _post(self, kind: type[Reply], path: str, body: BaseModel) -> Reply:
        return self._call(kind, "POST", path, json=body.model_dump(exclude_unset=True))


class Client(_Caller):
    """A client of the data plane. Items are given by number (int) or external id (str).

    ``fields`` are further fields of the request's model in ``schema``. Calls raise ServerError for an error response
    and httpx.TransportError when the server cannot be reached.
    """

    def recommend(
        self, history: Sequence[int | str] | None = None, *, n: int = 10, **fields: Any
    ) -> schema.RecommendationReply:
        """The n best items for a history, oldest item first; or for ``history_titles=`` or ``prompt=`` instead."""
        history_field = {} if history is None else {"history": list(history)}
        body = schema.RecommendationRequest(n=n, **history_field, **fields)
        return self._post(schema.RecommendationReply, "/v1/recommendations", body)

    def score(
        self, items: Sequence[int | str], history: Sequence[int | str] | None = None, **fields: Any
    ) -> schema.ScoreReply:
        """Log-probs of ``items``, in their order, for a history (or ``history_titles=``, ``prompt=``)."""
        history_field = {} if history is None else {"history": list(history)}
        return self._post(
            schema.ScoreReply, "/v1/score", schema.ScoreRequest(items=list(items), **history_field, **fields)
        )

    def complete(self, prompt: str | list[str], *, model: str, **fields: Any) -> schema.CompletionReply:
        """Complete one or more prompts with whole catalog items; ``model``: the id that ``models`` lists."""
        body = schema.CompletionRequest(model=model, prompt=prompt, **fields)
        return self._post(schema.CompletionReply, "/v1/completions", body)

    def rollout_terms(self) -> schema.RolloutTerms:
        """What a training job must match before it uses this server, and the limits of a rollout request."""
        return self._call(schema.RolloutTerms, "GET", "/v1/rollouts")

    def rollouts(self, prompts: Sequence[Sequence[int]], **fields: Any) -> RolloutReply:
        """Candidates for token prompts: with ``beams=`` a search, or ``draws=`` and one of ``seeds=`` per prompt.

        Raises TawinError for a reply that cannot be decoded.
        """
        body = schema.RolloutRequest(prompts=[list(row) for row in prompts], **fields)
        answer = self._answer("POST", "/v1/rollouts", json=body.model_dump(exclude_unset=True))
        return RolloutReply.decoded(answer.content)

    def search_items(self, q: str = "", *, limit: int = 20, offset: int = 0) -> schema.ItemsReply:
        """Items whose titles contain ``q`` in any case (empty: all): ``limit`` of them after the first ``offset``."""
        params = {"q": q, "limit": limit, "offset": offset}
        return self._call(schema.ItemsReply, "GET", "/v1/items/search", params=params)

    def models(self) -> schema.ModelsReply:
        """The served model with its versions and the catalog's fingerprint."""
        return self._call(schema.ModelsReply, "GET", "/v1/models")

    def health(self) -> schema.Health:
        """Check that the HTTP server answers, whatever its engine does."""
        return self._call(schema.Health, "GET", "/health")

    def ready(self) -> schema.Ready:
        """Check that all ranks of the engine answer. Raises ServerError (503) while the server is not ready."""
        return self._call(schema.Ready, "GET", "/ready")


class ControlClient(_Caller):
    """A client of the control plane; ``key`` is the control plane's token.

    ``fields`` are the fields of the request's model in ``control_schema``. Calls raise ServerError for an error
    response and httpx.TransportError when the server cannot be reached.
    """

    def update_weights(self, model_path: str, weight_version: int | None = None) -> control_schema.Reply:
        """Load weights from a path on the server's machine and activate them; default version: the current one + 1."""
        version = {} if weight_version is None else {"weight_version": weight_version}
        body = control_schema.UpdateWeights(model_path=model_path, **version)
        return self._post(control_schema.Reply, "/update_weights_from_disk", body)

    def rollback(self) -> control_schema.Reply:
        """Go back to the weights and catalog before the last change (`serve.keep_versions`)."""
        return self._post(control_schema.Reply, "/rollback", control_schema.Nothing())

    def init_weights_group(self, **fields: Any) -> control_schema.Reply:
        """Make the server join a process group; returns once it has joined. The caller joins as rank 0 meanwhile."""
        return self._post(control_schema.Reply, "/init_weights_update_group", control_schema.InitGroup(**fields))

    def update_weights_from_distributed(self, **fields: Any) -> control_schema.Reply:
        """Make the server receive weights and activate them; returns once they are active.

        The caller broadcasts the tensors in the process group meanwhile.
        """
        body = control_schema.UpdateFromDistributed(**fields)
        return self._post(control_schema.Reply, "/update_weights_from_distributed", body)

    def destroy_weights_group(self, group_name: str) -> control_schema.Reply:
        """Make the server leave the process group; the active weights stay."""
        body = control_schema.DestroyGroup(group_name=group_name)
        return self._post(control_schema.Reply, "/destroy_weights_update_group", body)

    def pause(self, *, wait_s: float = 0.0, abort: bool = False) -> control_schema.Reply:
        """Reject new requests until ``resume``; wait up to ``wait_s`` seconds for running ones, or abort them."""
        body = control_schema.Pause(wait_s=wait_s, abort=abort)
        return self._post(control_schema.Reply, "/pause_generation", body)

    def resume(self) -> control_schema.Reply:
        """Accept requests again after ``pause``."""
        return self._post(control_schema.Reply, "/continue_generation", control_schema.Nothing())

    def flush_cache(self) -> control_schema.Reply:
        """Release unused memory."""
        return self._post(control_schema.Reply, "/flush_cache", control_schema.Nothing())

    def build_catalog(self, path: str) -> control_schema.CatalogReply:
        """Build a candidate catalog from a JSON lines file on the server's machine."""
        return self._post(control_schema.CatalogReply, "/catalog/build", control_schema.Build(path=path))

    def validate_catalog(self, version: int) -> control_schema.CatalogReply:
        """Check that the model can generate every item of the candidate catalog ``version``."""
        body = control_schema.Candidate(catalog_version=version)
        return self._post(control_schema.CatalogReply, "/catalog/validate", body)

    def activate_catalog(self, version: int) -> control_schema.CatalogReply:
        """Activate the validated candidate catalog ``version`` for new requests."""
        body = control_schema.Candidate(catalog_version=version)
        return self._post(control_schema.CatalogReply, "/catalog/activate", body)

    def change_items(
        self, add: Sequence[control_schema.ItemToAdd] = (), remove: Sequence[str] = ()
    ) -> control_schema.CatalogReply:
        """Add items to the active catalog and remove others by external id, in one call."""
        body = control_schema.Change(add=list(add), remove=list(remove))
        return self._post(control_schema.CatalogReply, "/catalog/items", body)

    def status(self) -> control_schema.StatusReply:
        """The server's state, its number of requests, and the versions in use and in memory."""
        return self._call(control_schema.StatusReply, "GET", "/status")

    def drain(self, *, wait_s: float = 60.0) -> control_schema.Reply:
        """Reject new requests for good and wait up to ``wait_s`` seconds for running ones."""
        return self._post(control_schema.Reply, "/drain", control_schema.Pause(wait_s=wait_s))

    def shutdown(self, *, wait_s: float = 60.0) -> control_schema.Reply:
        """Drain the server and end its process after at most ``wait_s`` seconds; returns at once."""
        return self._post(control_schema.Reply, "/shutdown", control_schema.Pause(wait_s=wait_s))


def _error_in(answer: httpx.Response) -> schema.ErrorInfo:
    try:
        return schema.ErrorReply.model_validate_json(answer.content).error
    except ValueError:  # the response of a proxy, not of the server
        return schema.ErrorInfo(message=answer.text[:200], type="unknown")
