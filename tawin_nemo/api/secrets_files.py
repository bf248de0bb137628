"""Keys and tokens are read from files, because every user of a machine can read command lines.

A file holds one key per line; empty lines and lines that start with # are ignored.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from tawin_nemo.util.errors import ConfigError

MIN_KEY_LENGTH = 16


def read_keys(file: str, option: str = "serve.api_keys_file") -> list[str]:
    """The keys in ``file``, none for an empty name; ``option``: the setting that errors name.

    Raises ConfigError for a file that is unreadable or holds no keys, and for short keys or keys with spaces.
    """
    if not file:
        return []
    keys = _words(Path(file), option)
    if not keys:
        raise ConfigError(f"{option}={file} holds no keys; write one a line, or leave the option out")
    return keys


def read_token(file: str, option: str) -> str:
    """The one token in ``file``; ``option``: the setting that errors name.

    Raises ConfigError for a file that is unreadable or does not hold exactly one token of at least 16 characters.
    """
    tokens = _words(Path(file), option)
    if len(tokens) != 1:
        raise ConfigError(f"{option}={file} holds {len(tokens)} tokens; write exactly one")
    return tokens[0]


def control_token(file: str, generated: Path, keys: list[str]) -> str:
    """The control plane's token: the one in ``file``, or without a file a new one.

    A new token is written to ``generated``, which only this user can read. Raises ConfigError for a file that does not
    hold exactly one token, and for a token that is also one of the users' ``keys``.
    """
    if file:
        token = read_token(file, "serve.control_token_file")
    else:
        token = secrets.token_urlsafe(32)
        generated.parent.mkdir(parents=True, exist_ok=True)
        generated.unlink(missing_ok=True)
        with os.fdopen(os.open(generated, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
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
        if len(word) < MIN_KEY_LENGTH or any(map(str.isspace, word)):
            raise ConfigError(f"{key}={path}: key {number} is shorter than {MIN_KEY_LENGTH} characters or holds spaces")
    return words
