"""The tokenizer of a checkpoint's folder: its `tokenizer.json`, or bytes where a vocabulary of 256 has no such file."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsa_jax.hf.files import own_file
from dsa_jax.strict_json import shorten, shown_name, shown_path

BYTES = 256


def find_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """Reads a checkpoint's tokenizer, without the truncation and the padding that it remembers from its last use.

    Models that were trained on bytes have no file: where it is absent and the vocabulary is of 256, tokens are bytes.

    Returns:
      the tokenizer, None for a folder without one.

    Raises:
      ValueError: if the file is no tokenizer, or one of its ids is none of the model's vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return byte_tokenizer() if vocab_size == BYTES else None
    try:
        tokenizer = Tokenizer.from_str(own_file(folder, path.name).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{shown_path(path)} must be a tokenizer, got: {shorten(str(error), 300)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size:
        raise ValueError(
            f"{shown_path(path)} must have ids below the model's vocab_size {vocab_size}, got {largest} for "
            f"{shown_name(token)}"
        )
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Makes a tokenizer whose 256 ids are the bytes of UTF-8.

    Examples:
      >>> byte_tokenizer().encode("aé").ids
      [97, 195, 169]
    """
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(_letters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    return tokenizer


def _letters() -> list[str]:
    """Lists the letters by which byte-level tokenizers write the bytes: themselves, or the next from U+0100 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(letter for letter in alphabet if ord(letter) >= BYTES))
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(BYTES)]
