"""The page at ``/``: search items, build a history, watch the ranking and the walk through the trie, compare answers.

One file without anything from elsewhere. Its policy lets it run its own script and style and talk to this server only.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi.responses import HTMLResponse

PAGE = Path(__file__).with_name("playground.html")


@cache
def page() -> tuple[str, dict[str, str]]:
    """The page and its headers."""
    text = PAGE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src {_hashes(text, 'script')}; "
        f"style-src {_hashes(text, 'style')}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {
        "content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }  # fmt: skip


def _hashes(text: str, tag: str) -> str:
    parts = re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.S)
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


async def playground() -> HTMLResponse:
    text, headers = page()
    return HTMLResponse(text, headers=headers)
