"""Requests and replies of the data plane."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

#: An item by its number, or by its external id.
ItemRef = Annotated[StrictInt, Field(ge=0)] | Annotated[StrictStr, Field(min_length=1, max_length=512)]
Title = Annotated[StrictStr, Field(min_length=1, max_length=4096)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=1)]
Prompt = Annotated[StrictStr, Field(min_length=1)]
Space = Literal["trie", "vocab"]


class Strict(BaseModel):
    """Unknown fields are refused: a misspelt limit must not pass silently."""

    model_config = ConfigDict(extra="forbid")


class Reader(Strict):
    """Who is to be served, in one of three ways, and on what terms."""

    history: list[ItemRef] | None = Field(None, description="items, oldest first: numbers or external ids")
    history_titles: list[Title] | None = Field(None, description="the same by exact titles")
    prompt: Prompt | None = Field(None, description="a whole prompt as the model was trained on it")
    score_space: Space | None = Field(None, description="what beams are ranked by (default: the server's)")
    weight_version: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="answer with these weights or not at all (409)"
    )
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="give up after so many seconds (504); at most the server's own limit"
    )


class RecommendationRequest(Reader):
    n: Count = Field(10, description="results")
    beams: Count | None = Field(None, description="width of the search; at least n")
    exclude_history: StrictBool = Field(False, description="do not recommend items of the history")
    allow: list[ItemRef] | None = Field(None, description="only these items")
    deny: list[ItemRef] = Field(default_factory=list, description="none of these items")
    exact: StrictBool = Field(
        False, description="search again with twice the beams, up to the server's limit, until the n best are proven"
    )
    min_score: Finite | None = Field(None, description="leave out results that score less")
    return_tokens: StrictBool = Field(False, description="token path and log-probs of every result")


class Versions(BaseModel):
    weight_version: int
    catalog_version: int


class Recommended(BaseModel):
    item: int
    external_id: str
    title: str
    score: float = Field(description="summed log-probs, divided by length ** rollout.length_penalty")
    probability: float = Field(description="of the item's path, in the score space")
    tokens: list[int] | None = None
    token_texts: list[str] | None = None
    logprobs: list[float] | None = Field(None, description="of each token; 0 where there is no alternative")


class RecommendationReply(Versions):
    id: str
    beams: int = Field(description="width of the search that these items come from")
    exact: bool | None = Field(
        description="the items are proven to be the n best of the allowed ones; null: not known, with a length penalty"
    )
    items: list[Recommended]


class ScoreRequest(Reader):
    items: list[ItemRef] = Field(min_length=1, description="items to be scored")


class Scored(BaseModel):
    item: int
    external_id: str
    title: str
    logprob: float | None = Field(description="of the item's path; null: impossible")


class ScoreReply(Versions):
    id: str
    items: list[Scored]


class CompletionRequest(Strict):
    """The part of OpenAI's completions that means something where every answer is a catalog item."""

    model: StrictStr
    prompt: Prompt | list[Prompt]
    n: Count = 1
    best_of: Count | None = Field(None, description="beams of use_beam_search; at least n")
    use_beam_search: StrictBool = Field(False, description="the n best items; otherwise n independent draws")
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**63 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    max_tokens: Count | None = Field(None, description="not below the longest item: answers are whole items")
    stream: Literal[False] = False
    user: StrictStr | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop"] = "stop"
    logprobs: CompletionLogprobs | None = None
    item: int
    external_id: str


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionReply(Versions):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class RolloutRequest(Strict):
    """A batch of prompts for a training job: ``beams`` searches, ``draws`` draws with a seed for every prompt."""

    prompts: list[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]]] = Field(min_length=1, description="token ids")
    beams: Count | None = Field(None, description="search with so many beams; all that they find is returned")
    draws: Count | None = Field(None, description="instead: so many independent draws in trie space")
    seeds: list[Annotated[StrictInt, Field(ge=0, lt=2**63)]] | None = Field(None, description="draws: one per prompt")
    temperature: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] = Field(1.0, description="of draws")
    score_space: Space | None = Field(None, description="what beams are ranked by (default: the server's)")
    weight_version: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="answer with these weights or not at all (409)"
    )
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="give up after so many seconds (504); at most serve.rollout_deadline_s"
    )


class RolloutTerms(Versions):
    """What a training job has to agree with before it takes rollouts from here, and how much it may ask at once."""

    instance: str = Field(description="of this start of the server")
    catalog: str = Field(description="fingerprint of the catalog: ids, titles, token paths in their order")
    tokenizer: str = Field(description="fingerprint of the tokenizer")
    precision: str = Field(description="number format that searches run in")
    length_penalty: float
    max_beams: int
    max_body_kb: int
    token_budget: int
    row_budget: int


class Item(BaseModel):
    item: int
    external_id: str
    title: str


class ItemsReply(Versions):
    items: list[Item]
    total: int = Field(description="items that match, also those that are not shown")


class ModelCard(Versions):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tawin_nemo"
    catalog: str = Field(description="fingerprint of the catalog")
    items: int


class ModelsReply(Versions):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: str


class Ready(Versions):
    status: str
    ranks: int


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """As OpenAI's."""

    error: ErrorInfo


#: Statuses with an ErrorReply, for the OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorReply, "description": text}
    for code, text in {
        400: "the request cannot be understood or names what is not there",
        401: "no key, or a wrong one",
        404: "no such thing",
        405: "no such method",
        408: "the request came too slowly",
        409: "another weight version is in use",
        413: "the body is too large",
        429: "too many requests are waiting; see Retry-After",
        500: "a fault of the server",
        503: "paused, draining or not ready; see Retry-After",
        504: "the deadline passed",
    }.items()
}
