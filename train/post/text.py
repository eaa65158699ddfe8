"""Text of episodes as tokens: prompts, turns with the marker that ends them, and observations."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from dsa_jax.chat import ChatTemplate
from dsa_jax.inference.tokenizer import byte_tokenizer, find_tokenizer
from train.checks import shown
from train.post.chat import Chat, NoTemplateError


@dataclasses.dataclass(frozen=True)
class TurnText:
    """Turns texts into tokens and back.

    Args:
      tokenizer: whose ids the model knows.
      end_of_turn: the text that ends a turn of the model; one token.
      folder: of the tokenizer, in which the template of conversations is looked for; None: there is none.

    Raises:
      ValueError: if the end of a turn is not one token.
    """

    tokenizer: Tokenizer
    end_of_turn: str
    folder: Path | None = None

    def __post_init__(self):
        if len(self._ids(self.end_of_turn)) != 1:
            ids = self._ids(self.end_of_turn)
            raise ValueError(f"end_of_turn must be one token, got {shown(self.end_of_turn)}, which is {len(ids)}")

    @classmethod
    def load(cls, path: Path | None, *, vocab_size: int, end_of_turn: str) -> Self:
        """Reads a tokenizer.json; without one tokens are bytes.

        Raises:
          ValueError: if it cannot be read, or has ids that the model has not.
        """
        if path is None:
            return cls(byte_tokenizer(), end_of_turn)
        if not path.is_file():
            raise ValueError(f"tokenizer must be a tokenizer.json, got {path}")
        tokenizer = find_tokenizer(path.parent, vocab_size) if path.name == "tokenizer.json" else None
        return cls(tokenizer or Tokenizer.from_file(str(path)), end_of_turn, path.parent)

    @property
    def end_id(self) -> int:
        """The token that ends a turn."""
        return self._end

    @functools.cached_property
    def _end(self) -> int:
        return self._ids(self.end_of_turn)[0]

    def encode(self, text: str) -> np.ndarray:
        """Encodes a prompt or an observation."""
        return np.asarray(self._ids(text), np.int32)

    def encode_turn(self, text: str) -> np.ndarray:
        """Encodes a turn of the model with its end."""
        return np.asarray([*self._ids(text), self.end_id], np.int32)

    def chat(self, messages: Any, tools: Any = None, *, thinking: bool = False) -> Chat:
        """Begins a conversation by the template of the model.

        Raises:
          ValueError: if the template cannot write these messages.
          NoTemplateError: if there is no template, or no package for it, or it knows no reasoning.
        """
        if self.template is None:
            raise NoTemplateError("prompts that are messages need the model's template: give --tokenizer, or --init")
        return Chat(self.template, self.end_id, messages, tools, thinking=thinking)

    @functools.cached_property
    def template(self) -> ChatTemplate | None:
        """The template of conversations, None without a tokenizer of a model."""
        return None if self.folder is None else ChatTemplate.of(self.folder, self.tokenizer)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decodes a turn, without the end if it has one."""
        ids = [int(token) for token in tokens]
        if ids and ids[-1] == self.end_id:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids
