"""Pydantic models of the control plane's requests and replies; names follow SGLang where it has the same route."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, computed_field, model_validator

from tawin_nemo.api.schema import Strict, Versions

Name = Annotated[StrictStr, Field(min_length=1, max_length=512)]
#: Versions end far below the numbers that JSON readers and counters round.
Version = Annotated[StrictInt, Field(ge=1, le=2**53 - 1)]
Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]


class UpdateWeights(Strict):
    """Body of `POST /update_weights_from_disk`."""

    model_path: Name = Field(description="a stage (RUN_DIR/rl), a step_N, or a Hugging Face folder, below serve.roots")
    weight_version: Version | None = Field(
        None, description="version of the new weights, above the current one; default: the current one + 1"
    )


class InitGroup(Strict):
    """Body of `POST /init_weights_update_group`: the process group to join, whose rank 0 is the sender of weights."""

    master_address: Name = Field(description="host of the sender's TCPStore")
    master_port: Annotated[StrictInt, Field(ge=1, le=65535)]
    rank_offset: Annotated[StrictInt, Field(ge=1)] = Field(1, description="this server's rank; the sender is rank 0")
    world_size: Annotated[StrictInt, Field(ge=2)] = Field(2, description="the sender and one rank for every server")
    group_name: Name = Field("weight_update_group", description="prefix of the group's keys in the store")
    backend: Literal["nccl", "gloo"] = "nccl"
    timeout_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = Field(
        300.0, description="seconds to wait for the other ranks, now and in every update"
    )


class UpdateFromDistributed(Strict):
    """Body of `POST /update_weights_from_distributed`: the tensors that rank 0 of the group broadcasts next."""

    names: list[Name] = Field(min_length=1, description="Hugging Face names, in the order in which they are broadcast")
    dtypes: list[Name] = Field(description="bfloat16 or float32; one per name")
    shapes: list[list[Annotated[StrictInt, Field(ge=0)]]] = Field(description="shape of each tensor; one per name")
    group_name: Name = "weight_update_group"
    weight_version: Version | None = Field(
        None, description="version of the new weights, above the current one; default: the current one + 1"
    )
    flush_cache: StrictBool = Field(
        True, description="accepted for compatibility with SGLang; the server keeps no cache of results"
    )


class DestroyGroup(Strict):
    """Body of `POST /destroy_weights_update_group`."""

    group_name: Name = "weight_update_group"


class Pause(Strict):
    """Body of `POST /pause_generation`, `/drain` and `/shutdown`."""

    wait_s: Seconds = Field(0.0, description="seconds to wait for running requests")
    abort: StrictBool = Field(False, description="abort waiting and running requests")


class Nothing(Strict):
    """An empty body."""


class ItemToAdd(Strict):
    """An item to add to the catalog."""

    external_id: Name
    title: Annotated[StrictStr, Field(min_length=1, max_length=4096)]
    codes: list[Name] = Field(
        default_factory=list, description="semantic ID, for a catalog of semantic IDs; empty for a catalog of titles"
    )


class Change(Strict):
    """Body of `POST /catalog/items`: items to add and external ids to remove."""

    add: list[ItemToAdd] = Field(default_factory=list)
    remove: list[Name] = Field(default_factory=list, description="external ids of items to remove")


class Build(Change):
    """Body of `POST /catalog/build`: a whole new catalog from a file, or changes to the active one."""

    path: Name | None = Field(
        None, description="JSON lines file below serve.roots with the whole new catalog; excludes add and remove"
    )


class Candidate(Strict):
    """Body of `POST /catalog/validate` and `/catalog/activate`: the version of a candidate catalog."""

    catalog_version: Version

    @model_validator(mode="before")
    @classmethod
    def _accept_the_old_spelling(cls, body: Any) -> Any:
        """Callers of releases that spelled the field ``catalogue_version`` keep working."""
        if isinstance(body, dict) and "catalogue_version" in body and "catalog_version" not in body:
            return {("catalog_version" if name == "catalogue_version" else name): value for name, value in body.items()}
        return body


class Reply(Versions):
    """Reply of the routes that change the server; `message` says in words what was done."""

    success: bool = True
    message: str = ""


class CatalogReply(Reply):
    """Reply of the catalog routes: the candidate catalog, and the versions that are active after the call."""

    candidate: int | None = Field(None, description="version of the candidate catalog")
    items: int
    paths: int
    fingerprint: str
    validated: bool


class DeprecatedCatalogReply(CatalogReply):
    """The reply of the deprecated ``/catalogue/...`` routes, with the version under both spellings."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def catalogue_version(self) -> int:
        """The same as ``catalog_version``."""
        return self.catalog_version


class StatusReply(Versions):
    """Reply of `GET /status`."""

    state: str = Field(description="serving, paused or draining")
    requests: int = Field(description="waiting and running requests")
    candidates: list[int]
    weights_in_memory: list[int]
    catalogs_in_memory: list[int]
    weight_update_group: str | None = Field(None, description="name of the current process group for weight updates")
    followed_version: str | None = Field(None, description="published version in use (`serve.follow`)")
    refused_version: str | None = Field(None, description="published version that could not be used, and why")
