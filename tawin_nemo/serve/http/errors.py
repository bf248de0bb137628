"""Error responses of both planes, in the format of OpenAI's API: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tawin_nemo.serve.engine.jobs import Rejected
from tawin_nemo.util.errors import TawinError
from tawin_nemo.util.log import get_logger
from tawin_nemo.util.trusted import OutsideRoots

log = get_logger(__name__)

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 409: "conflict_error", 413: "invalid_request_error", 429: "rate_limit_error",
    499: "client_closed", 503: "unavailable_error", 504: "timeout_error",
}  # fmt: skip
#: The engine's rejection reasons -> HTTP status and seconds for Retry-After.
_STATUS_OF_REASON: dict[str, tuple[int, int | None]] = {
    "queue_full": (429, 1), "paused": (503, 1), "draining": (503, 10), "fault": (500, None), "aborted": (503, 1),
    "deadline": (504, None), "stale_weights": (409, None), "invalid": (400, None), "disconnected": (499, None),
}  # fmt: skip


class ApiError(Exception):
    """An error response.

    ``reason``: a word of ``telemetry.REJECTIONS``; ``param``: the request's field at fault; ``code``: a stable word
    for programs; ``retry_after``: seconds, for the Retry-After header.
    """

    def __init__(
        self, status: int, message: str, *, reason: str = "invalid", param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason
        self.param, self.code, self.retry_after = param, code, retry_after

    @classmethod
    def of(cls, rejected: Rejected) -> ApiError:
        """The response to a request that the engine rejected."""
        status, retry_after = _STATUS_OF_REASON[rejected.reason]
        return cls(status, str(rejected), reason=rejected.reason, code=rejected.reason, retry_after=retry_after)

    def response(self) -> JSONResponse:
        """The error as JSON, with Retry-After and WWW-Authenticate headers where they apply."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error_body(self.status, self.message, self.param, self.code), self.status, headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON body of an error; its type follows from the status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of an application an ``ErrorReply``; ``request.state.reason`` keeps the reason for metrics."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        request.state.reason = error.reason
        return error.response()

    @app.exception_handler(Rejected)
    async def on_rejected(request: Request, error: Rejected) -> JSONResponse:
        return await on_api_error(request, ApiError.of(error))

    @app.exception_handler(TawinError)
    async def on_tawin_error(request: Request, error: TawinError) -> JSONResponse:
        request.state.reason = "invalid" if error.exit_code == 2 else "fault"
        status = 403 if isinstance(error, OutsideRoots) else 400 if error.exit_code == 2 else 500
        if status == 500:
            log.error("request %s failed", correlation_id.get(), exc_info=error)
        return JSONResponse(error_body(status, str(error)), status)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        request.state.reason = "invalid"
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        more = len(error.errors()) - 1
        message = f"{field or 'body'}: {first['msg']}" + (f" (and {more} more)" if more else "")
        return JSONResponse(error_body(400, message, field or None, str(first["type"])), 400)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        request.state.reason = "invalid"
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        log.error("request %s failed", correlation_id.get(), exc_info=error)
        message = f"a fault of the server ({type(error).__name__}); see its log"
        # Starlette sends this response from outside of all other middleware, which would have added the id; then
        # uvicorn closes the connection, and a client that is not told sends its next request into it.
        headers = {"X-Request-Id": correlation_id.get() or "", "Connection": "close"}
        return JSONResponse(error_body(500, message), 500, headers)


def without_422(openapi: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Remove FastAPI's own validation response from an OpenAPI document: ``add_error_handlers`` replaces it by 400."""

    def cleaned() -> dict[str, Any]:
        document = openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        return document

    return cleaned
