"""`/v1/completions`: continuations of prompts, and their scores."""

from collections.abc import Sequence
from typing import Any

from dsa_jax.inference.params import PromptToken, Token
from dsa_jax.inference.text import encode_text
from dsa_jax.server.errors import ApiError
from dsa_jax.server.jobs import (
    Usage,
    check_model,
    finish_reason,
    finite,
    head,
    make_requests,
    ranked,
    token_and_log_prob,
)
from dsa_jax.server.protocol import CompletionRequest
from dsa_jax.server.service import Service


class LogProbs:
    """Gathers the log-probabilities of a choice, in the four lists of OpenAI's older interface."""

    NAMES = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

    def __init__(self, service: Service):
        self._spell, self._offset = service.vocabulary.text, 0
        self.lists: dict[str, list[Any]] = {name: [] for name in self.NAMES}

    def add(self, tokens: Sequence[Token | PromptToken]) -> dict[str, list[Any]]:
        """Takes tokens in; returns the lists of these alone."""
        new: dict[str, list[Any]] = {name: [] for name in self.NAMES}
        for found in filter(None, map(token_and_log_prob, tokens)):
            token, log_prob, top = found
            text = self._spell(token)
            tops = None if log_prob is None else ranked(token, log_prob, top)
            values = (
                text,
                None if log_prob is None else finite(log_prob),
                tops and {self._spell(each): finite(value) for each, value in tops.items()},
                self._offset,
            )
            for name, value in zip(self.NAMES, values, strict=True):
                new[name].append(value)
            self._offset += len(text)
        for name, values in new.items():
            self.lists[name] += values
        return new


class CompletionJob:
    """Answers one request of `/v1/completions`.

    Args:
      body: what the client has sent.
      service: that runs it.
      prompts: the token ids of each prompt.
      texts: of the prompts, for `echo`.
      code: of the client's key.
    """

    def __init__(
        self, body: CompletionRequest, service: Service, prompts: list[list[int]], texts: list[str], code: str
    ):
        self._body, self._texts = body, texts
        scores = (body.logprobs or 0) if body.echo and (body.logprobs is not None or body.max_tokens == 0) else None
        self.requests = make_requests(
            body, service, prompts, code, logprobs=body.logprobs, prompt_logprobs=scores,
            max_tokens=16 if body.max_tokens is None else body.max_tokens,
        )  # fmt: skip
        self.stream = bool(body.stream)
        self._head, self._usage = head("text_completion", "cmpl", service), Usage(prompts, body)
        count = body.n * len(prompts)
        self._scores: list[tuple[PromptToken, ...]] = [()] * len(prompts)
        self._texts_out = ["" for _ in range(count)]
        self._reasons: list[str | None] = [None] * count
        self._log_probs = [LogProbs(service) if body.logprobs is not None else None for _ in range(count)]
        self._begun: set[int] = set()

    def take(self, place: int, token: Token) -> list[dict[str, Any]]:
        """Takes a token in; returns an event if there is something to tell."""
        self._usage.see(token)
        if token.prompt is not None:
            self._scores[place] = token.prompt
        index = place * self._body.n + token.index
        text, tokens = token.text, [token]
        if index not in self._begun:
            self._begun.add(index)
            if self._body.echo:
                text, tokens = self._texts[place] + text, [*self._scores[place], token]
        self._texts_out[index] += text
        self._reasons[index] = reason = finish_reason(token)
        log_probs = self._log_probs[index]
        new = None if log_probs is None else log_probs.add(tokens)
        if not (text or reason or new and new["tokens"]):
            return []
        return [self._usage.event(self._head, [_choice(index, text, new, reason)])]

    def last(self) -> list[dict[str, Any]]:
        """Returns the event of the usage, if it is wanted."""
        return self._usage.last(self._head)

    def body(self) -> dict[str, Any]:
        """Returns the whole answer."""
        choices = [
            _choice(index, text, found and found.lists, reason)
            for index, (text, found, reason) in enumerate(
                zip(self._texts_out, self._log_probs, self._reasons, strict=True)
            )
        ]
        return {**self._head, "choices": choices, "usage": self._usage.body()}


def _choice(index, text, log_probs, reason) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": reason}


def make_completion(body: CompletionRequest, service: Service, code: str) -> CompletionJob:
    """Makes the job of a request; encodes its prompts, so not on the event loop.

    Raises:
      ApiError: naming what is wrong.
    """
    check_model(body.model, service)
    if body.logprobs is not None:
        service.vocabulary.check()
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens must be at least 1 without echo, got 0", param="max_tokens")
    prompts: list[Any] = _as_list(body.prompt)
    tokenizer = service.engine.tokenizer
    try:
        ids = [
            encode_text(tokenizer, each, add_special_tokens=True) if isinstance(each, str) else each for each in prompts
        ]
    except ValueError as error:
        raise ApiError(400, str(error), param="prompt") from None
    size = service.engine.runner.config.vocab_size
    if any(token >= size for each in ids for token in each):
        raise ApiError(400, f"token ids of a prompt must be below {size:,}", param="prompt")
    texts = [""] * len(ids)
    if body.echo:
        decode = lambda each: tokenizer.decode(each, skip_special_tokens=False)  # noqa: E731
        texts = [each if isinstance(each, str) else decode(each) for each in prompts]
    return CompletionJob(body, service, ids, texts, code)


def _as_list(prompt: Any) -> list[Any]:
    """Makes a list of prompts: a text or a list of ids is one."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt
