"""The schemas of responses, field by field, as OpenAI's clients read them and as /openapi.json publishes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class CompletionLogprobs(BaseModel):
    """Lists with one entry per token. The first token of an echoed prompt has no log-probability."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = []


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """The whole response of /v1/completions, or one event of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="the bytes of the token's text; null if it is part of a character")


class ChatCompletionTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[ChatCompletionTokenLogprob]


class ChatCompletionMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatCompletionChoice(BaseModel):
    index: int
    message: ChatCompletionMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatCompletionChoice]
    usage: Usage


class ChoiceDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_nulls(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}


class ChatCompletionChunkChoice(BaseModel):
    index: int
    delta: ChoiceDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """One event of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatCompletionChunkChoice]
    usage: Usage | None = None


class ScoredText(BaseModel):
    text: str
    score: float | None = Field(description="log-probability over length ** length_penalty; null for a blank sentence")


class Translation(ScoredText):
    alternatives: list[ScoredText]


class TranslationList(BaseModel):
    object: Literal["translation"] = "translation"
    model: str
    translations: list[Translation]
    usage: Usage


class TokenCandidate(BaseModel):
    id: int
    text: str
    probability: float


class AttentionMap(BaseModel):
    kind: Literal["self", "encoder", "cross"]
    layer: int
    layers: int
    rows: list[str] = Field(description="the tokens that attend")
    columns: list[str] = Field(description="the tokens that are attended to")
    weights: list[list[list[float]]] = Field(description="[head][row][column]; rows sum to 1")


class Attribution(BaseModel):
    method: Literal["integrated_gradients", "gradient_x_input"]
    token: TokenCandidate = Field(description="the next token that is explained")
    tokens: list[str] = Field(description="the tokens of the text; for a translation model, source then target")
    scores: list[float] = Field(description="what each token adds to the log-probability of the explained token")
    total: float = Field(description="the log-probability of the explained token minus that at the baseline, which is "
                         "the sum of integrated gradients")


class Inspection(BaseModel):
    object: Literal["inspection"] = "inspection"
    model: str
    next: list[TokenCandidate]
    attribution: Attribution
    attention: list[AttentionMap]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["jaxlm"] = "jaxlm"
    kind: Literal["decoder", "seq2seq"] = Field(description="seq2seq models translate, decoders generate")
    chat: bool = Field(description="whether the model has a chat template")
    context: int = Field(description="tokens of prompt and continuation together, or of a source text")
    parameters: int
    bytes_in_memory: int
    recipe: str | None = Field(description="the recipe that compressed the model")
    layers: int
    languages: list[str]
    target_language: str | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Health(BaseModel):
    status: Literal["ok", "draining"]
