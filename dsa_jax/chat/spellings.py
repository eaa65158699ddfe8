"""Control tokens and their spellings: what a template writes is a token, what stands in a message is text.

Before a conversation is rendered, every place in its texts where the spelling of an added token begins gets another
character, of those for private use and none that occurs in the conversation. What is rendered is then split where added
tokens are spelled, which the template alone has written, and the rest gets its own characters back and is encoded as
text.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from os.path import commonprefix
from typing import Any

from tokenizers import Tokenizer

from dsa_jax.chat.messages import ROLES
from dsa_jax.inference.text import encode_text

PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # Unicode's private use


class ControlTokens:
    """Knows the added tokens of a tokenizer by their spellings."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.tokens = {token.content: token for token in tokenizer.get_added_tokens_decoder().values() if token.content}
        self.ids = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
        self._spelled = re.compile(_alternatives(sorted(self.tokens)) if self.tokens else r"(?!)", re.DOTALL)
        self._beginnings = {token[:end] for token in self.tokens for end in range(1, len(token))}
        self._longest = max(map(len, self._beginnings), default=0)

    def hide(self, value: Any) -> tuple[Any, Mapping[int, str]]:
        """Hides every spelling in the texts and keys of JSON values.

        A text's end that a spelling may begin with is hidden too: what follows could complete it.

        Returns:
          the values, and the characters to put back by `str.translate`.
        """
        used: set[str] = set()
        for text in _texts(value):
            used.update(text)
        free = (chr(code) for code in itertools.chain(*PRIVATE) if chr(code) not in used)
        try:
            stand_ins = {first: next(free) for first in sorted({token[0] for token in self.tokens})}
        except StopIteration:
            raise ValueError("messages must not use every character of Unicode's private use") from None
        hidden = _replaced(value, lambda text: self._hide(text, stand_ins))
        return hidden, str.maketrans({stand_in: first for first, stand_in in stand_ins.items()})

    def _hide(self, text: str, stand_ins: Mapping[str, str]) -> str:
        places, begin = [], 0
        while (found := self._spelled.search(text, begin)) is not None:
            places.append(found.start())
            begin = found.start() + 1  # the next may overlap this one
        tail = range(max(0, len(text) - self._longest), len(text))
        places += [place for place in tail if text[place:] in self._beginnings]
        letters = list(text) if places else []
        for place in places:
            letters[place] = stand_ins[text[place]]
        return "".join(letters) if places else text

    def encode(self, rendered: str, put_back: Mapping[int, str]) -> list[int]:
        """Encodes what a template has rendered from hidden texts."""
        ids: list[int] = []
        for part, is_token in self._parts(rendered):
            ids += [self.ids[part]] if is_token else encode_text(self._tokenizer, part.translate(put_back))
        return ids

    def _parts(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """Splits text into added tokens and what is between, without the blanks that tokens take in beside them."""
        begin, strips = 0, False
        for found in itertools.chain(self._spelled.finditer(rendered), [None]):
            text = rendered[begin : found.start() if found else None]
            token = self.tokens[found[0]] if found else None
            text = text.lstrip() if strips else text
            text = text.rstrip() if token is not None and token.lstrip else text
            if text:
                yield text, False
            if found is not None and token is not None:
                yield found[0], True
                begin, strips = found.end(), token.rstrip


def _alternatives(words: list[str]) -> str:
    """Writes a pattern of the longest of the words, as a tree: a place is given up at the first letter that fails."""
    prefix = commonprefix(words)
    rests: dict[str, list[str]] = {}
    for word in words:
        if word != prefix:
            rests.setdefault(word[len(prefix)], []).append(word[len(prefix) :])
    if not rests:
        return re.escape(prefix)
    branches = "|".join(map(_alternatives, rests.values()))
    return f"{re.escape(prefix)}(?:{branches}){'?' if prefix in words else ''}"


def _texts(value: Any) -> Iterator[str]:
    """Yields every text and key of JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(_texts, itertools.chain(value.keys(), value.values())))
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_texts, value))


def _replaced(value: Any, change) -> Any:
    """Copies JSON values with their texts and keys changed; the names of roles stay, which templates compare."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        is_role = lambda key, item: key == "role" and isinstance(item, str) and item in ROLES  # noqa: E731
        return {change(k): item if is_role(k, item) else _replaced(item, change) for k, item in value.items()}
    return [_replaced(item, change) for item in value] if isinstance(value, list) else value
