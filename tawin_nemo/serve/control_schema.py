"""Requests and replies of the control plane; names and fields that SGLang users know are theirs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictBool, StrictInt, StrictStr

from tawin_nemo.serve.schema import Strict, Versions

Name = Annotated[StrictStr, Field(min_length=1, max_length=512)]
Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]


class UpdateWeights(Strict):
    model_path: Name = Field(description="a stage (RUN_DIR/rl), a step_N, or a Hugging Face folder, below serve.roots")
    weight_version: Annotated[StrictInt, Field(ge=1)] | None = Field(None, description="default: one more than now")


class Pause(Strict):
    wait_s: Seconds = Field(0.0, description="wait so long for running requests to end")
    abort: StrictBool = Field(False, description="give up what waits and runs")


class Nothing(Strict):
    """A body is not needed."""


class ItemToAdd(Strict):
    external_id: Name
    title: Annotated[StrictStr, Field(min_length=1, max_length=4096)]
    codes: list[Name] = Field(default_factory=list, description="semantic ID, where the catalogue is written in those")


class Change(Strict):
    add: list[ItemToAdd] = Field(default_factory=list)
    remove: list[Name] = Field(default_factory=list, description="external ids")


class Build(Change):
    path: Name | None = Field(
        None, description="JSON lines file below serve.roots: the whole new catalogue; or give add and remove"
    )


class Candidate(Strict):
    catalogue_version: Annotated[StrictInt, Field(ge=1)]


class Reply(Versions):
    success: bool = True
    message: str = ""


class CatalogueReply(Reply):
    candidate: int | None = Field(None, description="version of what was built")
    items: int
    paths: int
    fingerprint: str
    validated: bool


class StatusReply(Versions):
    state: str = Field(description="serving, paused, draining")
    requests: int = Field(description="that wait or run")
    candidates: list[int]
    weights_in_memory: list[int]
    catalogues_in_memory: list[int]
