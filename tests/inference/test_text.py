"""Text as tokens come: whole characters, and nothing of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_jax.inference.text import WINDOW, TextStream


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
