"""Text as tokens come: whole characters, and nothing of a stop string; and tokens of text, none of which is control."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from dsa_jax.inference.text import WINDOW, TextStream, encode_text


class Bytes:
    """Decodes every token as a byte of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


class Words:
    """Decodes every token as a word, with a space between two of them, as some tokenizers do."""

    def decode(self, ids):
        return " ".join(f"w{token}" for token in ids)


@given(text=st.text("abä✓🙂", max_size=12), stops=st.lists(st.text("abä✓", min_size=1, max_size=4), max_size=3))
def test_the_text_is_cut_at_the_first_stop_string(text, stops):
    """Whatever borders tokens have: each is one byte. Nothing that was given out is taken back."""
    stream = TextStream(Bytes(), stops)
    given_out = ""
    for byte in text.encode():
        given_out += stream.push(byte)
        assert text.startswith(given_out) and "\ufffd" not in given_out
    given_out += stream.finish()
    ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    assert stream.stopped == bool(ends) and stream.text == given_out
    if ends:  # of those that are complete at the same character the one that begins first
        assert given_out == text[: min(at for end, at in ends if end == ends[0][0])]
    else:
        assert given_out == text


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(Bytes(), ["abc", "bd"])
    assert [stream.push(byte) for byte in b"xaba"] == ["x", "", "", "ab"]
    assert stream.finish() == "a" and not stream.stopped


def test_stop_strings_may_be_let_pass():
    stream = TextStream(Bytes(), ["ab"])
    assert "".join(stream.push(byte, may_stop=False) for byte in b"abab") == "abab" and not stream.stopped
    assert "".join(stream.push(byte) for byte in b"xab") == "x" and stream.stopped
    assert stream.push(3) == stream.finish() == ""


def test_text_that_depends_on_the_token_before_is_whole():
    stream = TextStream(Words())
    assert "".join(stream.push(token) for token in range(5)) + stream.finish() == Words().decode(range(5))


def test_bytes_that_are_no_character_come_out_in_the_end():
    stream = TextStream(Bytes())
    out = [stream.push(0x80) for _ in range(3 * WINDOW)]
    assert len("".join(out)) == 3 * WINDOW and not any(out[: WINDOW - 1])
    stream = TextStream(Bytes())
    assert stream.push(0xE2) == "" and stream.finish() == "\ufffd"


@pytest.mark.parametrize("count", [1, 500])
def test_the_work_of_a_token_does_not_grow(count):
    """A token is decoded beside those since the last whole character alone."""
    most = []

    class Counting(Bytes):
        def decode(self, ids):
            most.append(len(ids))
            return super().decode(ids)

    stream = TextStream(Counting())
    for _ in range(count):
        stream.push(97)
    assert max(most) <= 2


# Tokens from text

BYTES = pre_tokenizers.ByteLevel.alphabet()


def byte_tokenizer():
    """Byte-level BPE with merges, one of which spells a control token; one control token is not marked as special."""
    names = {name: place for place, name in enumerate(["<s>", *sorted(BYTES), "he", "<t", "h>", "<th>"])}
    merges = [("h", "e"), ("<", "t"), ("h", ">"), ("<t", "h>")]
    tokenizer = Tokenizer(models.BPE(names, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<th>", normalized=False), AddedToken("<｜User｜>", special=False)])
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    return tokenizer


def piece_tokenizer():
    """Pieces with scores, which spell the control tokens, and bytes for what they lack."""
    byte_pieces = [(f"<0x{number:02X}>", -9.0) for number in range(256)]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("h", -1.0), ("e", -1.0), ("he", -1.5), ("<", -2.0), (">", -2.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *byte_pieces], unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer])
def test_spellings_of_control_tokens_are_text(make):
    tokenizer = make()
    added = tokenizer.get_added_tokens_decoder()
    for text in ("he he", "he<s>", "<|end|>he", "<th><｜User｜>e", "é", "<unk>", "".join(map(str, added.values()))):
        ids = encode_text(tokenizer, text)
        assert not {*ids} & {*added} and tokenizer.decode(ids, skip_special_tokens=False) == text, text
        if not any(token.content in text for token in added.values()):
            assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert {*tokenizer.encode("he<s>").ids} & {*added}, "as they are without it"


def test_what_a_tokenizer_puts_before_texts_is_put_if_asked_for():
    tokenizer = byte_tokenizer()
    assert encode_text(tokenizer, "<s>he", add_special_tokens=True) == [0, *encode_text(tokenizer, "<s>he")]


def test_a_character_that_a_tokenizer_lacks_is_its_unknown_token_still():
    tokenizer = Tokenizer(models.WordLevel({"w0": 0, "<end>": 1, "w2": 2}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>", "w0"])
    assert encode_text(tokenizer, "w2 <end> w0 x") == [2, 0, 0, 0]


def test_a_letter_that_was_added_stays_unless_it_is_special():
    letter, special = byte_tokenizer(), byte_tokenizer()
    letter.add_tokens([AddedToken("h", normalized=False)])
    assert encode_text(letter, "hh") == [letter.token_to_id("h")] * 2
    special.add_special_tokens(["h"])
    assert special.token_to_id("h") not in encode_text(special, "hh")


def test_text_that_is_none_is_refused():
    with pytest.raises(ValueError, match="text must be Unicode, got a lone surrogate at character 2"):
        encode_text(byte_tokenizer(), "he\ud800")
    with pytest.raises(ValueError, match=r"text needs a tokenizers\.Tokenizer, got list"):
        encode_text([], "he")
