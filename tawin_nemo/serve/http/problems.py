"""Replies that say what went wrong, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tawin_nemo.serve.engine.jobs import Rejected
from tawin_nemo.util.errors import TawinError

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 409: "conflict_error", 413: "invalid_request_error", 429: "rate_limit_error",
    499: "client_closed", 503: "unavailable_error", 504: "timeout_error",
}  # fmt: skip
#: Status and seconds for Retry-After of what the engine refuses.
_OF_REASON: dict[str, tuple[int, int | None]] = {
    "queue_full": (429, 1), "paused": (503, 1), "draining": (503, 10), "fault": (500, None), "aborted": (503, 1),
    "deadline": (504, None), "stale_weights": (409, None), "invalid": (400, None), "disconnected": (499, None),
}  # fmt: skip


class Problem(Exception):
    """A reply that is an error. ``reason``: a word of ``metrics.REJECTIONS``; ``param``: the field at fault."""

    def __init__(
        self, status: int, message: str, *, reason: str = "invalid", param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason
        self.param, self.code, self.retry_after = param, code, retry_after

    @classmethod
    def of(cls, rejected: Rejected) -> Problem:
        status, retry_after = _OF_REASON[rejected.reason]
        return cls(status, str(rejected), reason=rejected.reason, code=rejected.reason, retry_after=retry_after)

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error_body(self.status, self.message, self.param, self.code), self.status, headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def handle_problems(app: FastAPI) -> None:
    """Every error of an app becomes an ``ErrorReply``; ``request.state.reason`` keeps why, for the metrics."""

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        request.state.reason = error.reason
        return error.response()

    @app.exception_handler(Rejected)
    async def rejected(request: Request, error: Rejected) -> JSONResponse:
        return await problem(request, Problem.of(error))

    @app.exception_handler(TawinError)
    async def refused(request: Request, error: TawinError) -> JSONResponse:
        request.state.reason = "invalid" if error.exit_code == 2 else "fault"
        status = 400 if error.exit_code == 2 else 500
        return JSONResponse(error_body(status, str(error)), status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        request.state.reason = "invalid"
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        more = len(error.errors()) - 1
        message = f"{place or 'body'}: {first['msg']}" + (f" (and {more} more)" if more else "")
        return JSONResponse(error_body(400, message, place or None, str(first["type"])), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        request.state.reason = "invalid"
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, f"a fault of the server ({type(error).__name__}); see its log"), 500)
