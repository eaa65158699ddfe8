"""A model's text taken apart: whatever its pieces, and whatever is wrong with it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_jax.chat.parsing import DSML, V31, Format, StreamParser

PLAIN, OLD, NEW = Format(), Format(thinks=True, calls=V31), Format(thinks=True, calls=DSML)
OLD_CALL = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
OLD_CALLS = f"<｜tool▁calls▁begin｜>{OLD_CALL}<｜tool▁calls▁end｜>"


def tag(name, value, text="true"):
    return f'<｜DSML｜parameter name="{name}" string="{text}">{value}</｜DSML｜parameter>\n'


def invoke(name, *tags):
    return f'<｜DSML｜invoke name="{name}">\n{"".join(tags)}</｜DSML｜invoke>\n'


def block(*invokes):
    return f"<｜DSML｜function_calls>\n{''.join(invokes)}</｜DSML｜function_calls>"


def parse(format, *pieces, thinking=False):
    """What the text comes to: reasoning, content, and calls with their arguments."""
    parser = StreamParser(format, thinking=thinking)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    text = lambda kind: "".join(event.text for event in events if event.kind == kind)
    calls = [event for event in events if event.kind == "call"]
    arguments = [event for event in events if event.kind == "arguments"]
    assert [event.index for event in calls] == [event.index for event in arguments] == list(range(len(calls)))
    assert len({event.id for event in calls}) == len(calls) and all(event.id.startswith("call_") for event in calls)
    assert all(event.text for event in events)
    found = [(call.text, json.loads(own.text)) for call, own in zip(calls, arguments, strict=True)]
    return text("reasoning"), text("content"), found


def test_reasoning_ends_with_its_tag_whoever_began_it():
    assert parse(OLD, "a<b</think>\nc</think>", thinking=True) == ("a<b", "\nc</think>", [])
    assert parse(OLD, " <think>a</think>c <think>d") == ("a", "c <think>d", [])
    assert parse(OLD, "a", thinking=True) == ("a", "", [])
    assert parse(PLAIN, "<think>a</think>") == ("", "<think>a</think>", [])


def test_calls_of_v31():
    text = "Look.<｜tool▁calls▁begin｜>" + "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
        for name, arguments in (("f", '{"a": [1, "é"]}'), ("g", "{}"))
    )  # fmt: skip
    expected = ("", "Look.", [("f", {"a": [1, "é"]}), ("g", {})])
    assert parse(OLD, text + "<｜tool▁calls▁end｜>") == parse(OLD, text) == expected


def test_calls_of_v32():
    first = invoke("f", tag("a", ' x\n"<b>" '), tag("b", "[1, {}]", "false"), tag("é", "true", "false"))
    expected = [("f", {"a": ' x\n"<b>" ', "b": [1, {}], "é": True}), ("g", {})]
    assert parse(NEW, "t</think>Look.\n\n" + block(first, invoke("g")), thinking=True) == ("t", "Look.", expected)


def test_text_before_and_behind_calls_stays():
    assert parse(NEW, f"a\n\n\n\n{block(invoke('f'))}b\n") == ("", "a\n\nb\n", [("f", {})])


@pytest.mark.parametrize(
    "broken",
    [
        block(), block("text"), block(invoke("")), block(invoke("f", tag("a", "1", "maybe"))),
        block(invoke("f", tag("a", "x", "false"))), block(invoke("f", tag("a", "1, \"b\": 2", "false"))),
        block(invoke("f", tag("a", "1"), tag("a", "2"))), block(invoke("f", "text")),
        block(invoke("f", tag("a", "NaN", "false"))), block(invoke("f", tag("a", "[" * 100_000, "false"))),
        block(invoke("f"))[:50], block(invoke("f", tag("a", "1")))[:-30], "\n\n<｜DSML｜function_calls>", "\n",
    ],
    ids=lambda text: repr(text[:60]),
)  # fmt: skip
def test_what_is_no_call_of_v32_is_content_to_the_letter(broken):
    assert parse(NEW, "a" + broken) == ("", "a" + broken, [])


@pytest.mark.parametrize("arguments", ["", "[]", '{"a": }', '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": 1'])
def test_what_is_no_call_of_v31_is_content_to_the_letter(arguments):
    broken = OLD_CALLS.replace("{}", arguments)
    assert parse(OLD, broken) == ("", broken, [])
    assert parse(OLD, OLD_CALLS.replace("f<", "<")) == ("", OLD_CALLS.replace("f<", "<"), [])


def test_nothing_is_held_back_longer_than_it_may_become_a_marker():
    parser = StreamParser(NEW)
    assert [event.text for event in parser.push("ab<")] == ["ab"]
    assert [event.text for event in parser.push("c\n")] == ["<c"]
    assert [event.text for event in parser.push("\nd")] == ["\n\nd"]
    end = "</｜DSML｜function_calls>"
    assert [event.kind for event in parser.push("\n\n" + block(invoke("f")).removesuffix(end))] == ["call", "arguments"]
    assert parser.push(end[:-1]) == []


def test_what_is_cut_off_behind_a_call_is_no_content():
    text = block(invoke("f"))
    assert parse(NEW, text.removesuffix("</｜DSML｜function_calls>")) == ("", "", [("f", {})])
    assert parse(NEW, text.removesuffix("function_calls>")) == ("", "", [("f", {})])
    assert parse(NEW, text + "\n") == ("", "\n", [("f", {})])
    assert parse(NEW, text.replace("</｜DSML｜f", "x" + invoke("g", "?") + "</｜DSML｜f"))[2] == [("f", {})]


PIECES = st.sampled_from(
    ["<think>", "</think>", "a", "\n", "\n\n", " ", "<", "｜", "{", "}", '{"a": 1}', '"', "f", OLD_CALLS, OLD_CALL,
     "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
     "<｜DSML｜function_calls>", "</｜DSML｜function_calls>", invoke("f"), invoke("f", tag("a", "b")),
     "</｜DSML｜invoke>",
     '<｜DSML｜invoke name="f">',
     tag("a", "1", "false"), block(invoke("f", tag("a", "x")))]
)  # fmt: skip


@given(pieces=st.lists(PIECES, max_size=10), cuts=st.lists(st.integers(0, 400), max_size=30), thinking=st.booleans(),
       format=st.sampled_from([PLAIN, OLD, NEW]))  # fmt: skip
def test_any_cut_of_any_text_gives_the_same(pieces, cuts, thinking, format):
    text = "".join(pieces)
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    cut = [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]
    whole = parse(format, text, thinking=thinking)
    assert parse(format, *cut, thinking=thinking) == whole == parse(format, *text, thinking=thinking)


@given(st.data())
def test_mutations_raise_nothing_and_lose_no_letter(data):
    """Letters are changed, dropped and doubled; with no call in it the text is all there, in its order."""
    text = data.draw(
        st.sampled_from([OLD_CALLS, block(invoke("f", tag("a", "x"), tag("b", "1", "false")), invoke("g"))])
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        text = (
            text[:place]
            + data.draw(st.sampled_from(["", "<", "x", '"', "\n", "｜"]))
            + text[place + data.draw(st.integers(0, 2)) :]
        )
    for format in (OLD, NEW):
        reasoning, content, calls = parse(format, *text)
        if not calls:
            assert reasoning + content == text


def test_formats_are_found_by_what_tokenizer_and_template_have():
    assert Format.of(["<think>", "</think>", V31.begin]) == OLD
    assert Format.of(["<think>", "</think>", V31.begin, "｜DSML｜"]) == NEW
    assert Format.of([], "{{ '<think></think>' }}") == Format(thinks=True)
    assert Format.of(["a"]) == PLAIN
    assert {"<think>", "</think>", "｜DSML｜"} <= NEW.markers() and "" not in NEW.markers() | OLD.markers()
