"""Fine-tuning on conversations: the assistant's tokens alone are targets, and rows hold whole conversations."""

import json

import numpy as np
import pytest
from chat_cases import BEGIN, END, control_tokenizer, spelled
from train_cases import batch_at

from dsa_jax.chat import ChatTemplate
from train.data import DataConfig, load

VOCAB = 300
COMPARED = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}<｜User｜>{{ m.content }}
{%- elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{{ eos_token }}
{%- else %}{{ m.content }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"""
ANSWER = "{{ m.content }}{{ eos_token }}"
MARKED = COMPARED.replace(ANSWER, f"{{% generation %}}{ANSWER}{{% endgeneration %}}")
# Only the last answer is shown whole: the conversation up to an earlier one is no beginning of the whole.
FORGETTING = COMPARED.replace(ANSWER, "{{ m.content if loop.last else '…' }}{{ eos_token }}")
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi <｜Assistant｜>"},  # a control token's spelling, as text
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
]


def say(user, answer):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


@pytest.fixture
def folder(tmp_path):
    """A tokenizer beside a template, and two files of conversations, one of which stands in both."""
    control_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": BEGIN, "eos_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(COMPARED)
    chats = [CHAT, *(say(f"say {i}", "ab" * i) for i in range(1, 20))]
    for name, part in (("a", chats[:12]), ("b", chats[8:])):
        lines = [json.dumps({"messages": messages}) for messages in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([lines[0], "", *lines[1:], lines[0]]) + "\n")
    return tmp_path


def config_of(folder, **changes) -> DataConfig:
    values = {"data": (f"{folder}/*.jsonl",), "tokenizer": folder / "tokenizer.json", "held_out": 0.2}
    return DataConfig(**values | changes)


def documents_of(corpus):
    """The conversations of both splits: their text, and what of it is learnt."""
    tokenizer, found = corpus.tokenizer, []
    for documents in (corpus.train, corpus.held_out):
        for a, b in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
            ids, learnt = documents.read(a, b), documents.wanted(a, b)
            found.append((spelled(tokenizer, ids), spelled(tokenizer, ids[learnt])))
    return dict(found), len(found)


@pytest.mark.parametrize("template", [COMPARED, MARKED], ids=["compared", "marked"])
def test_the_assistants_tokens_are_learnt_and_no_others(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    found, count = documents_of(load(config_of(folder), vocab_size=VOCAB))
    assert count == len(found) == 20  # each once
    user, assistant = "[<｜User｜>]", "[<｜Assistant｜>]"
    first = f"[{BEGIN}]Be kind.{user}hi <｜Assistant｜>{assistant}Hello[{END}]"
    whole = f"{first}{user}2+2{assistant}4[{END}]"
    assert found[whole] == f"Hello[{END}]4[{END}]"
    assert found[f"[{BEGIN}][<｜User｜>]say 3[<｜Assistant｜>]ababab[{END}]"] == f"ababab[{END}]"


def test_rows_hold_several_whole_conversations(folder):
    corpus = load(config_of(folder), vocab_size=VOCAB)
    dataset, seq_len = corpus.dataset("train", batch_size=2, seq_len=128, seed=0), 128
    waste = corpus.waste("train", seq_len=seq_len)[corpus.train_sources[0].name]
    assert waste.cut == 0 and corpus.train_sources[0].pack == "best_fit"
    begin, end, assistant = map(corpus.tokenizer.token_to_id, (BEGIN, END, "<｜Assistant｜>"))
    batch = batch_at(dataset, 0)
    for row in range(2):
        real = batch.stop[row] > batch.start[row]
        begins = np.flatnonzero(batch.tokens[row] == begin)
        assert len(begins) > 1 and (batch.start[row][begins] == begins).all()  # each a document of its own
        assert set(batch.start[row][real].tolist()) == set(begins.tolist())
        assert batch.valid[row][batch.tokens[row] == assistant].all()  # an answer's first token is learnt
        assert not batch.valid[row][batch.tokens[row] == end].any()  # and none behind its end
        learnt = batch.targets[row][batch.valid[row]]
        assert (learnt == end).sum() >= len(begins) - 1 and not (learnt == begin).any()
        assert set(learnt.tolist()) <= {*b"abHello4", end}  # and nothing of a prompt, which all say something


def test_a_template_may_be_given(folder):
    (folder / "mine.jinja").write_text(COMPARED.replace("Assistant", "User"))
    found, _ = documents_of(load(config_of(folder, chat_template=folder / "mine.jinja"), vocab_size=VOCAB))
    assert f"[{BEGIN}][<｜User｜>]say 1[<｜User｜>]ab[{END}]" in found
    with pytest.raises(ValueError, match="chat_template must be a readable file of Jinja, got .*gone.jinja"):
        load(config_of(folder, chat_template=folder / "gone.jinja"), vocab_size=VOCAB)


def test_deepseeks_own_template_nests(folder):
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "a.jsonl").unlink()
    found, _ = documents_of(load(config_of(folder), vocab_size=VOCAB))
    assert found[f"[{BEGIN}][<｜User｜>]say 9[<｜Assistant｜>][</think>]{'ab' * 9}[{END}]"] == f"{'ab' * 9}[{END}]"


def test_a_template_that_does_not_nest_is_refused(folder):
    (folder / "chat_template.jinja").write_text(FORGETTING)
    with pytest.raises(ValueError, match=r"a.jsonl:1 must be a conversation: .*messages\[2\] as the beginning"):
        load(config_of(folder), vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "must be a conversation: Expecting property name"),
        ('{"text": "a"}', "each line must be an object with messages, got .*train tokenize"),
        ('{"messages": []}', "messages must be a list of at least one message"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            r"behind another's, got the roles \['user'\]",
        ),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', r"got the roles \['assistant'\]"),
        ('{"messages": [{"role": "king", "content": "a"}]}', r"messages\[0\].role must be one of"),
        ("[" * 100_000, "must be a conversation: maximum recursion"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    (folder / "b.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"b\.jsonl:2 must be a conversation") as error:
        load(config_of(folder), vocab_size=VOCAB)
    assert error.match(message) and len(str(error.value)) < 900


def test_what_conversations_need_is_said(folder, monkeypatch):
    with pytest.raises(ValueError, match="conversations need a tokenizer, got none for .*: give --tokenizer"):
        load(config_of(folder, tokenizer=None), vocab_size=VOCAB)
    with pytest.raises(ValueError, match="vocab_size 260, got 2"):
        load(config_of(folder), vocab_size=260)

    def render(*_):
        raise ModuleNotFoundError("templates need Jinja", name="jinja2")

    monkeypatch.setattr("dsa_jax.chat.template.render", render)
    with pytest.raises(ValueError, match=r"need jinja2: pip install 'dsa-jax\[serve\]'"):
        load(config_of(folder), vocab_size=VOCAB)


def test_marks_are_of_a_template_that_has_them(folder):
    plain = ChatTemplate.of(folder, control_tokenizer())
    assert not plain.marks_answers
    with pytest.raises(ValueError, match="must mark the model's answers"):
        plain.encode_marked(CHAT)
    marked = ChatTemplate.of(folder, control_tokenizer(), source=MARKED)
    assert marked.encode_marked(CHAT)[0] == plain.encode(CHAT, add_generation_prompt=False)
    assert marked.encode(CHAT) == plain.encode(CHAT)
    with pytest.raises(ValueError, match="must not have the noncharacters"):
        marked.encode_marked(say("a\ufdd0", "b"))


def test_a_template_that_marks_nothing_is_refused(folder):
    (folder / "chat_template.jinja").write_text(COMPARED + "{% generation %}{% endgeneration %}")
    with pytest.raises(ValueError, match="must mark what the assistant wrote by {% generation %}, and marked nothing"):
        load(config_of(folder), vocab_size=VOCAB)
