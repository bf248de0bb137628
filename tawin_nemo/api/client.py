"""A typed client of both planes.

with Client("http://127.0.0.1:8000", key) as shop:
    for item in shop.recommend(history=["B0001", "B0002"], n=10).items:
        print(item.title, item.probability)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from tawin_nemo.api import control_schema, schema
from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.util.errors import TawinError

Reply = TypeVar("Reply", bound=BaseModel)
#: Seconds that making a connection may take.
CONNECT_S = 10.0


class ServerError(TawinError):
    """The server answered with an error. ``retry_after``: seconds to wait, where it is worth trying again."""

    def __init__(self, status: int, error: schema.ErrorInfo, retry_after: float | None) -> None:
        super().__init__(f"{status} {error.type}: {error.message}")
        self.status, self.error, self.retry_after = status, error, retry_after


class _Caller:
    """One connection pool to one plane. Raises ServerError, and httpx.TransportError when nobody answers."""

    def __init__(self, url: str, key: str = "", *, timeout_s: float = 60.0) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limit = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))
        self._http = httpx.Client(base_url=url, headers=headers, timeout=limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _call(self, kind: type[Reply], method: str, path: str, **options: Any) -> Reply:
        return kind.model_validate_json(self._answer(method, path, **options).content)

    def _answer(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self._http.request(method, path, **options)
        if answer.status_code >= 400:
            after = answer.headers.get("retry-after", "")
            raise ServerError(answer.status_code, _error_in(answer), float(after) if after.isdigit() else None)
        return answer

    def _post(self, kind: type[Reply], path: str, body: BaseModel) -> Reply:
        return self._call(kind, "POST", path, json=body.model_dump(exclude_unset=True))


class Client(_Caller):
    """The data plane. Items are numbers or external ids; fields as in ``schema``."""

    def recommend(
        self, history: Sequence[int | str] | None = None, *, n: int = 10, **fields: Any
    ) -> schema.RecommendationReply:
        """The n best items for a history (or ``history_titles=``, ``prompt=``)."""
        given = {} if history is None else {"history": list(history)}
        body = schema.RecommendationRequest(n=n, **given, **fields)
        return self._post(schema.RecommendationReply, "/v1/recommendations", body)

    def score(
        self, items: Sequence[int | str], history: Sequence[int | str] | None = None, **fields: Any
    ) -> schema.ScoreReply:
        """Log-probs of items, in their order."""
        given = {} if history is None else {"history": list(history)}
        return self._post(schema.ScoreReply, "/v1/score", schema.ScoreRequest(items=list(items), **given, **fields))

    def complete(self, prompt: str | list[str], *, model: str, **fields: Any) -> schema.CompletionReply:
        body = schema.CompletionRequest(model=model, prompt=prompt, **fields)
        return self._post(schema.CompletionReply, "/v1/completions", body)

    def rollout_terms(self) -> schema.RolloutTerms:
        return self._call(schema.RolloutTerms, "GET", "/v1/rollouts")

    def rollouts(self, prompts: Sequence[Sequence[int]], **fields: Any) -> RolloutReply:
        """Candidates of token prompts (``beams=``, or ``draws=`` and ``seeds=``). Raises TawinError for a reply that is
        none."""
        body = schema.RolloutRequest(prompts=[list(row) for row in prompts], **fields)
        answer = self._answer("POST", "/v1/rollouts", json=body.model_dump(exclude_unset=True))
        return RolloutReply.decoded(answer.content)

    def search_items(self, q: str = "", *, limit: int = 20, offset: int = 0) -> schema.ItemsReply:
        params = {"q": q, "limit": limit, "offset": offset}
        return self._call(schema.ItemsReply, "GET", "/v1/items/search", params=params)

    def models(self) -> schema.ModelsReply:
        return self._call(schema.ModelsReply, "GET", "/v1/models")

    def ready(self) -> schema.Ready:
        return self._call(schema.Ready, "GET", "/ready")


class ControlClient(_Caller):
    """The control plane; ``key`` is its token."""

    def update_weights(self, model_path: str, weight_version: int | None = None) -> control_schema.Reply:
        given = {} if weight_version is None else {"weight_version": weight_version}
        body = control_schema.UpdateWeights(model_path=model_path, **given)
        return self._post(control_schema.Reply, "/update_weights_from_disk", body)

    def init_weights_group(self, **fields: Any) -> control_schema.Reply:
        """Returns when the server has met the group; the caller makes its rank 0 meanwhile."""
        return self._post(control_schema.Reply, "/init_weights_update_group", control_schema.InitGroup(**fields))

    def update_weights_from_distributed(self, **fields: Any) -> control_schema.Reply:
        """Returns when the weights, which the caller broadcasts meanwhile, are in use."""
        body = control_schema.UpdateFromDistributed(**fields)
        return self._post(control_schema.Reply, "/update_weights_from_distributed", body)

    def destroy_weights_group(self, group_name: str) -> control_schema.Reply:
        body = control_schema.DestroyGroup(group_name=group_name)
        return self._post(control_schema.Reply, "/destroy_weights_update_group", body)

    def pause(self, *, wait_s: float = 0.0, abort: bool = False) -> control_schema.Reply:
        body = control_schema.Pause(wait_s=wait_s, abort=abort)
        return self._post(control_schema.Reply, "/pause_generation", body)

    def resume(self) -> control_schema.Reply:
        return self._post(control_schema.Reply, "/continue_generation", control_schema.Nothing())

    def flush_cache(self) -> control_schema.Reply:
        return self._post(control_schema.Reply, "/flush_cache", control_schema.Nothing())

    def build_catalog(self, path: str) -> control_schema.CatalogReply:
        return self._post(control_schema.CatalogReply, "/catalog/build", control_schema.Build(path=path))

    def validate_catalog(self, version: int) -> control_schema.CatalogReply:
        body = control_schema.Candidate(catalog_version=version)
        return self._post(control_schema.CatalogReply, "/catalog/validate", body)

    def activate_catalog(self, version: int) -> control_schema.CatalogReply:
        body = control_schema.Candidate(catalog_version=version)
        return self._post(control_schema.CatalogReply, "/catalog/activate", body)

    def change_items(
        self, add: Sequence[control_schema.ItemToAdd] = (), remove: Sequence[str] = ()
    ) -> control_schema.CatalogReply:
        """Add and remove items live."""
        body = control_schema.Change(add=list(add), remove=list(remove))
        return self._post(control_schema.CatalogReply, "/catalog/items", body)

    def status(self) -> control_schema.StatusReply:
        return self._call(control_schema.StatusReply, "GET", "/status")

    def drain(self, *, wait_s: float = 60.0) -> control_schema.Reply:
        return self._post(control_schema.Reply, "/drain", control_schema.Pause(wait_s=wait_s))

    def shutdown(self, *, wait_s: float = 60.0) -> control_schema.Reply:
        return self._post(control_schema.Reply, "/shutdown", control_schema.Pause(wait_s=wait_s))


def _error_in(answer: httpx.Response) -> schema.ErrorInfo:
    try:
        return schema.ErrorReply.model_validate_json(answer.content).error
    except ValueError:  # something in between answered
        return schema.ErrorInfo(message=answer.text[:200], type="unknown")
