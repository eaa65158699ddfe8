"""Tokenizers of folders: read, checked, and made of bytes where there is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_jax.inference.tokenizer import byte_tokenizer, find_tokenizer


@given(st.text())
def test_bytes_are_the_tokens(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    assert bytes(ids) == text.encode() and tokenizer.decode(ids) == text


def test_every_byte_has_its_text():
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode([byte]) for byte in range(256)] == [
        bytes([b]).decode(errors="replace") for b in range(256)
    ]


def test_a_folder_has_its_own_or_bytes_or_none(tmp_path):
    assert find_tokenizer(tmp_path, 256).encode("é").ids == [0xC3, 0xA9]
    assert find_tokenizer(tmp_path, 64) is None
    own = byte_tokenizer()
    own.add_tokens(["<x>"])
    own.enable_truncation(1)
    own.enable_padding(length=9)
    own.save(str(tmp_path / "tokenizer.json"))
    assert find_tokenizer(tmp_path, 257).encode("a<x>").ids == [97, 256]
    with pytest.raises(ValueError, match="ids below the model's vocab_size 256, got 256 for <x>"):
        find_tokenizer(tmp_path, 256)
    for wrong in ("{}", "text", "", '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(wrong)
        with pytest.raises(ValueError, match="tokenizer.json must be a tokenizer, got: ") as caught:
            find_tokenizer(tmp_path, 256)
        assert "\n" not in str(caught.value)
