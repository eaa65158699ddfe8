"""Models of the bodies that clients send: OpenAI's fields, and those that vLLM adds, with their bounds.

A field that is unknown is refused, unless it is null, or listed in `WITHOUT_EFFECT`: a client that asks for what this
server does not do learns of it.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from dsa_jax.server.errors import conflict
from dsa_jax.strict_json import shown_name

MAX_PROMPTS = 128  # of a request
MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_SCHEMA_TEXT = 100_000  # characters of a regular expression or a grammar

# Said to OpenAI's own service, about its storage, its accounts and its prices.
WITHOUT_EFFECT = frozenset(
    "user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention annotations".split()
)


def _described(words: str) -> WrapValidator:
    """Says in one line what a field of several types may be, where pydantic has a line for each type."""

    def check(value, handler):
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("one_of", "{words}", {"words": words}) from None

    return WrapValidator(check)


TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]
Prompt = Annotated[
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[TokenIds, Field(min_length=1)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
    _described(f"must be a text, token ids, or a list of 1 to {MAX_PROMPTS} texts or lists of token ids"),
]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)],
    _described(f"must be a text of 1 to {MAX_STOP_LENGTH} characters, or up to {MAX_STOPS} of them"),
]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """Refuses fields that it does not know."""

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, json_schema_extra={"additionalProperties": False}
    )

    @model_validator(mode="after")
    def _refuse_unknown(self) -> Self:
        extra = self.model_extra or {}
        unknown = sorted(name for name, value in extra.items() if value is not None and name not in WITHOUT_EFFECT)
        if unknown:
            names = ", ".join(map(shown_name, unknown[:8])) + (", …" if len(unknown) > 8 else "")
            raise conflict(unknown[0], f"these fields are not supported: {names}")
        return self


class StreamOptions(Body):
    """Says what a stream tells besides."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: bool | None = None  # pads events against guesses from their lengths; none is added


class Constraint(Body):
    """Constrains the output, as vLLM's `structured_outputs`: exactly one is given."""

    json_schema: str | dict[str, Any] | None = Field(None, alias="json")
    regex: Annotated[str, Field(max_length=MAX_SCHEMA_TEXT)] | None = None
    grammar: Annotated[str, Field(max_length=MAX_SCHEMA_TEXT)] | None = None
    json_object: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum([self.json_schema is not None, self.regex is not None, self.grammar is not None, self.json_object]) != 1:
            raise conflict("structured_outputs", "must hold exactly one of json, regex, grammar and json_object")
        return self


class Sampling(Body):
    """Says how to continue, in the fields that both endpoints have."""

    model: str | None = None
    n: Annotated[int, BeforeValidator(lambda n: 1 if n is None else n)] = Field(1, ge=1, le=MAX_N)
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[int, Bias], Field(max_length=MAX_BIASES)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # vLLM's
    top_k: int | None = Field(0, ge=-1)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, gt=0, le=2)
    min_tokens: int | None = Field(0, ge=0)
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_BIASES)] | None = None
    ignore_eos: bool | None = False
    structured_outputs: Constraint | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "stream_options needs stream to be true")
        return self


class CompletionRequest(Sampling):
    """Asks for continuations of prompts."""

    prompt: Prompt
    max_tokens: int | None = Field(16, ge=0)
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.suffix:
            raise conflict("suffix", "suffix: filling in before a text is not supported")
        if self.best_of is not None and self.best_of != self.n:
            raise conflict("best_of", "best_of must equal n: all that is drawn is returned")
        return self


class TextPart(Body):
    """Holds a piece of a message's text."""

    type: Literal["text"]
    text: str


class Function(Body):
    """Names a function and its arguments, as JSON."""

    name: str
    arguments: str


class ToolCall(Body):
    """Holds a call that the model has made."""

    id: str
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


Content = Annotated[str | list[TextPart], _described('must be a text, or a list of {"type": "text", "text": …}')]


class Message(Body):
    """Holds a message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant"):
            raise conflict("content", "content must be given, but in messages of the assistant")
        return self


class FunctionDefinition(Body):
    """Describes a function to the model."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """Offers a function to the model."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """Names a function."""

    name: str


class NamedTool(Body):
    """Demands a call of one function."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    """Holds the schema that an answer must meet."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Says what an answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise conflict("response_format", "json_schema must be given with the type json_schema, and only then")
        return self


class Thinking(Body):
    """Switches thinking, as DeepSeek's service has it."""

    type: Literal["enabled", "disabled"]


class ChatRequest(Sampling):
    """Asks for answers to a conversation."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Literal[True] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise conflict("top_logprobs", "top_logprobs needs logprobs to be true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise conflict("tool_choice", "tool_choice needs tools")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise conflict("tool_choice", "tool_choice must name one of tools")
        if len(set(names)) < len(names):
            raise conflict("tools", "tools must have names that differ")
        return self


class TokenizeRequest(Body):
    """Asks for the tokens of a text, or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "the body must hold either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """Asks for the text of tokens."""

    model: str | None = None
    tokens: TokenIds
