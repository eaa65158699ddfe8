"""Tokenizer files: read, checked against the model's vocabulary, and what ends a document."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from train.checks import shown
from train.data.text import TextFile

BYTES = 256
END_TOKENS = ("<｜end▁of▁sentence｜>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")  # as published models say


@dataclasses.dataclass(frozen=True)
class EndToken:
    """Names the token that ends every document."""

    token: str
    id: int


def load_tokenizer(path: Path | None, vocab_size: int) -> Tokenizer | None:
    """Reads a tokenizer, without the truncation and the padding that it remembers from its last use.

    Raises:
      ValueError: if the file is no tokenizer, or one of its ids is none of the model's vocabulary.
    """
    if path is None:
        if vocab_size < BYTES:
            raise ValueError(f"vocab_size must be at least {BYTES} when bytes are the tokens, got {vocab_size}")
        return None
    with _refusals(f"tokenizer must be a Hugging Face tokenizer.json, got {path}"):
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise ValueError(f"the tokenizer must have a vocabulary, got none in {path}")
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= vocab_size:
        raise ValueError(
            f"the tokenizer's ids must fit the model's vocab_size {vocab_size}, got {len(vocabulary)} tokens up to id "
            f"{vocabulary[token]} ({shown(token)}) in {path}"
        )
    return tokenizer


@contextlib.contextmanager
def _refusals(message: str) -> Iterator[None]:
    """Turns whatever the library raises into a ValueError: bare Exceptions, and panics, which are not even these."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{message}: {str(error)[:300]}") from error


def find_end_token(tokenizer: Tokenizer, path: Path) -> EndToken | None:
    """Finds the token that ends a document, None where there is none.

    It is the eos_token of a tokenizer_config.json beside the file, else a special token of a usual name.

    Raises:
      ValueError: if that file cannot be read, or names a token that the tokenizer does not have.
    """
    named = _configured_end_token(path.with_name("tokenizer_config.json"))
    if named is not None:
        number = tokenizer.token_to_id(named)
        if number is None:
            raise ValueError(
                f"tokenizer_config.json names the eos_token {shown(named)}, which {path} does not have: correct "
                "it, or give --no-append"
            )
        return EndToken(named, number)
    special = {added.content: number for number, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    return next((EndToken(token, special[token]) for token in END_TOKENS if token in special), None)


def _configured_end_token(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be readable JSON, or give --no-append: {str(error)[:300]}") from error
    token = values.get("eos_token") if isinstance(values, dict) else None
    token = token.get("content") if isinstance(token, dict) else token  # a string, or an added token's description
    return token if isinstance(token, str) else None


def encode_files(
    files: Sequence[TextFile], tokenizer: Tokenizer | None, end: EndToken | None, vocab_size: int
) -> list[np.ndarray]:
    """Makes the tokens of each file, with the tokenizer's own special tokens, and `end` behind unless it is there.

    Raises:
      ValueError: naming a file that is not UTF-8, or that the tokenizer cannot read within the vocabulary.
    """
    if tokenizer is None:
        return [np.frombuffer(file.text, np.uint8) for file in files]
    return [_encode(file, tokenizer, end, vocab_size) for file in files]


def _encode(file: TextFile, tokenizer: Tokenizer, end: EndToken | None, vocab_size: int) -> Int[np.ndarray, " T"]:
    try:
        text = file.text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text for a tokenizer must be UTF-8, got {file.path}: {error.reason}") from error
    return encode_text(tokenizer, text, str(file.path), vocab_size=vocab_size, end_id=None if end is None else end.id)


def encode_text(
    tokenizer: Tokenizer,
    text: str,
    where: str,
    *,
    vocab_size: int,
    end_id: int | None,
    begins: bool = True,
    ends: bool = True,
) -> Int[np.ndarray, " T"]:
    """Makes the tokens of a document, or of a part of one, with the tokenizer's own special tokens around the whole.

    Args:
      tokenizer: as `load_tokenizer` gives it.
      text: what to encode.
      where: names it in a message.
      vocab_size: no token may lie beyond it.
      end_id: the token that stands behind a document; it is added unless it is there.
      begins: the text begins its document.
      ends: the text ends its document.

    Raises:
      ValueError: if the tokenizer cannot read it within the vocabulary.
    """
    with _refusals(f"the tokenizer cannot read {where}"):  # as for an unknown word without a token for it
        encoding = tokenizer.encode_batch_fast([text])[0]
    ids = encoding.ids
    if not (begins and ends):
        own = np.flatnonzero(np.asarray(encoding.special_tokens_mask) == 0)
        first, behind = (own[0], own[-1] + 1) if len(own) else (len(ids), len(ids))
        ids = ids[0 if begins else first : None if ends else behind]
    if ends and end_id is not None and ids[-1:] != [end_id]:
        ids.append(end_id)
    if ids and max(ids) >= vocab_size:  # a post-processor may add ids that the vocabulary does not have
        raise ValueError(
            f"the tokenizer's ids must fit the model's vocab_size {vocab_size}, got {max(ids)} for {where}"
        )
    return np.asarray(ids, np.int32)
