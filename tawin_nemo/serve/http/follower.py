"""Follows the link ``latest`` of a folder of published versions: a new version is put into use without a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from tawin_nemo.run.published import check_version, live_version
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: The longest time, in seconds, until a version that could not be used is tried again: its disk may have been away.
MAX_RETRY_S = 3600.0


class Follower:
    """Looks at ``root/latest`` every ``poll_s`` seconds, on a thread of its own.

    ``put(folder)`` puts a version into use, or raises and leaves the one in use as it is. Before, every file of the
    version is compared with its checksum. A version that is broken or cannot be used is refused with a line in the log
    and tried again after twice as long each time; the version in use goes on. ``serving`` is the version that the
    server started with.
    """

    def __init__(self, root: Path, serving: Path, *, poll_s: float, put: Callable[[Path], None]) -> None:
        self._root, self._poll_s, self._put = root, poll_s, put
        self._serving = serving.resolve()
        self._refused: Path | None = None
        self._reason, self._tries, self._again = "", 0, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def followed(self) -> str:
        """The name of the version in use."""
        return self._serving.name

    def refused(self) -> str | None:
        """The version that ``latest`` names and that could not be used, with the reason; None without one."""
        return f"{self._refused.name}: {self._reason}" if self._refused else None

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking; a version that is being loaded is not waited for."""
        self._stop.set()

    def look(self) -> bool:
        """Look once. Returns whether another version came into use."""
        try:
            live = live_version(self._root)
        except Exception as error:  # a file server that is away, a link to nothing
            log.warning("%s cannot be read (%s); version %s stays in use", self._root, error, self._serving.name)
            return False
        if live is None or live == self._serving:
            self._refused = None
            return False
        if live == self._refused and time.monotonic() < self._again:
            return False
        try:
            check_version(live)
            self._put(live)
        except Exception as error:  # files in any shape: whatever the libraries raise for them
            self._refuse(live, error)
            return False
        log.info("version %s is in use instead of %s", live.name, self._serving.name)
        self._serving, self._refused, self._tries = live, None, 0
        return True

    def _refuse(self, live: Path, error: Exception) -> None:
        self._tries = self._tries + 1 if live == self._refused else 1
        wait = min(self._poll_s * 2**self._tries, MAX_RETRY_S)
        self._refused, self._again = live, time.monotonic() + wait
        self._reason = f"{type(error).__name__}: {error}"
        log.error(
            "version %s is refused (%s); version %s stays in use, next try in %.0f s", live.name, self._reason,
            self._serving.name, wait,
        )  # fmt: skip

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            self.look()
