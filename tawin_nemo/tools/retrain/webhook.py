"""Tells an address of the operator's that the gate has refused a model."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)
SCHEMES = ("http", "https")


def check_webhook(url: str) -> None:
    """Raises ConfigError for an address that is neither empty nor http(s) with a host."""
    parts = urlsplit(url)
    if url and (parts.scheme not in SCHEMES or not parts.hostname):
        raise ConfigError(f"retrain.webhook={url.partition('?')[0]} must be an http:// or https:// address, or empty")


def post(url: str, body: Mapping[str, Any], *, seconds: float) -> bool:
    """POST ``body`` as JSON; returns whether the answer was a 2xx status within so many seconds.

    A failure is logged, without the path, which may hold a secret; it never raises. Redirects are not followed.
    """
    check_webhook(url)
    host = urlsplit(url).hostname
    outcome: list[str] = []

    def send() -> None:
        try:
            request = urllib.request.Request(
                url, json.dumps(body).encode(), {"Content-Type": "application/json", "User-Agent": "tawin-nemo"}
            )
            with _opener().open(request, timeout=seconds) as response:
                outcome.append("" if 200 <= response.status < 300 else f"status {response.status}")
        except Exception as error:  # whatever the network does
            outcome.append(f"{type(error).__name__}: {error}".replace(url, str(host)))

    # On a thread: the timeout of a socket starts anew with every byte.
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(seconds)
    problem = outcome[0] if outcome else f"no answer in {seconds:g} s"
    if problem:
        log.warning("retrain.webhook: %s was not told (%s)", host, problem)
    return not problem


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS alone, without redirects; proxies of the environment are used."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener
