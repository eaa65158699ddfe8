"""Single tokens as text and as bytes, which a tokenizer's decoder does not give of parts of characters."""

import functools

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from dsa_jax.server.errors import ApiError


class Vocabulary:
    """Spells tokens.

    Args:
      tokenizer: of the model.
      size: of the model's vocabulary, which may be larger than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, size: int):
        self._tokenizer, self._size = tokenizer, max(size, tokenizer.get_vocab_size())

    @functools.cached_property
    def _spelled(self) -> LLTokenizer:
        try:
            return LLTokenizer(self._tokenizer.to_str(), n_vocab=self._size, eos_token=0)  # it insists on an end token
        except ValueError:
            raise ApiError(400, "the tokens of this model's tokenizer have no bytes of their own") from None

    def check(self) -> None:
        """Raises ApiError if this tokenizer's tokens cannot be spelled; takes a moment once, for a large vocabulary."""
        _ = self._spelled

    def bytes(self, token: int) -> bytes:
        """Returns what a token stands for; of a special token its name."""
        return self._spelled.decode_bytes([token])

    def text(self, token: int) -> str:
        r"""Returns a token's text, or `bytes:\xe2\x80` where it is no whole characters: texts of two tokens differ."""
        data = self.bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
