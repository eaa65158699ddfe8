"""Text for a terminal: Markdown as it comes, and nothing by which a model could control it."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dsa_jax.chat.display import Answer, finished, without_controls

EVIL = [
    "\x1b[31mred", "\x1b]0;title\x07", "\x1b]8;;http://evil\x1b\\go\x1b]8;;\x1b\\", "\x9b31m", "\x90dcs\x9c",
    "\b\b", "\r",
    "\x7f", "\0", "\u202edrawkcab\u202c", "\u2066a\u2069", "\u200f", "\u2028", "&#x202E;x", "&#27;[31m", "&#x9b;1m",
    "[a](javascript:x)", "[click](http://evil \"\x1b[1m\")", "`\x1b[2J`", "```\x1b[1m\n\x1b[2J\n```",
]  # fmt: skip
DANGEROUS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def shown(*pieces, kind="content", terminal=True, width=60) -> str:
    """What is written for an answer in these pieces."""
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, width=width, height=20, color_system="standard", highlight=False
    )
    with Answer(console) as answer:
        for piece in pieces:
            answer.add(kind, piece)
    return file.getvalue()


def own_controls_removed(text) -> str:
    """Without the sequences of ours: colours, styles, movements of the cursor while the last block is drawn anew."""
    return re.sub("\x1b\\[[0-9;?]*[A-Za-z]|\r", "", text)


@pytest.mark.parametrize("kind", ["content", "reasoning"])
@pytest.mark.parametrize("evil", EVIL)
def test_nothing_of_a_model_controls_the_terminal(evil, kind):
    """Whole and letter by letter; in Markdown, which can write characters by their numbers, and as it is."""
    for pieces in ([evil], list(evil), ["# a\n\n- ", evil, "\n\nb"]):
        on_terminal = shown(*pieces, kind=kind)
        assert not DANGEROUS.search(own_controls_removed(on_terminal)), repr(on_terminal)
        assert "\x1b]" not in on_terminal and "\x1b[31m" not in on_terminal and "\x1b[2J" not in on_terminal
        piped = shown(*pieces, kind=kind, terminal=False)
        assert not DANGEROUS.search(piped), repr(piped)
        assert piped == without_controls("".join(pieces))


@given(st.text())
def test_all_else_stays(text):
    cleaned = without_controls(text)
    assert not DANGEROUS.search(cleaned)
    assert cleaned == "".join(letter for letter in text if not DANGEROUS.match(letter))


def test_markdown_is_shown_as_it_comes_and_once():
    text = "# Title\n\nSome *words*.\n\n```python\nx = 1\n\ny = 2\n```\n\n- a\n- b\n"
    out = shown(*text)
    for word in ("Title", "Some", "x = 1", "y = 2"):
        assert word in own_controls_removed(out).replace("\x1b", "")
    assert "*words*" not in out and "```" not in own_controls_removed(shown(text))
    last = shown(text)
    assert own_controls_removed(last).count("Title") == 1


def test_reasoning_is_dim_and_as_it_is():
    out = shown("a *b*\nc", kind="reasoning")
    assert "\x1b[2ma *b*" in out


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a", 0), ("a\n", 0), ("a\n\n", 0), ("a\n\nb", 3), ("a\n\nb\n\n", 3), ("a\n\n- b", 0), ("a\n\n  b", 0),
        ("```\na\n\nb\n```\n\nc", 14), ("```\na\n\nb", 0), ("````\n```\n\nb", 0), ("~~~\n\n```\n\na", 0),
        ("a\n\nb\n\nc", 6),
        ("1. a\n\n2. b", 0), ("> a\n\n> b", 0), ("a\n\n```\nb", 3),
    ],
)  # fmt: skip
def test_blocks_are_finished_when_nothing_can_change_them(text, count):
    assert finished(text) == count
