"""Single tokens as text and as bytes, which a tokenizer's decoder does not give of parts of characters."""

import functools
from typing import Any

from llguidance import LLTokenizer


class Vocabulary:
    """Spells tokens.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      size: of the model's vocabulary, which may be larger.
    """

    def __init__(self, tokenizer: Any, size: int):
        self._tokenizer, self._size = tokenizer, max(size, tokenizer.get_vocab_size())

    @functools.cached_property
    def _bytes(self) -> LLTokenizer:
        return LLTokenizer(self._tokenizer.to_str(), n_vocab=self._size + 1, eos_token=self._size)  # it insists on one

    def bytes(self, token: int) -> bytes:
        """Returns what a token stands for; of a special token its name."""
        return self._bytes.decode_bytes([token])

    def text(self, token: int) -> str:
        """Returns a token's text, or `bytes:\\xe2\\x80` where it is no whole characters: texts of two tokens differ."""
        data = self.bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
