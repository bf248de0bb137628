"""Pydantic models of the data plane's requests and replies."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from tawin_nemo.api.field_filter import FieldFilter

#: An item by its number, or by its external id.
ItemRef = Annotated[StrictInt, Field(ge=0)] | Annotated[StrictStr, Field(min_length=1, max_length=512)]
Title = Annotated[StrictStr, Field(min_length=1, max_length=4096)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=1)]
Prompt = Annotated[StrictStr, Field(min_length=1)]
Space = Literal["trie", "vocab"]


class Strict(BaseModel):
    """Base of all request bodies: unknown fields are rejected, so that a misspelt field is never ignored silently."""

    model_config = ConfigDict(extra="forbid")


class HistoryRequest(Strict):
    """Base of requests about one user: exactly one of `history`, `history_titles` and `prompt` must be set."""

    history: list[ItemRef] | None = Field(None, description="the user's items, oldest first, by number or external id")
    history_titles: list[Title] | None = Field(None, description="the user's items, oldest first, as exact titles")
    prompt: Prompt | None = Field(None, description="a complete prompt in the format of training")
    score_space: Space | None = Field(
        None,
        description="`trie`: probabilities over admissible tokens; `vocab`: over all tokens; default: the server's",
    )
    weight_version: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="required weight version; 409 if another one is in use"
    )
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="seconds until the request is cancelled with 504; at most serve.deadline_s"
    )


class RecommendationRequest(HistoryRequest):
    """Body of `POST /v1/recommendations`: the n best catalog items for a user."""

    n: Count = Field(10, description="number of items to return")
    beams: Count | None = Field(None, description="beam width; at least n")
    exclude_history: StrictBool = Field(False, description="exclude the items of the history")
    allow: list[ItemRef] | None = Field(None, description="recommend these items only")
    deny: list[ItemRef] = Field(default_factory=list, description="never recommend these items")
    filter: FieldFilter = Field(default_factory=dict)
    exact: StrictBool = Field(
        False, description="repeat the search with twice the beams, up to serve.max_beams, until the n best are proven"
    )
    min_score: Finite | None = Field(None, description="omit items with a lower score")
    return_tokens: StrictBool = Field(False, description="return token ids, token texts and log-probs of every item")


class Versions(BaseModel):
    """The versions of weights and catalog that a reply was made with; both are counted up by the server."""

    weight_version: int
    catalog_version: int


class Recommended(BaseModel):
    """One recommended item. Token fields are set only with `return_tokens`."""

    item: int
    external_id: str
    title: str
    score: float = Field(description="sum of log-probs (rollout.assist mixed in) / length ** rollout.length_penalty")
    probability: float = Field(description="probability of the item's token path in the score space")
    tokens: list[int] | None = None
    token_texts: list[str] | None = None
    logprobs: list[float] | None = Field(
        None, description="log-prob of each token; in the trie space 0 for a token without alternatives"
    )


class RecommendationReply(Versions):
    """Reply of `POST /v1/recommendations`: items by descending score."""

    id: str
    beams: int = Field(description="beam width of the last search")
    exact: bool | None = Field(
        description="whether the items are proven to be the n best allowed ones; null with a length penalty"
    )
    items: list[Recommended]


class ScoreRequest(HistoryRequest):
    """Body of `POST /v1/score`: the log-probability of each listed item for a user."""

    items: list[ItemRef] = Field(min_length=1, description="items to score")


class Scored(BaseModel):
    """One scored item."""

    item: int
    external_id: str
    title: str
    logprob: float | None = Field(description="log-prob of the item's token path; null if the model cannot generate it")


class ScoreReply(Versions):
    """Reply of `POST /v1/score`: items in the order of the request."""

    id: str
    items: list[Scored]


class CompletionRequest(Strict):
    """Body of `POST /v1/completions`: those fields of OpenAI's completions API that apply to whole catalog items."""

    model: StrictStr
    prompt: Prompt | list[Prompt]
    n: Count = 1
    best_of: Count | None = Field(None, description="beam width with use_beam_search; at least n")
    use_beam_search: StrictBool = Field(False, description="return the n best items instead of n independent draws")
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**63 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    max_tokens: Count | None = Field(
        None, description="at least the length of the longest item, because completions are whole items"
    )
    stream: Literal[False] = False
    user: StrictStr | None = None


class CompletionLogprobs(BaseModel):
    """Tokens of a completion with their log-probabilities, in the format of OpenAI's API."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int]


class Choice(BaseModel):
    """One completion: an item's text as the model generates it, the item's number and its external id."""

    index: int
    text: str
    finish_reason: Literal["stop"] = "stop"
    logprobs: CompletionLogprobs | None = None
    item: int
    external_id: str


class Usage(BaseModel):
    """Numbers of tokens, as in OpenAI's API: prompts, completions and their sum."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionReply(Versions):
    """Reply of `POST /v1/completions`: the choices of the first prompt, then those of the second, and so on."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class RolloutRequest(Strict):
    """Body of `POST /v1/rollouts`: a batch of token prompts of a training job, for a beam search with `beams` or for
    `draws` independent draws per prompt."""

    prompts: list[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]]] = Field(
        min_length=1, description="token ids of each prompt"
    )
    beams: Count | None = Field(None, description="beam width; all candidates of the search are returned")
    draws: Count | None = Field(
        None, description="independent draws per prompt, in the trie score space; excludes beams"
    )
    seeds: list[Annotated[StrictInt, Field(ge=0, lt=2**63)]] | None = Field(
        None, description="one seed per prompt; required with draws"
    )
    temperature: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] = Field(
        1.0, description="sampling temperature of draws"
    )
    score_space: Space | None = Field(
        None,
        description="`trie`: probabilities over admissible tokens; `vocab`: over all tokens; default: the server's",
    )
    weight_version: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="required weight version; 409 if another one is in use"
    )
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="seconds until the request is cancelled with 504; at most serve.rollout_deadline_s"
    )


class RolloutTerms(Versions):
    """Reply of `GET /v1/rollouts`: what a training job must match before it uses this server, and the limits."""

    instance: str = Field(description="id of this start of the server")
    catalog: str = Field(description="fingerprint of the catalog: ids, titles and token paths in their order")
    tokenizer: str = Field(description="fingerprint of the tokenizer")
    precision: str = Field(description="number format of the model: fp32 or bf16")
    length_penalty: float
    max_beams: int
    max_body_kb: int
    token_budget: int
    row_budget: int


class Item(BaseModel):
    """One catalog item: number, external id and title."""

    item: int
    external_id: str
    title: str


class ItemsReply(Versions):
    """Reply of `GET /v1/items/search`: one page of the matching items."""

    items: list[Item]
    total: int = Field(description="number of matching items on all pages")


class ServedVersions(Versions):
    """Weights and a catalog that are, or were, in use together. `since`: when they came into use, in Unix seconds."""

    since: int


class ModelCard(Versions):
    """The served model and its catalog, in the format of OpenAI's models API; `history`: the versions before."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tawin_nemo"
    catalog: str = Field(description="fingerprint of the catalog")
    items: int
    item_fields: list[str] = Field(default_factory=list, description="fields that `filter` of a request may name")
    history: list[ServedVersions] = Field(default_factory=list, description="what a rollback goes to, newest first")


class ModelsReply(Versions):
    """Reply of `GET /v1/models`: a list with the one served model."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Reply of `GET /health`: the HTTP server answers."""

    status: str


class Ready(Versions):
    """Reply of `GET /ready`: the engine and all its `ranks` answer."""

    status: str
    ranks: int


class ErrorInfo(BaseModel):
    """An error: `message` for people, `type` and `code` for programs, `param` names the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """Body of every error response, in the format of OpenAI's API."""

    error: ErrorInfo


#: Responses with an ErrorReply by status, for the OpenAPI documents.
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorReply, "description": text}
    for code, text in {
        400: "the request is invalid or refers to something unknown",
        401: "the key is missing or wrong",
        404: "not found",
        405: "method not allowed",
        408: "the request body arrived too slowly",
        409: "conflict: for example, another weight version is in use",
        413: "the body is too large",
        429: "the queue is full; see Retry-After",
        500: "internal error",
        503: "paused, draining or not ready; see Retry-After",
        504: "the deadline passed",
    }.items()
}
