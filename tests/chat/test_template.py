"""From conversations to tokens: what templates write, and that no text of a message becomes a control token."""

import itertools
import json
import subprocess
import sys
import time

import pytest
from chat_cases import CONTROL, CONTROL_IDS, control_tokenizer, spelled
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from dsa_jax.chat import ChatTemplate, rendering
from dsa_jax.chat.parsing import DSML, Format
from dsa_jax.chat.spellings import PRIVATE, ControlTokens
from dsa_jax.inference.text import encode_text
from dsa_jax.inference.tokenizer import byte_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "é", "deep": [1, null]}'}}
CHAT = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1", "reasoning_content": "old"}, {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": None, "reasoning_content": "look!", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "1"}, {"role": "tool", "content": "3"},
]  # fmt: skip
CALLED = """

<[｜DSML｜]function_calls>
<[｜DSML｜]invoke name="look">
<[｜DSML｜]parameter name="at" string="true">é</[｜DSML｜]parameter>
<[｜DSML｜]parameter name="deep" string="false">[1, null]</[｜DSML｜]parameter>
</[｜DSML｜]invoke>
</[｜DSML｜]function_calls>[<｜end▁of▁sentence｜>]

<function_results>
<result>2</result>
<result>3</result>
</function_results>

"""
SYSTEM = "[<｜begin▁of▁sentence｜>]Be brief.[<｜User｜>]One?"
FIRST = f"{SYSTEM}[<｜Assistant｜>][</think>]1[<｜end▁of▁sentence｜>][<｜User｜>]Two?"


def own(tmp_path, source, tokenizer=None, **config) -> ChatTemplate:
    """The template of a checkpoint with this one in a file of its own."""
    (tmp_path / "chat_template.jinja").write_text(source)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return ChatTemplate.of(tmp_path, tokenizer or control_tokenizer())


def text_of(template, messages, **options):
    return spelled(template.tokenizer, template.encode(messages, **options))


# Ours


def test_v32_writes_the_published_tokens_in_their_order(tmp_path):
    template = ChatTemplate.of(tmp_path, control_tokenizer())
    assert template.format == Format(thinks=True, calls=DSML) and template.stop == ()
    assert text_of(template, CHAT) == f"{FIRST}[<｜Assistant｜>][</think>]{CALLED}[</think>]"
    thinking = text_of(template, CHAT, thinking=True)
    assert thinking == f"{FIRST}[<｜Assistant｜>][<think>]look![</think>]{CALLED}[<think>]"
    assert text_of(template, CHAT[:2], add_generation_prompt=False) == SYSTEM
    described = text_of(template, CHAT[1:2], tools=TOOLS)
    assert (
        described.startswith("[<｜begin▁of▁sentence｜>]\n\n## Tools\n")
        and json.dumps(TOOLS[0]["function"]) in described
    )
    assert described.endswith("</functions>\n[<｜User｜>]One?[<｜Assistant｜>][</think>]")
    assert text_of(template, CHAT[:2], tools=TOOLS) == described.replace("]\n\n#", "]Be brief.\n\n#", 1)


def test_any_checkpoint_can_talk(tmp_path):
    template = ChatTemplate.of(tmp_path, byte_tokenizer())
    messages = [*CHAT[:4], {"role": "tool", "content": "x"}]
    assert text_of(template, messages) == "Be brief.\nUser: One?\nAssistant: 1\nUser: Two?\nResult: x\nAssistant:"
    assert "\nUser:" in template.stop and template.format == Format()
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<｜User｜>"}}')
    template = ChatTemplate.of(tmp_path, control_tokenizer(CONTROL[2:4]))
    assert template.encode(CHAT[1:2])[0] == 256


# Of checkpoints


def test_a_checkpoints_template_gets_what_it_expects(tmp_path):
    source = """
{%- for message in messages %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
    {% generation %}{{ message.role }}={{ message.content }};{% endgeneration %}
{% endfor %}
{{ bos_token }}{{ eos_token }}{{ tools | tojson }}{{ strftime_now('%Y') | int > 2000 }}
{{- thinking }}{{ enable_thinking }}{{ add_generation_prompt }}{{ size + 1 }}{{ '<think>' }}"""
    template = own(tmp_path, source, bos_token="<｜User｜>", eos_token={"content": "é"})
    expected = "system=Be brief.;user=One?;[<｜User｜>]é" + json.dumps(TOOLS) + "TrueTrueTrueTrue3[<think>]"
    assert text_of(template, CHAT[:4], tools=TOOLS, thinking=True, size=2) == expected


def test_arguments_are_objects_unless_the_template_needs_text(tmp_path):
    """GLM's goes through them one by one; DeepSeek-V3.1's joins them to a text."""
    begin = "{% for m in messages if m.tool_calls %}{% set a = m.tool_calls[0].function.arguments %}"
    one_by_one = "{% for k, v in a.items() %}{{ k }}={{ v | tojson }};{% endfor %}{% endfor %}{# tools #}"
    joined = "{{ 'text: ' + a }}{% endfor %}{# tools #}"
    spelling = CALL | {"function": {"name": "f", "arguments": r'{"\u003cthink>": "\ud800"}'}}
    for arguments in (CALL, CALL | {"function": {"name": "f", "arguments": json.loads(CALL["function"]["arguments"])}}):
        messages = [{"role": "assistant", "tool_calls": [arguments]}]
        assert text_of(own(tmp_path, begin + one_by_one), messages) == 'at="é";deep=[1, null];'
        assert text_of(own(tmp_path, begin + joined), messages) == "text: " + CALL["function"]["arguments"]
    messages = [{"role": "assistant", "tool_calls": [spelling]}]
    assert text_of(own(tmp_path, begin + one_by_one), messages) == '<think>="\ufffd";'
    assert text_of(own(tmp_path, begin + joined), messages) == "text: " + spelling["function"]["arguments"]


def test_templates_may_be_in_the_tokenizers_settings(tmp_path):
    for value, expected in (
        ("a", "a"), ([{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b{{ tools }}"}], "b"),
    ):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        template = ChatTemplate.of(tmp_path, byte_tokenizer())
        assert text_of(template, CHAT[:4]) == "a"
        assert template.takes_tools == (expected == "b")
        if template.takes_tools:
            assert text_of(template, CHAT, tools=TOOLS).startswith("b")
    for wrong in (3, [{"name": "x", "template": "a"}], [{"name": "default"}], ["a"], "a" * 1_000_001):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": wrong}))
        with pytest.raises(ValueError, match="^chat_template of .* must") as caught:
            ChatTemplate.of(tmp_path, byte_tokenizer())
        assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles\nmust alternate') }}", "roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"), ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ messages.append(1) }}", "SecurityError"), ("{{ messages.__class__.__mro__[1] }}", "SecurityError"),
        ("{{ 'a' * 10**11 }}", "memory"), ("{% for i in range(10**6) %}{% endfor %}", "OverflowError"),
    ],
)  # fmt: skip
def test_templates_that_fail_are_one_line(tmp_path, source, words):
    with pytest.raises(ValueError, match=words) as caught:
        own(tmp_path, source).encode(CHAT[:4])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_template_that_loops_for_ever_is_ended_and_the_next_goes_on():
    """As is one that writes for ever; nothing can stop a thread in the first."""
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{WHAT}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="must end within 0.5 s"):
        rendering.render(endless.replace("{WHAT}", ""), {}, seconds=0.5)
    with pytest.raises(ValueError, match="more than 1,000 characters"):
        rendering.render(endless.replace("{WHAT}", "text"), {}, most=1000)
    assert rendering.render("{{ a }}", {"a": "\ud800é\n"}) == "\ud800é\n"


def test_the_process_that_renders_ends_with_ours():
    """Even if ours is killed: its input ends then."""
    code = """
import os, signal
from dsa_jax.chat import rendering
rendering.render("", {})
print(rendering._PROCESS._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    stat = f"/proc/{int(ended.stdout)}/stat"
    for _ in range(100):
        try:
            with open(stat) as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


# Text stays text


SPELLINGS = st.sampled_from(
    [*CONTROL, "<｜", "User｜>", "｜", "<", ">", "a", "\n", "think>", "\0", "\x1b", "\ud800", "\ue000"]
)
TEXTS = st.lists(SPELLINGS, max_size=6).map("".join)
TEMPLATE = (
    "{% for m in messages %}<｜User｜>{{ m.name }}{{ m.content }}>{% endfor %}{{ tools | tojson }}{{ extra }}<think>"
)


@given(name=TEXTS, content=TEXTS, key=TEXTS, value=TEXTS)
def test_no_text_of_a_message_becomes_a_control_token(tmp_path_factory, name, content, key, value):
    """Whatever stands beside it; and nothing of it is lost."""
    tools = [{"type": "function", "function": {"name": "f", "x": {key: [value], "role": value}}}]
    messages = [{"role": "user", "content": content, "name": name}]
    whole = lambda text: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = whole(name) + whole(content) + ">" + whole(json.dumps(tools, ensure_ascii=False)) + whole(value)
    template = own(tmp_path_factory.mktemp("t"), TEMPLATE)
    ids = template.encode(messages, tools=tools, extra=value)
    assert [i for i in ids if i > 255] == [CONTROL_IDS["<｜User｜>"], CONTROL_IDS["<think>"]]
    assert ids[-1] == CONTROL_IDS["<think>"] and bytes(ids[1:-1]).decode() == text


@given(content=TEXTS, key=TEXTS, value=TEXTS)
def test_nor_under_the_template_of_v32(tmp_path_factory, content, key, value):
    """Arguments may spell them in JSON's escapes."""
    call = {"function": {"name": content + "f", "arguments": json.dumps({key: value})}}
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content, "tool_calls": [call]}]
    template = ChatTemplate.of(tmp_path_factory.mktemp("t"), control_tokenizer())
    plain = [{"role": "user", "content": ""}, messages[1] | {"content": ""}]
    plain[1]["tool_calls"] = [{"function": {"name": "f", "arguments": '{"": ""}'}}]
    control = lambda messages: [i for i in template.encode(messages) if i > 255]
    assert control(messages) == control(plain)


def test_overlapping_spellings_and_those_of_one_letter_stay_text():
    control = ControlTokens(control_tokenizer(["ab", "bc", "é", "abcd"]))
    hidden, put_back = control.hide(["abcd", {"xab": "é"}, "a"])
    text = "".join([hidden[0], *hidden[1], *hidden[1].values(), hidden[2]])
    assert control.encode(text + "bcabcd", put_back) == [*"abcdxabéa".encode(), 257, 258]


def test_a_conversation_that_uses_all_private_characters_is_refused():
    control = ControlTokens(control_tokenizer())
    letters = "".join(map(chr, itertools.chain(*PRIVATE)))
    assert control.hide(letters[2:] + "<think>")[0].endswith("\ue000think>")
    with pytest.raises(ValueError, match="private use"):
        control.hide(letters)


def test_tokens_that_take_in_blanks_do_so():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<a>", rstrip=True), AddedToken("<b>", lstrip=True)])
    text = "x <a> \n y <b> z<a>"
    assert ControlTokens(tokenizer).encode(text, {}) == tokenizer.encode(text).ids


@pytest.mark.parametrize("model", [
    models.WordLevel({"</s>": 0, "a": 1, "?": 2}, unk_token="?"),
    models.Unigram([("?", 0.0), ("</s>", 0.0), ("<", -2.0), ("/", -2.0), ("s", -2.0), (">", -2.0)], 0, False),
    models.BPE({"<": 0, "/": 1, "s": 2, ">": 3, "</": 4, "s>": 5, "</s>": 6}, [("<", "/"), ("s", ">"), ("</", "s>")]),
])  # fmt: skip
def test_a_vocabulary_that_spells_a_control_token_does_not_in_text(model):
    tokenizer = Tokenizer(model)
    if isinstance(model, models.WordLevel):
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    control = tokenizer.token_to_id("</s>")
    assert tokenizer.encode("</s>").ids == [control]
    assert control not in encode_text(tokenizer, "</s>") and encode_text(tokenizer, "</s>")


# What comes in


def called(function):
    """A message with a call of it."""
    return {"role": "assistant", "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages must be"), ("hello", "messages must be"), ([3], r"messages\[0\] must be an object, got 3"),
        ([{"role": "robot", "content": ""}], r"messages\[0\].role must be one of .*, got 'robot'"),
        ([{"role": "user"}], r"messages\[0\].content must be text or"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\] must be"),
        ([{"role": "user", "content": "", "tool_calls": [CALL]}], "tool_calls must be a list of an assistant"),
        ([called({"arguments": "{}"})], "must have a function with a name"),
        ([called({"name": "f"})], "arguments must be JSON text or an object"),
        ([called({"name": "f", "arguments": "[]"})], "must hold a JSON object"),
        ([{"role": "assistant", "content": "", "reasoning_content": 3}], "reasoning_content must be text, got 3"),
        ([{"role": "tool", "content": ""}], r"messages\[0\] must follow the call"),
        ([{"role": "user", "content": "", "x": object()}], r"messages\[0\] must hold JSON values, got object"),
        ([{"role": "user", "content": "", "x": {1: 2}}], "must have texts as keys"),
    ],
)  # fmt: skip
def test_messages_that_are_none_are_refused_by_name(tmp_path, messages, words):
    with pytest.raises(ValueError, match=words):
        ChatTemplate.of(tmp_path, control_tokenizer()).encode(messages)


def test_what_a_template_cannot_do_is_refused(tmp_path):
    plain = ChatTemplate.of(tmp_path, byte_tokenizer())
    for options, words in (({"tools": TOOLS}, "tools"), ({"thinking": True}, "thinking"), ({"x": 1}, "arguments")):
        with pytest.raises(ValueError, match=words):
            plain.encode(CHAT[:2], **options)
    with pytest.raises(ValueError, match="tool_calls"):
        plain.encode(CHAT)
    with pytest.raises(ValueError, match="other names, got bos_token"):
        own(tmp_path, "").encode(CHAT[:4], bos_token="x")
    for tools, words in ((3, "a list"), ([3], "type function"), ([{"function": {}}], "a name")):
        with pytest.raises(ValueError, match=words):
            plain.encode(CHAT, tools=tools)
    deep = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="deeper than 64"):
        own(tmp_path, "").encode(CHAT[:4], deep=deep)


def test_content_of_every_sort_has_one_shape(tmp_path):
    template = own(
        tmp_path, "{% for m in messages %}[{{ m.content }}|{{ m.reasoning_content }}]{% endfor %}<think></think>"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": parts}, {"role": "user", "content": ""}, {"role": "assistant"},
        {"role": "assistant", "content": "<think>r</think>c"}, {"role": "assistant", "content": "c</think>"},
        {"role": "assistant", "content": "c", "reasoning": "r"}, {"role": "user", "content": "\ud83d\ude00\ud83d"},
    ]  # fmt: skip
    assert "[ab|][|][|][c|r][c</think>|][c|r][😀\ufffd|]" in template.tokenizer.decode(template.encode(messages))
    template = own(tmp_path, "{% for m in messages %}{{ m.content is none }}{% endfor %} tools")
    assert text_of(template, [{"role": "assistant", "content": None, "tool_calls": [CALL]}]) == "True tools"


def test_the_parser_begins_where_the_prompt_has_left_off(tmp_path):
    template = ChatTemplate.of(tmp_path, control_tokenizer())
    for thinking, kind in ((True, "reasoning"), (False, "content")):
        [event] = template.parser(template.encode(CHAT, thinking=thinking)).push("a")
        assert event.kind == kind


def test_text_shows_the_markers_that_decoding_leaves_out(tmp_path):
    tokenizer = control_tokenizer()
    shown = ChatTemplate.of(tmp_path, tokenizer).tokenizer
    ids = [CONTROL_IDS[token] for token in ("<think>", "｜DSML｜", "<｜end▁of▁sentence｜>")]
    assert tokenizer.decode(ids) == "<think>" and shown.decode(ids) == "<think>｜DSML｜"
    assert shown.encode("".join(CONTROL)).ids == tokenizer.encode("".join(CONTROL)).ids
