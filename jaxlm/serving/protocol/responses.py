"""What answers look like, field by field, as OpenAI's clients read them and as /openapi.json publishes it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_serializer

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class CompletionLogprobs(BaseModel):
    """A list entry a token; the first token of an echoed prompt has none."""

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
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="of the token's text; null where it is a part of a character")


class ChatLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class Chat(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _what_is_there(self, dump):
        return {name: value for name, value in dump(self).items() if value is not None}


class ChatDelta(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None


class Translated(BaseModel):
    text: str
    score: float | None = Field(description="log-probability over length ** length_penalty; null of a blank sentence")


class Translation(Translated):
    alternatives: list[Translated]


class Translations(BaseModel):
    object: Literal["translation"] = "translation"
    model: str
    translations: list[Translation]
    usage: Usage


class Candidate(BaseModel):
    id: int
    text: str
    probability: float


class AttentionMap(BaseModel):
    kind: Literal["self", "encoder", "cross"]
    layer: int
    layers: int
    rows: list[str] = Field(description="the tokens that look")
    columns: list[str] = Field(description="the tokens that are looked at")
    weights: list[list[list[float]]] = Field(description="[head][row][column]; rows sum to 1")


class Attribution(BaseModel):
    method: Literal["integrated_gradients", "gradient_x_input"]
    token: Candidate = Field(description="what is explained: why this comes next")
    tokens: list[str] = Field(description="of the text; of a translation model those of the source, then the target's")
    scores: list[float] = Field(description="how much each token adds to the explained token's log-probability")
    total: float = Field(description="the log-probability of it, less that at the baseline; what integrated gradients "
                         "add up to")


class Inspection(BaseModel):
    object: Literal["inspection"] = "inspection"
    model: str
    next: list[Candidate]
    attribution: Attribution
    attention: list[AttentionMap]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["jaxlm"] = "jaxlm"
    kind: Literal["decoder", "seq2seq"] = Field(description="seq2seq models translate, decoders generate")
    chat: bool = Field(description="whether it has a chat template")
    context: int = Field(description="tokens of prompt and answer together, or of a source")
    parameters: int
    bytes_in_memory: int
    recipe: str | None = Field(description="what it was compressed by")
    layers: int
    languages: list[str]
    target_language: str | None


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Health(BaseModel):
    status: Literal["ok", "draining"]
