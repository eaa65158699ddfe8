"""Episodes that tests of post-training make by hand, and tasks played by their own demonstrations."""

import numpy as np

from train.post.environment import Episode, Turn


def turn(text, observation="", *, tokens=None):
    """A turn of so many tokens, by default one a character and its end marker."""
    count = len(text) + 1 if tokens is None else tokens
    return Turn(text, np.zeros(count, np.int32), np.zeros(count, np.float32), observation)


def episode(environment, *texts, task="task", problem=0, ended="done", error=""):
    """An episode of these turns, which the environment is not asked about."""
    no_tokens = np.zeros(0, np.int32)
    return Episode(task, problem, "", no_tokens, [turn(text) for text in texts], environment, ended, error)


def play(task, problem, texts):
    """An episode in which the model writes these texts, one a turn, until the environment ends it."""
    environment = task.make(problem)
    prompt, turns, done = environment.reset(), [], False
    for text in texts:
        if done or len(turns) == task.max_turns:
            break
        observation, done = environment.step(text)
        turns.append(turn(text, observation))
    tokens = np.frombuffer(prompt.encode(), np.uint8).astype(np.int32)
    return Episode(task.name, problem, prompt, tokens, turns, environment, "done" if done else "turns")
