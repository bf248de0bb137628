"""Paths in requests: they must lie below ``serve.roots``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tawin_nemo.serve.http.errors import ApiError


def allowed_path(roots: Sequence[Path], name: str, field: str) -> Path:
    """The resolved path ``name`` of the request's ``field``. Raises ApiError when it lies outside of ``roots`` (403),
    does not exist (404) or cannot be a path (400).

    Links can change afterwards: whoever opens the files does so under ``confined``, which looks at what is opened.
    """
    try:
        path = Path(name).resolve()
        allowed, exists = any(path.is_relative_to(root) for root in roots), path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a circle of links
        raise ApiError(400, f"this cannot be a path ({error})", param=field) from error
    if not allowed:
        raise ApiError(403, "the path is not below serve.roots", param=field, code="path_not_allowed")
    if not exists:
        raise ApiError(404, "the path does not exist", param=field)
    return path
