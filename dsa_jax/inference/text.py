"""Tokens from text, in which nothing is a control token, and text from tokens as they come.

Text that comes has no half characters, and nothing of a stop string.
"""

import functools
import json
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

WINDOW = 16  # tokens that are waited for until they make whole characters


def encode_text(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Returns the tokens of a text; the spelling of an added or special token in it becomes ordinary tokens.

    Args:
      tokenizer: of the model. Its first text of all takes a second, in which a copy without added tokens is made.
      text: without lone surrogates.
      add_special_tokens: whether the tokens that the tokenizer puts before and behind every text are wanted.

    Raises:
      ValueError: for a lone surrogate, or another kind of tokenizer.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"text needs a tokenizers.Tokenizer, got {type(tokenizer).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be Unicode, got a lone surrogate at character {error.start}") from None
    # A batch: a single text would be encoded with the interpreter locked, and every other thread would wait.
    (encoded,) = _literal(tokenizer).encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoded.ids


@functools.lru_cache(maxsize=8)
def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """Copies a tokenizer without its added tokens, to which no text then leads; all other ids stay."""
    spec = json.loads(tokenizer.to_str())
    # A letter that was added, but controls nothing, stays: the model's vocabulary of letters may have no other.
    added = [token["content"] for token in spec["added_tokens"] if len(token["content"]) > 1 or token["special"]]
    names = {content: f"<{secrets.token_hex(16)}>" for content in added}
    spec |= dict(added_tokens=[], truncation=None, padding=None)
    # The model's own vocabulary may spell them too: under a name that nobody can guess they are still there for the
    # model's unknown token, and no text has it.
    model: dict[str, Any] = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not names.keys() & {*merge, "".join(merge)}]
    return Tokenizer.from_str(json.dumps(spec))


class Decoder(Protocol):
    """Turns tokens into text, as tokenizers of Hugging Face do."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens."""
        ...


class TextStream:
    """Turns tokens into text that is final: what may yet become a stop string is held back.

    Attributes:
      text: what is final.
      stopped: whether a stop string came; `text` ends before it.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._decoder, self._stops = decoder, stops
        self._ids: list[int] = []  # the last tokens: those that are read, then those that are not
        self._read = 0
        self._held = ""

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Takes a token in; returns the text that has become final.

        Args:
          token: the next one.
          may_stop: whether a stop string that it completes counts.
        """
        if self.stopped:
            return ""
        self._held += self._decode(token)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found and may_stop:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._possible())

    def finish(self) -> str:
        """Returns the text that was held back, when no token follows."""
        if self.stopped:
            return ""
        self._held += self._new(whole=False)
        return self._release(len(self._held))

    def _decode(self, token) -> str:
        self._ids.append(token)
        return self._new(whole=len(self._ids) - self._read < WINDOW)

    def _new(self, *, whole) -> str:
        """Returns the text of the tokens that are not read, behind that of those that are: spaces depend on these."""
        before = self._decoder.decode(self._ids[: self._read])
        text = self._decoder.decode(self._ids)
        if whole and text.endswith("\ufffd"):
            return ""
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return text[len(before) :]

    def _possible(self) -> int:
        """Counts the characters at the end that a stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0

    def _release(self, count) -> str:
        out, self._held = self._held[:count], self._held[count:]
        self.text += out
        return out
