"""What requests may say, field by field: what is checked here is what /openapi.json publishes.

Fields, names and limits are OpenAI's, and for what OpenAI has not, vLLM's. A field that is not here is refused, for it
could change the answer; those in ``Neutral`` are taken and change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from jaxlm.inference.engine.requests import MAX_LOGIT_BIASES, MAX_LOGPROBS

MOST_CHOICES = 128
MOST_SENTENCES = 64
MOST_BEAMS = 16
MOST_INSPECTED = 256  # tokens

# JSON has one kind of number: 2.0 is an integer there.
Int = Annotated[int, BeforeValidator(lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)]
Token = Annotated[Int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Body):
    include_usage: bool = Field(False, description="end with an event that has the usage and no choices")


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")


class PlainText(Body):
    type: Literal["text"]


class AnyObject(Body):
    type: Literal["json_object"]


class ByJsonSchema(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainText | AnyObject | ByJsonSchema, Field(discriminator="type")]


class Neutral(Body):
    """Taken from clients that send it, without effect on the answer."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Sampled(Neutral):
    """What text generation has in common. What is not given is as the model's generation_config.json has it; where that
    does not sample, temperature is 1."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2, description="0: the likeliest token always")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=0, le=2**31 - 1, description="0: all")
    min_p: float | None = Field(None, ge=0, le=1)
    n: Int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
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


class CompletionRequest(Sampled):
    """POST /v1/completions"""

    prompt: str | Annotated[list[Token], Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | Annotated[
        list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)
    ] = Field(description="a text, several texts, or their tokens")
    echo: bool | None = None
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Int | None = Field(None, ge=1, le=MOST_CHOICES)
    suffix: Literal[""] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None


class ChatRequest(Sampled):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class TranslationRequest(Neutral):
    """POST /v1/translate"""

    model: str
    text: str | Annotated[list[str], Field(min_length=1, max_length=MOST_SENTENCES)] = Field(
        description="a sentence, or several"
    )
    source_language: str | None = Field(None, description="a code of the model's, where it has several")
    target_language: str | None = None
    beam: Int | None = Field(None, ge=1, le=MOST_BEAMS)
    length_penalty: float | None = Field(None, ge=-10, le=10)
    max_length: Int | None = Field(None, ge=1, le=4096, description="tokens of a translation")
    alternatives: Int = Field(0, ge=0, le=MOST_BEAMS - 1, description="other translations of the beam, a sentence")


class InspectRequest(Neutral):
    """POST /v1/inspect"""

    model: str
    text: str = Field(description="what the model reads; of a translation model the source")
    target: str | None = Field(None, description="of a translation model: the translation, or its beginning")
    token: Token | None = Field(None, description="explain this as the next token; the likeliest where not given")
    method: Literal["integrated_gradients", "gradient_x_input"] = "integrated_gradients"
    steps: Int = Field(32, ge=1, le=64, description="points on the path of integrated gradients")
    layer: Int | None = Field(None, ge=0, description="attention of this layer; the last where not given")
    top: Int = Field(10, ge=1, le=50, description="next tokens to list")
