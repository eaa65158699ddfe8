"""Structured outputs: llguidance tells of each token whether it may come next.

A grammar is compiled before its request enters the engine, in a thread of its own, so that a slow one delays nobody
else. Its size, its compilation and every step of it are bounded.
"""

import concurrent.futures
import functools
import importlib.util
import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from dsa_jax.inference.params import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMAR = 64 * 1024  # characters
MAX_GRAMMAR_SYMBOLS = 100_000  # after expansion: `{1,5000}` is short to write
COMPILE_SECONDS = 10.0
KEPT_GRAMMARS = 64  # compiled ones that are kept, for the requests that bring them again
COMPILERS = 2  # grammars compiled at a time


class Constraint:
    """Follows one continuation through its grammar.

    Attributes:
      mask: uint32 [ceil(vocab / 32)], a bit for each token that may come next, the lowest bit for the lowest id.
      ended: whether no text may follow.
      error: why the grammar cannot go on, or None.
    """

    def __init__(self, matcher: "LLMatcher", vocab: int):
        self._matcher = matcher
        self._taken = 0
        self.mask = np.zeros(-(-vocab // 32), np.uint32)
        self._look()

    def begin(self, tokens: list[int]) -> None:
        """Goes back to the beginning and takes tokens in, unless it has taken in just so many."""
        if self._taken != len(tokens):
            self._matcher.reset()
            self._matcher.consume_tokens(tokens)
            self._taken = len(tokens)
            self._look()

    def take(self, token: int) -> bool:
        """Takes a token in; returns whether it was one that ends the text."""
        self._matcher.consume_token(token)
        self._taken += 1
        self._look()
        return self._matcher.stop_reason() == "EndOfSentence"

    def fork(self) -> "Constraint":
        """Returns another one at the same place."""
        return Constraint(self._matcher.deep_copy(), 32 * len(self.mask))

    def _look(self) -> None:
        """Finds out what may come next."""
        self.mask = np.zeros_like(self.mask)  # a step under way may still read the one before
        self._matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        self.error = self._matcher.get_error() if self._matcher.is_error() else None
        self.ended = self._matcher.is_stopped()


class Grammars:
    """Compiles grammars over one tokenizer, each once.

    Args:
      tokenizer: of the model.
      vocab: how many logits it has.
      end_tokens: end a text where its grammar lets it end.

    Raises:
      ImportError: if llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, end_tokens: frozenset[int]):
        if importlib.util.find_spec("llguidance") is None:
            raise ImportError("structured_outputs need llguidance: pip install dsa-jax[serve]")
        self._tokenizer, self._vocab, self._end_tokens = tokenizer, vocab, end_tokens
        self._read: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammar")
        self._compiled = functools.lru_cache(KEPT_GRAMMARS)(self._compile)

    def begin(self, wanted: StructuredOutputs) -> Constraint:
        """Returns a constraint at the beginning of its grammar; compiles that in a thread, for so long at most.

        Raises:
          ValueError: for a grammar that is wrong, too large or too slow.
        """
        kind, text = _source(wanted)
        if len(text) > MAX_GRAMMAR:
            raise ValueError(f"{kind} must be at most {MAX_GRAMMAR} characters, got {len(text)}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{kind} must be Unicode, got a lone surrogate")
        try:
            return self._pool.submit(self._compiled, kind, text).result(COMPILE_SECONDS).fork()
        except concurrent.futures.TimeoutError:
            raise ValueError(f"{kind} must compile within {COMPILE_SECONDS:g} seconds, got a slower one") from None

    def _compile(self, kind, text) -> Constraint:
        from llguidance import LLMatcher, LLParserLimits

        make = {
            "json": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
            "grammar": LLMatcher.grammar_from_lark,
        }[kind]
        limits = LLParserLimits(max_grammar_size=MAX_GRAMMAR_SYMBOLS, verbose_errors=False)
        matcher = LLMatcher(self._vocabulary(), make(text), limits=limits, log_level=0)
        if matcher.is_error():
            raise ValueError(f"{kind} must be one that llguidance takes, got {_one_line(matcher.get_error())}")
        return Constraint(matcher, self._vocab)

    def _vocabulary(self) -> "LLTokenizer":
        """Reads the tokenizer, once: of a large one it takes a second."""
        from llguidance import LLTokenizer

        with self._lock:
            if self._read is None:
                ends = sorted(self._end_tokens) or None
                self._read = LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocab, eos_token=ends)
            return self._read


def _source(wanted: StructuredOutputs) -> tuple[str, str]:
    """Returns the kind of a grammar, and its text."""
    if wanted.json_object:
        return "json", '{"type": "object"}'
    if wanted.json is not None:
        return "json", wanted.json if isinstance(wanted.json, str) else _dump(wanted.json)
    return ("regex", wanted.regex) if wanted.regex is not None else ("grammar", wanted.grammar or "")


def _dump(schema: Any) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json must be a JSON schema, got {_one_line(str(error))}") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
