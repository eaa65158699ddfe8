"""Settings and requests, which go into an engine, and tokens and counts, which come out."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

MAX_LOGPROBS = 20  # likeliest tokens that are told of: a fixed number, so that one program serves all
MAX_BIASES = 512  # tokens of a request whose logits are changed: biases, and what `min_tokens` forbids
MAX_BIAS = 100.0

Finished = Literal["stop", "length", "cancelled", "error"]

# What kind of number each setting is, in words.
_KINDS: dict[str, tuple[Any, str]] = {
    "a number": (
        int | float | np.number,
        "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty",
    ),
    "an integer": (int | np.integer, "top_k n min_tokens"),
    "an integer or None": (int | np.integer | None, "seed max_tokens logprobs prompt_logprobs"),
}


@dataclasses.dataclass(frozen=True)
class StructuredOutputs:
    """Says what text a continuation may be; exactly one is given.

    Attributes:
      json: a JSON schema, as text or as an object.
      regex: a regular expression, of the whole text.
      grammar: a grammar in Lark's notation, as llguidance reads it.
      json_object: whether any JSON object is wanted.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self):
        given = [name for name, value in vars(self).items() if value is not None and value is not False]
        if len(given) != 1:
            raise ValueError(f"structured_outputs must be one of json, regex, grammar, json_object, got {given}")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Says how to continue a prompt.

    Logits are changed in this order: penalties, `logit_bias`, what `structured_outputs` and `min_tokens` forbid,
    `temperature`. Of the distribution that this makes, a token is drawn that `min_p`, `top_k` and `top_p` all keep.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_k: the number of likeliest tokens to draw among; 0 or -1 for all.
      top_p: the probability that the tokens to draw among have together, at least.
      min_p: the least probability of a token to draw, as a share of the likeliest one's.
      repetition_penalty: divides the logit of each token of prompt and continuation if it is positive, else multiplies.
      presence_penalty: is subtracted from the logit of each token of the continuation.
      frequency_penalty: is subtracted as often as the token is in the continuation.
      logit_bias: is added to the logits of these tokens, from -100 to 100.
      seed: the same seed draws the same tokens, whatever else runs; None takes a random one.
      n: how many continuations; the i-th draws with seed + i.
      max_tokens: how many tokens at most; None for as many as there are positions; 0 only scores the prompt.
      min_tokens: before so many tokens no stop token can be drawn, and no stop text counts.
      stop: texts that end the continuation; its text ends before them.
      stop_token_ids: tokens that end the continuation; they count among its tokens, their text is left out.
      ignore_eos: whether to go on after the model's own end tokens.
      logprobs: of how many likeliest tokens the log-probabilities are wanted at each token, under the model's own
        distribution; 0 tells of the drawn one alone.
      prompt_logprobs: the same of each token of the prompt, for which no prefix is then reused.
      structured_outputs: what text the continuation may be.
      return_selected: whether its selections are wanted at its end; the engine's `Runner` must be made so.
      return_routed: whether its experts are wanted at its end; the engine's `Runner` must be made so.
      return_kept: whether the tokens that could be drawn are wanted at its end.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    return_selected: bool = False
    return_routed: bool = False
    return_kept: bool = False

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for words, (kind, names) in _KINDS.items():
            for name in names.split():
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, kind):
                    raise ValueError(f"{name} must be {words}, got {value!r}")
        if not all(isinstance(token, int | np.integer) for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must be integers, got {self.stop_token_ids!r}")
        for words, found in self._wrong().items():
            if found:
                raise ValueError(f"{words}, got {getattr(self, words.split()[0])!r}")

    def _wrong(self) -> dict[str, bool]:
        """Tells of each setting whether it is out of its range; NaN always is."""
        most = math.inf if self.max_tokens is None else self.max_tokens
        least = 1 if self.prompt_logprobs is None else 0
        count = lambda value: value is None or 0 <= value <= MAX_LOGPROBS  # noqa: E731
        return {
            "temperature must be at least 0 and finite": not 0 <= self.temperature < math.inf,
            "top_k must be at least 1, or 0 or -1 for all tokens": self.top_k < -1,
            "top_p must be in (0, 1]": not 0 < self.top_p <= 1,
            "min_p must be in [0, 1]": not 0 <= self.min_p <= 1,
            "repetition_penalty must be more than 0 and finite": not 0 < self.repetition_penalty < math.inf,
            "presence_penalty must be from -2 to 2": not -2 <= self.presence_penalty <= 2,
            "frequency_penalty must be from -2 to 2": not -2 <= self.frequency_penalty <= 2,
            f"logit_bias must be at most {MAX_BIASES} numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}": len(self.logit_bias)
            > MAX_BIASES
            or not all(-MAX_BIAS <= value <= MAX_BIAS for value in self.logit_bias.values()),
            "n must be at least 1": self.n < 1,
            f"max_tokens must be at least {least}{' without prompt_logprobs' * least}": most < least,
            "min_tokens must be from 0 to max_tokens": not 0 <= self.min_tokens <= most,
            "stop must be texts that are not empty": not all(isinstance(each, str) and each for each in self.stop),
            f"logprobs must be from 0 to {MAX_LOGPROBS}": not count(self.logprobs),
            f"prompt_logprobs must be from 0 to {MAX_LOGPROBS}": not count(self.prompt_logprobs),
        }


@dataclasses.dataclass(frozen=True)
class Request:
    """Asks for continuations of one prompt.

    Attributes:
      prompt: token ids, or text for the engine's tokenizer, in which spellings of special tokens are text.
      params: how to continue it.
      salt: prefixes are shared among requests with the same salt alone.
    """

    prompt: Any
    params: SamplingParams = SamplingParams()
    salt: str = ""


Top = tuple[tuple[int, float], ...]  # (id, log-probability), the likeliest first


class PromptToken(NamedTuple):
    """Tells of one token of a prompt how likely it was behind those before it."""

    token: int
    log_prob: float | None  # under the model's own distribution; None of the first token
    top: Top | None


class Record(NamedTuple):
    """Holds what a continuation has recorded for training; None of each that was not asked for.

    `model(tokens, selected=…, routed=…)` replays it over the tokens that went through the model: the prompt's and the
    continuation's, without the last.
    """

    selected: np.ndarray | None  # int32 [layers, n, K], positions in the sequence
    routed: np.ndarray | None  # int32 [moe_layers, n, k]
    kept: tuple[np.ndarray, ...] | None  # of each token of the continuation the ids that could be drawn, int32


class Token(NamedTuple):
    """Tells of one token of a request, or of its end."""

    request: int  # the number that `Engine.add` gave
    index: int  # of the continuation, below n
    token: int | None  # None where a request ends without one
    log_prob: float | None  # under the distribution that it was drawn from; of greedy ones at temperature 1
    text: str  # what has become final, which may lag behind the tokens
    finished: Finished | None = None
    error: str | None = None
    model_log_prob: float | None = None  # under the model's own distribution, if `logprobs` was given
    top: Top | None = None  # of that distribution, if `logprobs` was given
    prompt: tuple[PromptToken, ...] | None = None  # with the first of a request that gave `prompt_logprobs`
    record: Record | None = None  # with the last of a continuation that asked for one


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts what an engine has to do, and what it has done since it was made.

    Attributes:
      queued: continuations that wait.
      running: continuations that run.
      pages: of the cache.
      pages_used: that are not free: of what runs, and kept prefixes.
      pages_kept: of prefixes.
      prefix_hits: pages that were reused.
      prefix_asked: full pages that could have been reused at most.
      prefix_evicted: pages of prefixes that were forgotten because pages were wanted.
      preemptions: of continuations.
      prompt_tokens: of the requests that were taken in.
      generated_tokens: that were handed out.
      drafts_proposed: tokens that a drafter has proposed.
      drafts_accepted: of these, tokens that came out.
      weights_version: how often weights were exchanged.
    """

    queued: int = 0
    running: int = 0
    pages: int = 0
    pages_used: int = 0
    pages_kept: int = 0
    prefix_hits: int = 0
    prefix_asked: int = 0
    prefix_evicted: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    weights_version: int = 0
