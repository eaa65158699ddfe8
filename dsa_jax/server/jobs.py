"""Parts of the jobs of both endpoints: settings for the engine, limits, and the counts of tokens."""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dsa_jax.inference.params import PromptToken, Request, SamplingParams, StructuredOutputs, Token, Top
from dsa_jax.server.errors import ApiError
from dsa_jax.server.protocol import Constraint, Sampling
from dsa_jax.server.service import Service

# The fields that the engine's settings have under the same name.
SAMPLING = (
    "n max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty logit_bias seed "
    "stop stop_token_ids min_tokens ignore_eos"
).split()
REASONS = {"stop": "stop", "length": "length"}  # OpenAI's words for the ends of continuations
LEAST_LOG_PROB = -9999.0  # what clients are told of a probability of zero: JSON has no infinity


def check_model(name: str | None, service: Service) -> None:
    """Raises ApiError if a client wants another model than the one that is served."""
    own = service.settings.name
    if name is not None and name != own:
        raise ApiError(404, f"the model must be {own}, got {name!r}", param="model", code="model_not_found")


def make_requests(
    body: Sampling,
    service: Service,
    prompts: Sequence[Sequence[int]],
    code: str,
    **more: Any,
) -> list[Request]:
    """Makes a request for the engine of each prompt.

    Args:
      body: what the client has sent.
      service: whose limits hold.
      prompts: token ids.
      code: of the client's key.
      **more: further fields of SamplingParams, in place of the body's.

    Raises:
      ApiError: if it asks for more than the limits let it, or settings contradict each other.
    """
    values: dict[str, Any] = _fields(body) | more
    salt = service.keys.salt(code, body.cache_salt)
    requests = []
    for prompt in prompts:
        most = _room(len(prompt), values["max_tokens"], body.n * len(prompts), service)
        try:
            params = SamplingParams(**{**values, "max_tokens": most})
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).split()[0]) from None
        requests.append(Request(list(prompt), params, salt=salt))
    return requests


def _fields(body: Sampling) -> dict[str, Any]:
    """Returns what the client has said; null is as if a field were not there."""
    values: dict[str, Any] = {name: value for name in SAMPLING if (value := getattr(body, name)) is not None}
    constraint = body.structured_outputs
    return (
        {"max_tokens": None} | values | {"structured_outputs": None if constraint is None else _structured(constraint)}
    )


def _structured(constraint: Constraint) -> StructuredOutputs:
    return StructuredOutputs(
        json=constraint.json_schema, regex=constraint.regex, grammar=constraint.grammar,
        json_object=constraint.json_object,
    )  # fmt: skip


def _room(length: int, wanted: int | None, count: int, service: Service) -> int:
    """Returns how many tokens may follow a prompt."""
    longest, most = service.longest, service.settings.max_output
    if length == 0:
        raise ApiError(400, "a prompt must have at least one token, got none", param="prompt")
    if length + (1 if wanted is None else wanted) > longest:
        words = f"a prompt and max_tokens must fit {longest:,} tokens, got {length:,} + {wanted or 1:,}"
        raise ApiError(400, words, code="context_length_exceeded")
    if wanted is not None and wanted * count > most:
        words = f"prompts × n × max_tokens must be at most {most:,}, got {count:,} × {wanted:,}"
        raise ApiError(400, words, param="max_tokens")
    return min(longest - length, most // count) if wanted is None else wanted


class Usage:
    """Counts the tokens of a request, and tells a stream of them if its client wants that."""

    def __init__(self, prompts: Sequence[Sequence[int]], body: Sampling):
        self.prompt, self.completion = sum(map(len, prompts)), 0
        self._streams = body.stream_options is not None and body.stream_options.include_usage

    def see(self, token: Token) -> None:
        """Counts a token."""
        self.completion += token.token is not None

    def body(self) -> dict[str, int]:
        """Returns the counts as clients read them."""
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}

    def event(self, head: Mapping[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes an event of choices: where the last tells of the usage, those before it have none."""
        return {**head, "choices": choices} | ({"usage": None} if self._streams else {})

    def last(self, head: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the event of the usage, if it is wanted."""
        return [{**head, "choices": [], "usage": self.body()}] if self._streams else []


def head(kind: str, prefix: str, service: Service) -> dict[str, Any]:
    """Makes the fields that every part of an answer begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(16)}",
        "object": kind,
        "created": int(time.time()),
        "model": service.settings.name,
    }


def finite(log_prob: float) -> float:
    """Writes a log-probability so that JSON can hold it."""
    return max(log_prob, LEAST_LOG_PROB)


def ranked(token: int, log_prob: float, top: Top | None) -> dict[int, float]:
    """Returns the likeliest tokens and the one that came, in case it is none of them."""
    return {**dict(top or ()), token: log_prob}


def token_and_log_prob(token: Token | PromptToken) -> tuple[int, float | None, Top | None] | None:
    """Returns what is known of a token under the model's own distribution; None where there is no token."""
    if token.token is None:
        return None
    known = token.log_prob if isinstance(token, PromptToken) else token.model_log_prob
    return token.token, known, token.top


def finish_reason(token: Token, reasons: Mapping[str, str] = REASONS) -> str | None:
    """Returns OpenAI's word for the end that a token tells of, None if it tells of none."""
    return None if token.finished is None else reasons[token.finished]
