"""Keys and tokens come from files: a command line can be read by every user of the machine."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from tawin_nemo.util.errors import ConfigError

SHORTEST = 16


def read_keys(file: str, option: str = "serve.api_keys_file") -> list[str]:
    """The keys of a file that ``option`` names; none without a file. Raises ConfigError for short or missing keys."""
    if not file:
        return []
    keys = _words(Path(file), option)
    if not keys:
        raise ConfigError(f"{option}={file} holds no keys; write one a line, or leave the option out")
    return keys


def read_token(file: str, option: str) -> str:
    """The one token of a file that ``option`` names. Raises ConfigError for a file that does not hold exactly one."""
    tokens = _words(Path(file), option)
    if len(tokens) != 1:
        raise ConfigError(f"{option}={file} holds {len(tokens)} tokens; write exactly one")
    return tokens[0]


def control_token(file: str, made: Path, keys: list[str]) -> str:
    """The control plane's token: from a file, or a new one in ``made``, which only this user can read.

    Raises ConfigError for a file that does not hold exactly one, and for a token that is also a user's key.
    """
    if file:
        token = read_token(file, "serve.control_token_file")
    else:
        token = secrets.token_urlsafe(32)
        made.parent.mkdir(parents=True, exist_ok=True)
        made.unlink(missing_ok=True)
        with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            out.write(token + "\n")
    if token in keys:
        raise ConfigError("the control plane's token is also a user's key; give it one of its own")
    return token


def _words(path: Path, key: str) -> list[str]:
    """Lines that are neither empty nor comments."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}={path} cannot be read: {error}") from error
    words = [line for line in lines if line and not line.startswith("#")]
    for number, word in enumerate(words, 1):
        if len(word) < SHORTEST or any(map(str.isspace, word)):
            raise ConfigError(f"{key}={path}: key {number} is shorter than {SHORTEST} characters or holds spaces")
    return words
