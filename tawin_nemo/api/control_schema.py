"""Requests and replies of the control plane; names and fields that SGLang users know are theirs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, computed_field, model_validator

from tawin_nemo.api.schema import Strict, Versions

Name = Annotated[StrictStr, Field(min_length=1, max_length=512)]
Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]


class UpdateWeights(Strict):
    model_path: Name = Field(description="a stage (RUN_DIR/rl), a step_N, or a Hugging Face folder, below serve.roots")
    weight_version: Annotated[StrictInt, Field(ge=1)] | None = Field(None, description="default: one more than now")


class InitGroup(Strict):
    master_address: Name = Field(description="host of the sender's TCPStore")
    master_port: Annotated[StrictInt, Field(ge=1, le=65535)]
    rank_offset: Annotated[StrictInt, Field(ge=1)] = Field(1, description="this server's rank; the sender is rank 0")
    world_size: Annotated[StrictInt, Field(ge=2)] = Field(2, description="the sender and one rank for every server")
    group_name: Name = Field("weight_update_group", description="prefix of the group's keys in the store")
    backend: Literal["nccl", "gloo"] = "nccl"
    timeout_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = Field(
        300.0, description="how long to wait for the others, then and in every update"
    )


class UpdateFromDistributed(Strict):
    names: list[Name] = Field(min_length=1, description="Hugging Face names, in the order in which they are broadcast")
    dtypes: list[Name] = Field(description="bfloat16, float32, ...; one per name")
    shapes: list[list[Annotated[StrictInt, Field(ge=0)]]] = Field(description="one per name")
    group_name: Name = "weight_update_group"
    weight_version: Annotated[StrictInt, Field(ge=1)] | None = Field(None, description="default: one more than now")
    flush_cache: StrictBool = Field(True, description="as SGLang's; no answer is ever taken from a cache here")


class DestroyGroup(Strict):
    group_name: Name = "weight_update_group"


class Pause(Strict):
    wait_s: Seconds = Field(0.0, description="wait so long for running requests to end")
    abort: StrictBool = Field(False, description="give up what waits and runs")


class Nothing(Strict):
    """A body is not needed."""


class ItemToAdd(Strict):
    external_id: Name
    title: Annotated[StrictStr, Field(min_length=1, max_length=4096)]
    codes: list[Name] = Field(default_factory=list, description="semantic ID, where the catalog is written in those")


class Change(Strict):
    add: list[ItemToAdd] = Field(default_factory=list)
    remove: list[Name] = Field(default_factory=list, description="external ids")


class Build(Change):
    path: Name | None = Field(
        None, description="JSON lines file below serve.roots: the whole new catalog; or give add and remove"
    )


class Candidate(Strict):
    catalog_version: Annotated[StrictInt, Field(ge=1)]

    @model_validator(mode="before")
    @classmethod
    def _accept_the_old_spelling(cls, body: Any) -> Any:
        """Callers of releases that spelled the field ``catalogue_version`` keep working."""
        if isinstance(body, dict) and "catalogue_version" in body and "catalog_version" not in body:
            return {("catalog_version" if name == "catalogue_version" else name): value for name, value in body.items()}
        return body


class Reply(Versions):
    success: bool = True
    message: str = ""


class CatalogReply(Reply):
    candidate: int | None = Field(None, description="version of what was built")
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
    state: str = Field(description="serving, paused, draining")
    requests: int = Field(description="that wait or run")
    candidates: list[int]
    weights_in_memory: list[int]
    catalogs_in_memory: list[int]
    weight_update_group: str | None = Field(None, description="that new weights may come through")
