"""Prompts and answers that are messages: tokens by the template, and loss on what the model wrote alone."""

import collections
import dataclasses
import importlib.util
import itertools
import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from chat_cases import control_tokenizer, spelled

from dsa_jax.chat import rendering
from dsa_jax.inference.tokenizer import byte_tokenizer
from dsa_jax.inference.turns import Drawn, Taken
from train.post.chat import NoTemplateError
from train.post.environment import Step, Task
from train.post.playing import Draws, Play
from train.post.recorded import Recording
from train.post.rows import row_of
from train.post.sft import demonstration
from train.post.text import TurnText

END, VOCAB = "<｜end▁of▁sentence｜>", 300
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


def call_of(word):
    """A call of find as DeepSeek-V3.2's encoding writes it."""
    parameter = f'<｜DSML｜parameter name="word" string="true">{word}</｜DSML｜parameter>'
    invoke = f'<｜DSML｜invoke name="find">\n{parameter}\n</｜DSML｜invoke>'
    return f"\n\n<｜DSML｜function_calls>\n{invoke}\n</｜DSML｜function_calls>"


class Find:
    """Has a word looked up by a call, and then wants it said."""

    tools = TOOLS

    def __init__(self, number, role="user"):
        self.number, self.role, self.heard = number, role, []

    def reset(self):
        return [{"role": self.role, "content": f"find {self.number}."}]

    def step(self, text):
        self.heard.append(text)
        calls = text.get("tool_calls", [])
        if not calls:
            return Step("", True)
        word = json.loads(calls[0]["function"]["arguments"])["word"]
        return Step([{"role": "tool", "tool_call_id": calls[0]["id"], "content": f"{word} is 7"}], False)


def demonstrate(number):
    function = {"name": "find", "arguments": {"word": f"w{number}"}}
    call = {"id": "any", "type": "function", "function": function}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "assistant", "content": "7"}]


TASK = Task("find", Find, rewards=(), demonstrate=demonstrate, max_turns=3)


@pytest.fixture
def text(tmp_path):
    return TurnText(control_tokenizer(), END, tmp_path)


def whole(text, environment, *said, thinking=False):
    """The conversation as the template writes it, to the model's last end of a turn."""
    messages = [*environment.reset(), *said]
    ids = text.template.encode(messages, tools=TOOLS, thinking=thinking, add_generation_prompt=False)
    return ids[: len(ids) - ids[::-1].index(text.end_id)]


def conversation(number):
    """The messages behind the prompt, as the environment and the model have them."""
    call, last = demonstrate(number)
    return call, {"role": "tool", "tool_call_id": "any", "content": f"w{number} is 7"}, last


class Scripted:
    """Stands for a model and its cache: draws the same texts for all sequences, and keeps what it was given to read."""

    def __init__(self, text, *script):
        self.script = [text.encode_turn(each) for each in script]
        self.read_tokens, numbers = [], itertools.count()
        self.runner = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB))
        take = lambda *_: next(numbers)
        self.cache = SimpleNamespace(row_shards=1, new=take, fork=take, free=lambda _: None, sequences=())

    def read(self, rows, tokens):
        self.read_tokens.append([each.tolist() for each in tokens if len(each)])
        return jnp.zeros((len(rows), VOCAB)), [Taken(None, None) for _ in rows]

    def draw(self, sequences, logits, settings, **_):
        tokens = self.script.pop(0)
        drawn = Drawn(tokens, np.full(len(tokens), -1.0, np.float32), None, Taken(None, None))
        return [None if each is None else drawn for each in sequences]


def play(text, *script, task=TASK):
    """Plays two episodes of one problem."""
    turns = Scripted(text, *script)
    draws = Draws(1.0, 1.0, VOCAB, 0, False, 60.0, 400)
    playing = Play(turns, text, draws, rows=2, seq_len=2000, record=Recording(), version=0)  # pyright: ignore[reportArgumentType]
    queue, episodes = collections.deque(enumerate([(task, 3)] * 2)), {}
    while queue or playing.live:
        episodes |= dict(playing.round(queue))
    return turns, [episodes[i] for i in range(2)]


def test_an_episode_is_the_conversation_as_the_template_writes_it(text):
    turns, episodes = play(text, call_of("w3"), "7")
    for episode in episodes:
        assert episode.ended == "done" and not episode.error
        row = row_of(episode)
        assert row.tokens.tolist() == whole(text, episode.environment, *conversation(3))
        written = spelled(text.tokenizer, row.tokens[row.sampled])
        assert written == f"{spelled(text.tokenizer, text.encode(call_of('w3')))}[{END}]7[{END}]"
        assert json.loads(episode.turns[0].observation)[0]["content"] == "w3 is 7"
        heard = episode.environment.heard
        assert heard[0]["tool_calls"][0]["function"] == {"name": "find", "arguments": '{"word": "w3"}'}
        assert heard[0]["tool_calls"][0]["id"] == "call_0" and heard[1]["content"] == "7"
    prompt, answer = turns.read_tokens
    assert len(prompt) == 1 and len(answer) == 2, "a group's prompt is read once"
    assert answer[0] == [text.end_id, *episodes[0].turns[0].observation_tokens]


def test_demonstrations_are_learnt_where_the_model_writes(text):
    ids, learnt = demonstration([TASK], text, 0, 0)
    number = int(text.decode(ids).partition("find ")[2].partition(".")[0])
    assert ids.tolist() == whole(text, Find(number), *conversation(number))
    call = spelled(text.tokenizer, text.encode(call_of(f"w{number}")))
    assert spelled(text.tokenizer, ids[learnt]) == f"{call}[{END}]7[{END}]"


THINKING = dataclasses.replace(TASK, thinking=True, demonstrate=lambda number: thoughts(number)[::2])


def thoughts(number):
    """The conversation of one who thinks."""
    call, answer, last = conversation(number)
    return call | {"reasoning_content": "Look."}, answer, last | {"reasoning_content": "Seven."}


def test_what_is_thought_is_learnt_as_the_template_writes_it(text):
    _, episodes = play(text, "Look.</think>" + call_of("w3"), "Seven.</think>7", task=THINKING)
    for episode in episodes:
        row, heard = row_of(episode), episode.environment.heard
        assert row.tokens.tolist() == whole(text, episode.environment, *thoughts(3), thinking=True)
        assert spelled(text.tokenizer, row.tokens[row.sampled]).endswith(f"[{END}]Seven.[</think>]7[{END}]")
        assert [each["reasoning_content"] for each in heard] == ["Look.", "Seven."] and heard[1]["content"] == "7"
    ids, learnt = demonstration([THINKING], text, 0, 0)
    number = int(text.decode(ids).partition("find ")[2].partition(".")[0])
    assert ids.tolist() == whole(text, Find(number), *thoughts(number), thinking=True)
    assert spelled(text.tokenizer, ids[learnt]).startswith("Look.[</think>]")


def test_a_users_next_message_follows_what_was_thought(text):
    """The template leaves out what was thought before it; the episode does not, and goes on as the template does."""
    chat = text.chat([{"role": "user", "content": "a"}], thinking=True)
    chat.hear("Hm.</think>b")
    assert (
        spelled(text.tokenizer, chat.answer([{"role": "user", "content": "c"}]))
        == "[<｜User｜>]c[<｜Assistant｜>][<think>]"
    )
    assert chat.hear("Ah.</think>d") == {"role": "assistant", "content": "d", "reasoning_content": "Ah."}


def test_what_a_template_cannot_write_ends_the_episode_alone(text):
    nobody = dataclasses.replace(TASK, make=lambda number: Find(number, role="nobody"))
    _, (episode, _) = play(text, "7", task=nobody)
    assert episode.ended == "error" and "messages[0].role must be one of" in episode.error


def test_without_a_template_no_episode_is_played(text, tmp_path, monkeypatch):
    """There is none, or it needs a package that is missing: that is said once, and the run ends."""
    with pytest.raises(NoTemplateError, match="prompts that are messages need the model's template: give --tokenizer"):
        play(TurnText(text.tokenizer, text.end_of_turn), "7")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}{{ tools }}")
    monkeypatch.setattr(rendering, "_PROCESS", rendering.RenderProcess())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoTemplateError, match=re.escape("need jinja2: pip install 'dsa-jax[serve]'")):
        play(TurnText(text.tokenizer, text.end_of_turn, tmp_path), "7")
    with pytest.raises(NoTemplateError, match="thinking must be False: this model's template knows no reasoning"):
        play(TurnText(byte_tokenizer(), "~", tmp_path / "none"), "7", task=THINKING)


def test_what_cannot_be_is_refused(text):
    user = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="end_of_turn must be the token by which the template ends an answer"):
        TurnText(text.tokenizer, "~", text.folder).chat(user).say({"role": "assistant", "content": "b"})
    with pytest.raises(ValueError, match="must be without reasoning_content"):
        text.chat(user).say({"role": "assistant", "content": "b", "reasoning_content": "c"})
    with pytest.raises(ValueError, match=r"messages\[0\].role must be one of"):
        text.chat([{"role": "nobody", "content": "a"}])
