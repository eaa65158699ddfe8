"""Text of which nothing is trained on: to measure models that are trained already."""

import dataclasses

import numpy as np

from train.data.corpus import Corpus, DataConfig, Documents
from train.data.text import find_files, read_files
from train.data.tokenizing import encode_files, find_end_token, load_tokenizer


def load_whole(config: DataConfig, *, vocab_size: int = 256) -> Corpus:
    """Reads and tokenises text, all of it held out; one file is enough.

    Args:
      config: which text, and by which tokenizer; its `held_out` means nothing here.
      vocab_size: the model's; no token may lie beyond it.

    Raises:
      ValueError: if there is no file to read that is not empty, or the tokenizer does not fit.
    """
    tokenizer = load_tokenizer(config.tokenizer, vocab_size)
    end = None
    if tokenizer is not None and config.tokenizer is not None and config.append:
        end = find_end_token(tokenizer, config.tokenizer)
    found = read_files(find_files(config.data), config.max_bytes)
    if not found.read:
        raise ValueError(
            f"text must come in files that are not empty, got none within max_bytes {config.max_bytes} of "
            f"{', '.join(config.data)[:300]}, and {found.left_out} past it"
        )
    held_out = Documents.join(encode_files(found.read, tokenizer, end, vocab_size))
    return Corpus(
        train=dataclasses.replace(held_out, tokens=held_out.tokens[:0], offsets=np.zeros(1, np.int64)),
        held_out=held_out,
        tokenizer=tokenizer,
        fingerprint="",
        end_token=None if end is None else end.token,
        left_out=(found.left_out, found.left_out_bytes),
    )
