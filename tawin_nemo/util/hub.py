"""Models by their name on the Hugging Face hub (``Qwen/Qwen2.5-0.5B``): downloaded once, then read from its cache.

Nothing else of a run asks the network. A name that is a folder here is that folder. ``HF_HUB_OFFLINE=1`` (the cache
alone is used), ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
#: What of a repository is downloaded: configuration, tokenizer and weights, and nothing of its folders.
FILES, NOT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"], ["*/*"]
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_hub_name(name: str) -> bool:
    """Whether ``name`` can only be a model of the hub: OWNER/NAME, and no file or folder here is called so.

    >>> is_hub_name("Qwen/Qwen2.5-0.5B"), is_hub_name("random"), is_hub_name("./a/b"), is_hub_name("a/b/c")
    (True, False, False, False)
    """
    return _NAME.fullmatch(name) is not None and not Path(name).exists()


def local_folder(name: str, revision: str = "") -> Path:
    """The folder of ``model.init``: the one of that name, or the hub's cached copy. It does not ask the network.

    Where there is neither, the path that ``name`` is, which does not exist.
    """
    if is_hub_name(name):
        cached = _cached(name, revision)
        return Path(name) if cached is None else cached
    return Path(name).expanduser()


def fetch(name: str, revision: str = "") -> None:
    """Download a hub model into the hub's cache, unless it is there whole; a folder's name needs nothing.

    ``revision`` is a branch, tag or commit (empty = main). Raises ConfigError when the hub does not give it: with the
    name, what was tried, and the remedy.
    """
    if not is_hub_name(name):
        return
    cached = _cached(name, revision)
    if cached is not None and _is_whole(cached):
        log.info("%s: %s of the hub's cache", name, cached)
        return
    from huggingface_hub import constants, snapshot_download

    log.info("%s is no folder here: asking %s for revision %s", name, constants.ENDPOINT, revision or "main")
    try:
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=FILES, ignore_patterns=NOT_FILES)
        )
    except (OSError, ValueError) as error:  # what requests and huggingface_hub raise
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise
        raise ConfigError(_refused(name, revision, _reason(error, revision))) from error
    if not _is_whole(folder):
        raise ConfigError(_refused(name, revision, f"{folder} lacks config.json or safetensors files that it names"))
    log.info("%s: downloaded to %s", name, folder)


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot in the hub's cache, whole or not; None where there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):
        return None


def _is_whole(folder: Path) -> bool:
    """Whether the configuration and all weights are there."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    return bool(named) and all((folder / file).is_file() for file in named)


def _refused(name: str, revision: str, reason: str) -> str:
    from huggingface_hub import constants

    at = f" --revision {revision}" if revision else ""
    return (
        f"model.init={name} is no folder here, and the Hugging Face hub does not give it (tried {constants.ENDPOINT}, "
        f"revision {revision or 'main'}, cache {constants.HF_HUB_CACHE}): {reason}. Download it where a hub is "
        f"reachable (hf download {name}{at} --local-dir DIR), copy the folder here and set model.init=DIR"
    )


def _reason(error: Exception, revision: str) -> str:
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE or isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 forbids to ask for what the cache does not hold"
    if isinstance(error, errors.GatedRepoError):
        return "its owner wants an agreement on the model's page, and HF_TOKEN to be set"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such model is public; a private one needs HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision}"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(cause).__name__}: {str(cause).splitlines()[0][:200] if str(cause) else 'no answer'}"
