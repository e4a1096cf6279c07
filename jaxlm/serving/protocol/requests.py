"""The schemas of requests, field by field: what is checked here is what /openapi.json publishes.

Names and limits of fields are OpenAI's, or vLLM's for fields that OpenAI does not have. An unknown field is refused,
because ignoring it could change the response; the fields of ``IgnoredFields`` are accepted and change nothing.

A wrong body must be cheap to refuse, however large. So every list has a limit and ends at its first mistake, and a
field of several types is read as the one that its value looks like (a tagged union), not as each of them in turn.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from jaxlm.inference.engine.requests import MAX_LOGIT_BIASES, MAX_LOGPROBS

MAX_CHOICES = 128
MAX_MESSAGES = 2048
MAX_PARTS = 2048  # of the content of a message
MAX_PROMPT_TOKENS = 1 << 20
MAX_SENTENCES = 64
MAX_BEAMS = 16
MAX_INSPECTED_TOKENS = 256
MAX_RESPONSE_LOGPROBS = 1 << 17  # log-probabilities in a response: of its tokens and of their alternatives
MAX_INSPECTED_CHARACTERS = 64 * MAX_INSPECTED_TOKENS

# JSON has one kind of number, so 2.0 is accepted as an integer.
Int = Annotated[int, BeforeValidator(lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)]
Token = Annotated[Int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]

TAG_MARK = "|"  # begins the tags of unions, which are no part of a field's name
_TEXT, _LIST, _TOKENS, _LISTS = (Tag(TAG_MARK + name) for name in ("text", "list", "tokens", "lists"))


def _text_or_list(value: Any) -> str:
    """The tag of a value that should be a text or a list."""
    return (_LIST if isinstance(value, list) else _TEXT).tag


def _prompt_tag(value: Any) -> str:
    """The tag of a prompt. The first item tells what the items are."""
    if not isinstance(value, list):
        return _TEXT.tag
    match value[:1]:
        case [str()]:
            return _LIST.tag
        case [list()]:
            return _LISTS.tag
    return _TOKENS.tag


_TEXT_OR_LIST = Discriminator(_text_or_list)


class RequestModel(BaseModel):
    """Base of all requests and their parts: types are strict, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(RequestModel):
    include_usage: bool = Field(False, description="end with an event that has the usage and no choices")


class JsonSchema(RequestModel):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class IgnoredFields(RequestModel):
    """Fields that some clients send and that do not change the response."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class GenerationRequest(IgnoredFields):
    """The fields that completions and chat share. A field that is not given has the value of the model's
    generation_config.json; if that does not sample, temperature is 1."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the most likely token")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=0, le=2**31 - 1, description="0: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    n: Int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[
        Annotated[Text, _TEXT] | Annotated[list[Text], Field(max_length=16, fail_fast=True), _LIST], _TEXT_OR_LIST
    ] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = Field(None, ge=0, le=2**31 - 1)
    max_tokens: Int | None = Field(None, ge=0, le=2**31 - 1)
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MAX_LOGIT_BIASES),
    ] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Annotated[
        Annotated[str, _TEXT]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True), _LIST]
        | Annotated[Tokens, _TOKENS]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True), _LISTS],
        Discriminator(_prompt_tag),
    ] = Field(description="a text, several texts, or their tokens")
    echo: bool | None = None
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Int | None = Field(None, ge=1, le=MAX_CHOICES)
    suffix: Literal[""] | None = None


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, _TEXT] | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True), _LIST],
        _TEXT_OR_LIST,
    ]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: Int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class TranslationRequest(IgnoredFields):
    """POST /v1/translate"""

    model: str
    text: Annotated[
        Annotated[str, _TEXT]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_SENTENCES, fail_fast=True), _LIST],
        _TEXT_OR_LIST,
    ] = Field(description="a sentence, or several")
    source_language: str | None = Field(None, description="a language code of the model, if it has several")
    target_language: str | None = None
    beam: Int | None = Field(None, ge=1, le=MAX_BEAMS)
    length_penalty: float | None = Field(None, ge=-10, le=10)
    max_length: Int | None = Field(None, ge=1, le=4096, description=(
        "most tokens of a translation; by default the model's, or 2 x source + 10 and no more than 128"
    ))
    alternatives: Int = Field(0, ge=0, le=MAX_BEAMS - 1, description="other translations of each sentence")


class InspectionRequest(IgnoredFields):
    """POST /v1/inspect"""

    model: str
    text: str = Field(
        max_length=MAX_INSPECTED_CHARACTERS,
        description="the input of the model; the source text for a translation model",
    )
    target: str | None = Field(
        None, max_length=MAX_INSPECTED_CHARACTERS,
        description="for a translation model: the translation, or its beginning",
    )
    token: Token | None = Field(None, description="the next token to explain; by default the most likely one")
    method: Literal["integrated_gradients", "gradient_x_input"] = "integrated_gradients"
    steps: Int = Field(32, ge=1, le=64, description="points on the path of integrated gradients")
    layer: Int | None = Field(None, ge=0, description="the layer whose attention is returned; by default the last one")
    top: Int = Field(10, ge=1, le=50, description="how many next tokens to list")
