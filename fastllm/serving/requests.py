"""Requests to `/v1/completions`: their schema, and prompts as token ids."""

import codecs
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fastllm.command import describe_error
from fastllm.generation.text_stream import Prompt, encode_prompt
from fastllm.serving.errors import ApiError
from fastllm.tokenization import Tokenizer


def _prompts(value: Any) -> list[str | list[int]]:
    def is_ids(item: Any) -> bool:
        return isinstance(item, list) and all(type(token) is int for token in item)

    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if is_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value) or all(map(is_ids, value)):
            return value
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of those")


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _unsupported(value: Any) -> Any:
    if value:
        raise ValueError("is not supported; leave it out")
    return value


Unsupported = Annotated[Any, AfterValidator(_unsupported)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`: OpenAI's parameters and further ways of sampling."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 16
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**63)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=1e-37, lt=1e38)] = 1.0
    n: Annotated[int, Field(ge=1, lt=2**31)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(_stops),
        Field(max_length=4),
    ] = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    user: str | None = None
    best_of: int | None = None
    suffix: Unsupported = None
    presence_penalty: Unsupported = None
    frequency_penalty: Unsupported = None
    logit_bias: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if len(values) > 100:  # listing an error for each would take long
                raise ValueError(f"{len(values):,} fields are more than any request has")
            return {name: value for name, value in values.items() if value is not None}
        return values

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported unless it equals n; leave it out")
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether the tokens of the prompts get log probabilities."""
        return self.echo and self.logprobs is not None


def parse_request(body: bytes) -> CompletionRequest:
    """Raises `ApiError` 400 if the body is not JSON, 422 if it does not fit the schema."""
    try:
        return CompletionRequest.model_validate_json(body.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not JSON: {first['ctx']['error']}") from None
        message = describe_error(error)
        if len(message) > 1000:  # it quotes the input
            message = message[:1000] + " ..."
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(422, message, param) from None


def encode_prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    """Raises `ApiError` 400 if a prompt is empty or cannot be encoded."""
    prompts = []
    for prompt in request.prompt:
        try:
            encoded = encode_prompt(tokenizer, prompt)
        except (KeyError, ValueError) as error:  # str() of a KeyError would add quotes
            raise ApiError(400, str(error.args[0]), "prompt") from None
        if not encoded.tokens:
            raise ApiError(400, "the prompt is empty; give at least one token", "prompt")
        prompts.append(encoded)
    return prompts
