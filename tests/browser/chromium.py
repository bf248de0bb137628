"""Debian's Chromium driven by Playwright: a profile of its own, watched for errors and requests to other hosts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

#: ``tests/run.sh`` installs it as root on Debian where it is missing.
CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


def missing() -> str:
    """Why there can be no browser here, if so."""
    return "" if shutil.which(CHROMIUM) else f"no {CHROMIUM}; as root on Debian: apt-get install -y chromium"


@dataclass
class Browser:
    """One page and what went on in it."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def focused(self) -> str:
        """Name of what has the keyboard: its label, else its text, else its id."""
        return str(
            self.page.evaluate("(({ariaLabel, innerText, id}) => ariaLabel || innerText || id)(document.activeElement)")
        )


@contextmanager
def browser(profile: Path, **options: Any) -> Iterator[Browser]:
    """``options`` are Playwright's for a context: viewport, color_scheme."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=list(FLAGS), headless=True, locale="en-GB", **options
        )
        try:
            found = Browser(context.pages[0] if context.pages else context.new_page())
            found.page.set_default_timeout(60_000)
            found.watch()
            yield found
        finally:
            context.close()
