"""A small model, letters as tokens, and environments that behave or do not, for the tests of rollouts."""

import dataclasses
import functools
import threading
from typing import Any

import numpy as np
from model_cases import small_config, small_model

from train.data import Batch, Replay, window_row
from train.phases import split_groups
from train.post.environment import Episode, Step, Task
from train.post.recorded import Recording, replay_of
from train.post.rollout import Rollouts

CONFIG = small_config(vocab_size=16, num_attention_heads=4, moe_intermediate_size=24, max_position_embeddings=128)
LENGTH = 96
ALL = Recording(routes=True, kept=True, selections=True)


class Letters:
    """Writes letters a to o as the tokens 1 to 15; 0 ends a turn."""

    end_id = 0

    def encode(self, text: str) -> np.ndarray:
        return np.array([(ord(letter) - ord("a")) % 15 + 1 for letter in text], np.int32)

    def decode(self, tokens) -> str:
        return "".join(chr(ord("a") + int(token) - 1) if token else "-" for token in tokens)


class Talk:
    """Answers every turn with a text of its own until it has had enough."""

    def __init__(self, number: int, turns: int = 3, prompt: int = 20):
        self.number, self.turns, self.prompt, self.heard = number, turns, prompt, []

    def reset(self) -> str:
        letters = np.random.default_rng(self.number).integers(15, size=self.prompt + self.number % 7)
        return "".join(chr(ord("a") + int(x)) for x in letters)

    def step(self, text: str) -> Step:
        self.heard.append(text)
        return Step("abcdefghijklmno"[: 1 + (self.number + len(self.heard)) % 5], len(self.heard) == self.turns)


def raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the world has ended")


def hangs(*_: Any) -> Any:
    threading.Event().wait()


def talk_task(name: str = "talk", *, max_turns: int = 3, **changes: Any) -> Task:
    """A task whose environment has some of its methods replaced: `reset`, `step`, `make`."""

    def make(number: int) -> Talk:
        own = Talk(number, *(changes["args"] if "args" in changes else ()))
        for method in ("reset", "step"):
            if method in changes:
                setattr(own, method, functools.partial(changes[method], own))
        return own

    return Task(name, changes.get("make", make), rewards=(), max_turns=max_turns)


@functools.cache
def graphdef_and_params(config=CONFIG):
    return split_groups(small_model(config))


def make(*, config=CONFIG, params=None, **options: Any) -> Rollouts:
    """Makes them of four rows that record everything, as most tests have them: so they share what is compiled."""
    graphdef, own = graphdef_and_params(config)
    values: dict[str, Any] = dict(seq_len=LENGTH, rows=4, record=ALL, cache_format=config.dtype) | options
    rollouts = Rollouts(graphdef, Letters(), **values)
    rollouts.update(own if params is None else params)
    return rollouts


SETTINGS: dict[str, Any] = dict(num_generations=3, max_completion_length=48, temperature=0.9, top_p=0.8, seed=5)


def tokens_of(episode: Episode) -> np.ndarray:
    parts = [x for turn in episode.turns for x in (turn.tokens, turn.observation_tokens)]
    return np.concatenate([episode.prompt_tokens, *parts])


def batch_of(episodes, length=LENGTH, *, replay: tuple[str, ...] = ()) -> tuple[Batch, np.ndarray]:
    """Episodes as rows of a batch, and the log-probabilities of the engine where the model wrote the target."""
    windows, learnt = np.zeros((len(episodes), length + 1), np.int32), np.zeros((len(episodes), length + 1), bool)
    old = np.zeros(windows.shape, np.float32)
    for row, episode in enumerate(episodes):
        ids = tokens_of(episode)
        windows[row, : len(ids)] = ids
        at = len(episode.prompt_tokens)
        for turn in episode.turns:
            here = slice(at, at + len(turn.tokens))
            learnt[row, here], old[row, here] = True, turn.log_probs
            at = here.stop + len(turn.observation_tokens)
    filled = np.array([len(tokens_of(each)) for each in episodes])
    batch = window_row(windows, np.zeros_like(windows), filled=filled, learnt=learnt)
    found = replay_of(episodes, length)
    if found is not None and replay:
        chosen = Replay(**{name: getattr(found, name) for name in replay})
        batch = dataclasses.replace(batch, replay=chosen)
    return batch, old[:, 1:]
