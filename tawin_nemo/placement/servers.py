"""A training job's connection to one generation server (``tawin-nemo serve``): terms, weights, rollouts.

Every reply names the instance of the server (one per start), its catalog and its weights. A reply with unexpected ones
is rejected, so that a server that was restarted, or changed by another client, cannot go unnoticed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
import torch.distributed as dist
from torch import Tensor

from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.api.client import Client, ControlClient, ServerError
from tawin_nemo.api.schema import RolloutTerms
from tawin_nemo.api.secrets_files import read_keys, read_token
from tawin_nemo.config.schema import RolloutConfig
from tawin_nemo.models.megatron.parallel.weight_group import TransferError, WeightGroup
from tawin_nemo.placement.liveness import Watch, in_thread, watched
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError, TawinError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)
#: Time limit in seconds of the request for the terms of a server.
_TERMS_S = 10.0
#: Seconds beyond its own time limit in which a server can report that it gave up.
_GRACE_S = 10.0
#: Time limit in seconds of saying goodbye to a server.
_CLOSE_S = 5.0


class Unavailable(TawinError):
    """A server cannot handle a request now. ``lost``: exclude the server; else retry after ``wait`` seconds."""

    def __init__(self, message: str, *, lost: bool = True, wait: float = 0.0) -> None:
        super().__init__(message)
        self.lost, self.wait = lost, wait


@dataclass(frozen=True)
class ExpectedTerms:
    """The properties of a server that must equal those of the training run."""

    catalog: str  # fingerprint
    tokenizer: str  # fingerprint; "" = not compared
    precision: str
    length_penalty: float


class GenerationServer:
    """One of ``rollout.servers``, named by its file. ``version``: that of the weights pushed to it, None without any.

    One thread calls at a time; ``abort`` and ``close`` may be called by any.
    """

    def __init__(self, file: str, cfg: RolloutConfig, expected: ExpectedTerms, store: dist.TCPStore) -> None:
        self.name, self._cfg, self._expected, self._store = file, cfg, expected, store
        self.version: int | None = None
        self._instance = ""
        self._token = ""
        self._data: Client | None = None
        self._control: ControlClient | None = None
        self._group: WeightGroup | None = None
        self._data_url = self._control_url = ""

    def connect(self) -> RolloutTerms:
        """Connect to the address in the server's file and compare its terms.

        Raises Unavailable when the server does not answer, ConfigError when its terms do not match the run.
        """
        self._data_url, self._control_url = _addresses(Path(self.name))
        key = next(iter(read_keys(self._cfg.api_key_file, "rollout.api_key_file")), "")
        token_file = self._cfg.control_token_file or str(Path(self.name).parent / "control_token")
        token = self._token = read_token(token_file, "rollout.control_token_file")
        terms = self._terms(key)
        self._compare(terms)
        self.disconnect(forget=terms.instance != self._instance)
        limit = self._cfg.server_timeout_s + _GRACE_S
        self._instance = terms.instance
        self._data, self._control = (
            Client(self._data_url, key, timeout_s=limit),
            ControlClient(self._control_url, token, timeout_s=limit),
        )
        return terms

    def _terms(self, key: str) -> RolloutTerms:
        try:
            with self._translated_errors(), Client(self._data_url, key, timeout_s=_TERMS_S) as client:
                return client.rollout_terms()
        except (Unavailable, ConfigError):
            raise
        except (TawinError, ValueError) as error:  # something else listens at the address that a lost server had
            raise Unavailable(f"{self._data_url} is no generation server ({str(error)[:200]})") from error

    def disconnect(self, *, forget: bool = True) -> None:
        """Close the connections; ``forget``: also drop the weight group and the version of the weights."""
        for caller in (self._data, self._control):
            if caller is not None:
                caller.close()
        self._data = self._control = None
        if forget:
            self._drop_group()
            self.version = None

    def abort(self) -> None:
        """Make the call that is in flight fail with Unavailable at once."""
        for caller in (self._data, self._control):
            if caller is not None:
                caller.abort()

    def close(self) -> None:
        """Destroy the weight group on the server and close the connections."""
        group, self._group = self._group, None
        if group is not None:
            control = ControlClient(self._control_url, self._token, timeout_s=_CLOSE_S)
            with contextlib.suppress(httpx.TransportError, ServerError), control:
                control.destroy_weights_group(group.name)
            group.close()
        self.disconnect()

    def push(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Send all weights as ``version``. Raises Unavailable, or ConfigError for a model of another shape."""
        control, self.version = self._control, None
        assert control is not None
        announced = {
            "names": list(tensors), "shapes": [list(value.shape) for value in tensors.values()],
            "dtypes": [str(value.dtype).removeprefix("torch.") for value in tensors.values()],
        }  # fmt: skip
        with self._translated_errors():
            try:
                if self._group is None:
                    self._group = self._join_group(control)
                name = self._group.name
                response = in_thread(
                    partial(
                        control.update_weights_from_distributed, group_name=name, weight_version=version, **announced
                    )
                )
                self._send(tensors, response)
                received = response.result().weight_version
            except Exception:
                self._drop_group()
                raise
        if received != version:
            raise Unavailable(f"calls its weights version {received} after version {version} was sent")
        self.version = version

    def _join_group(self, control: ControlClient) -> WeightGroup:
        backend, seconds = self._cfg.weights_backend, self._cfg.server_timeout_s
        if backend == "auto":
            backend = "nccl" if torch.cuda.is_available() else "gloo"
        name = f"tawin-{uuid.uuid4().hex}"
        response = in_thread(
            partial(
                control.init_weights_group, master_address=_own_address(self._control_url),
                master_port=self._store.port, group_name=name, backend=backend, timeout_s=min(seconds, 3600.0),
            )
        )  # fmt: skip
        limit = timedelta(seconds=seconds)
        with _request_error_first(response):
            group = WeightGroup(self._store, name, 0, 2, backend=backend, limit=limit, peer_ended=response.done)
        response.result()
        return group

    def _send(self, tensors: Mapping[str, Tensor], response: Future[Any]) -> None:
        assert self._group is not None
        with _request_error_first(response):
            self._group.send(tensors.values(), peer_ended=response.done)

    def rollouts(self, prompts: TokenRows, version: int, **fields: Any) -> RolloutReply:
        """Candidates of the prompts from weights ``version``.

        Raises Unavailable, also for a reply from other weights, another catalog or another instance.
        """
        client = self._data
        if client is None or self.version != version:
            raise Unavailable(f"has weights {self.version} where version {version} is expected")
        rows = [prompts[row].tolist() for row in range(len(prompts))]
        with self._translated_errors():
            reply = client.rollouts(rows, weight_version=version, timeout_s=self._cfg.server_timeout_s, **fields)
        source = (reply.weight_version, reply.instance, reply.catalog)
        if source != (version, self._instance, self._expected.catalog):
            raise Unavailable(
                f"answered from weights {source[0]}, start {source[1][:8]}, catalog {source[2][:8]} where {version}, "
                f"{self._instance[:8]}, {self._expected.catalog[:8]} are expected: rejected"
            )
        if len(reply.items_BW) != len(prompts):
            raise Unavailable(f"answered {len(reply.items_BW)} of {len(prompts)} prompts: rejected")
        return reply

    def _compare(self, terms: RolloutTerms) -> None:
        expected = self._expected
        remedy = "start it from this run's recipe (same data, tokenizer and model keys)"
        if terms.catalog != expected.catalog:
            raise ConfigError(
                f"rollout.servers: {self.name} serves another catalog ({terms.catalog[:12]}) than this run trains "
                f"on ({expected.catalog[:12]}): {remedy}, without serve.catalogue and later changes of items"
            )
        if expected.tokenizer and terms.tokenizer != expected.tokenizer:
            raise ConfigError(
                f"rollout.servers: {self.name} has another tokenizer ({terms.tokenizer[:12]}) than this run "
                f"({expected.tokenizer[:12]}): {remedy}"
            )
        if terms.precision != expected.precision:
            raise ConfigError(
                f"rollout.servers: {self.name} searches in {terms.precision} but model.precision={expected.precision} "
                f"(rollout.precision, where that is set): {remedy}, eval.precision among them"
            )
        if terms.length_penalty != expected.length_penalty:
            raise ConfigError(
                f"rollout.servers: {self.name} has rollout.length_penalty={terms.length_penalty:g}, this run "
                f"{expected.length_penalty:g}; start it with the same"
            )

    def _drop_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Translate errors of HTTP and of the weight group into Unavailable, ConfigError or TawinError.

        A server that hangs inside the block is Unavailable after ``rollout.server_silent_s``.
        """
        with watched(self._data_url, self._cfg.server_silent_s, self.abort) as watch, self._named_errors(watch):
            yield

    @contextlib.contextmanager
    def _named_errors(self, watch: Watch) -> Iterator[None]:
        try:
            yield
        except (httpx.TransportError, TransferError) as error:
            raise Unavailable(watch.reason or f"{type(error).__name__}: {error}") from error
        except ServerError as error:
            status, code = error.status, error.error.code
            if status == 429 or code == "paused":
                raise Unavailable(str(error), lost=False, wait=error.retry_after or 1.0) from error
            if status >= 500 or status in (408, 409, 499):
                raise Unavailable(str(error)) from error
            if status in (401, 403):
                option = "rollout.api_key_file and rollout.control_token_file (empty = control_token beside it)"
                raise ConfigError(f"rollout.servers: {self.name} rejects the key: {error}; see {option}") from error
            if code in ("other_model", "other_precision"):
                raise ConfigError(f"rollout.servers: {self.name} serves another model: {error}") from error
            raise TawinError(f"generation server {self.name} rejected the request: {error}") from error


@contextlib.contextmanager
def _request_error_first(response: Future[Any]) -> Iterator[None]:
    """Raise the request's error instead of the group's when both fail: it names the cause."""
    try:
        yield
    except TransferError:
        if response.done():
            response.result()
        raise


def _addresses(file: Path) -> tuple[str, str]:
    """URLs of data plane and control plane. Raises Unavailable without the file, ConfigError for an invalid one."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise Unavailable(f"there is no {file} ({error.strerror}); the server writes it when it is ready") from error
    try:
        addresses = json.loads(text)
        return str(addresses["data"]), str(addresses["control"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"rollout.servers: {file} is no address.json of a server; it needs data and control, each http://HOST:PORT"
        ) from error


def _own_address(url: str) -> str:
    """The address of this machine on the route to the host of ``url``; nothing is sent."""
    host = urlsplit(url).hostname or ""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Unavailable(f"{host} cannot be resolved ({error})") from error
