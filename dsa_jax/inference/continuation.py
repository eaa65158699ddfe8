"""One continuation of a request, from its checks to what it hands back."""

import dataclasses
import functools
from typing import Any

import numpy as np

from dsa_jax.inference.params import MAX_BIASES, Finished, PromptToken, Record, SamplingParams, Token, Top
from dsa_jax.inference.pieces import Scored, join_parts
from dsa_jax.inference.sampling import Likeliest
from dsa_jax.inference.scheduler import Sequence, Work
from dsa_jax.inference.structured import Constraint
from dsa_jax.inference.text import TextStream


@dataclasses.dataclass(eq=False, kw_only=True)
class Continuation(Sequence):
    """Holds one continuation of a request.

    Attributes:
      request: the number that `Engine.add` gave.
      index: of the continuation, below n.
      params: the request's.
      seed: its own.
      stops: tokens that end it.
      text: what has become of its tokens, if the engine has a tokenizer.
      constraint: what may come next, where outputs are structured.
      scores: of its prompt, where they are wanted.
      trace: what it records for training, where that is wanted.
    """

    request: int
    index: int
    params: SamplingParams
    seed: int
    stops: frozenset[int]
    text: TextStream | None
    constraint: Constraint | None = None
    scores: "PromptScores | None" = None
    trace: "Trace | None" = None

    @property
    def is_penalised(self) -> bool:
        """Tells whether its draws depend on the tokens that it has."""
        params = self.params
        return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)

    @property
    def takes_drafts(self) -> bool:
        """Tells whether its draws depend on no token before but by logits, and nothing is recorded of each token."""
        return not self.is_penalised and self.constraint is None and self.trace is None

    def settings(self, vocab: int) -> tuple[float, int, float, int, bool]:
        """Returns its temperature, top-k, top-p, seed, and whether its draws need nothing else."""
        params = self.params
        top_k = min(params.top_k, vocab) if params.top_k > 0 else vocab
        return params.temperature, top_k, params.top_p, self.seed, self._is_plain

    @functools.cached_property
    def _is_plain(self) -> bool:
        params = self.params
        changed = self.is_penalised or params.min_p > 0 or params.logit_bias or params.min_tokens and self.stops
        return not changed and params.logprobs is None and self.constraint is None

    def push(self, token: int) -> tuple[str, Finished | None, str | None]:
        """Takes in its next token; returns the text that has become final, and why it ends there, if it does."""
        ends = self.constraint is not None and self.constraint.take(token)
        self.tokens.append(token)
        may_stop = len(self.tokens) > self.params.min_tokens
        ends |= may_stop and token in self.stops
        text = "" if ends or self.text is None else self.text.push(token, may_stop=may_stop)
        if self.constraint is not None and self.constraint.error:
            return text, "error", self.constraint.error
        if ends or self.text is not None and self.text.stopped or self.constraint is not None and self.constraint.ended:
            return text, "stop", None
        return text, "length" if len(self.tokens) == self.max_tokens else None, None

    def is_again(self, number: int, token: int) -> bool:
        """Takes in a token that was generated anew; returns whether it is the same."""
        if self.constraint is not None:
            self.constraint.take(token)
        return self.tokens[number] == token

    def token(
        self,
        token: int | None = None,
        log_prob: float | None = None,
        text: str = "",
        likeliest: tuple[float | None, Top | None] = (None, None),
    ) -> Token:
        """Makes what tells of a token; the first tells of the prompt too, if that is wanted."""
        prompt = None if self.scores is None else self.scores.tell()
        return Token(self.request, self.index, token, log_prob, text, None, None, *likeliest, prompt)

    def top(self, likeliest: Likeliest | None, row: int) -> tuple[float | None, Top | None]:
        """Returns the log-probability of a row's token, and its likeliest ones, as many as are wanted."""
        if self.params.logprobs is None or likeliest is None:
            return None, None
        return float(likeliest.log_prob[row]), _top(likeliest, row, self.params.logprobs)


class PromptScores:
    """Collects how likely the tokens of a prompt are.

    Args:
      prompt: int32 [T].
      count: how many likeliest ones are wanted of each.
    """

    def __init__(self, prompt: np.ndarray, count: int):
        self.prompt, self.count = prompt, count
        self._told = False
        self._found: dict[int, PromptToken] = {0: PromptToken(int(prompt[0]), None, None)}

    def targets(self, work: Work) -> np.ndarray:
        """Returns what stands behind each token of a piece; 0 behind the last of all."""
        behind = work.sequence.known[work.begin + 1 : work.begin + work.count + 1]
        return np.pad(behind, (0, work.count - len(behind)))

    def add(self, begin: int, scored: Scored) -> None:
        """Takes in the scores of a piece whose first token is at `begin`."""
        scores = scored.read()
        for row in range(min(scored.piece.count, len(self.prompt) - 1 - begin)):
            place = begin + row + 1
            top = _top(scores, row, self.count)
            self._found[place] = PromptToken(int(self.prompt[place]), float(scores.log_prob[row]), top)

    def tell(self) -> tuple[PromptToken, ...] | None:
        """Returns all tokens of the prompt, once, when all its pieces have been taken in."""
        if self._told or len(self._found) < len(self.prompt):
            return None
        self._told = True
        return tuple(self._found[place] for place in range(len(self.prompt)))


class Trace:
    """Collects what a continuation records for training.

    What a token recorded first stays: where a sequence was preempted and is computed anew, that is what led to its
    tokens.
    """

    def __init__(self, params: SamplingParams):
        wanted = dict(selected=params.return_selected, routed=params.return_routed)
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name, asked in wanted.items() if asked}
        self._kept: list[np.ndarray] | None = [] if params.return_kept else None
        self._length = 0

    @property
    def keeps(self) -> bool:
        """Tells whether the tokens that could be drawn are wanted."""
        return self._kept is not None

    def add(self, begin: int, found: dict[str, Any]) -> None:
        """Takes in what tokens from position `begin` on have selected, [layers, T, K], and where they were routed."""
        for name, parts in self._parts.items():
            parts.append(np.asarray(found[name])[:, self._length - begin :])
        if self._parts:
            self._length = max(self._length, begin + next(iter(found.values())).shape[1])

    def add_kept(self, number: int, ids: np.ndarray) -> None:
        """Takes in the tokens that could be drawn as the `number`-th."""
        if self._kept is not None and number == len(self._kept):
            self._kept.append(ids)

    def record(self) -> Record:
        """Returns all of it."""
        joined = {name: _join(parts) for name, parts in self._parts.items()}
        kept = None if self._kept is None else tuple(self._kept)
        return Record(joined.get("selected"), joined.get("routed"), kept)


def check_biases(params: SamplingParams, stops: frozenset[int], vocab: int) -> None:
    """Raises ValueError unless all tokens are in the vocabulary, and few enough are changed."""
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        wrong = [each for each in ids if not 0 <= each < vocab]
        if wrong:
            raise ValueError(f"{name} must be tokens in [0, {vocab}), got {wrong[0]}")
    count = len(params.logit_bias) + (len(stops) if params.min_tokens else 0)
    if count > MAX_BIASES:
        raise ValueError(f"logit_bias and what min_tokens forbids must be at most {MAX_BIASES} tokens, got {count}")


def _top(likeliest, row, count) -> Top:
    return tuple(zip(likeliest.ids[row, :count].tolist(), likeliest.log_probs[row, :count].tolist(), strict=True))


def _join(parts):
    """Joins the parts of a sequence, as wide as the widest."""
    width = max((part.shape[2] for part in parts), default=0)
    return join_parts(parts, width) if parts else np.zeros((0, 0, 0), np.int32)
