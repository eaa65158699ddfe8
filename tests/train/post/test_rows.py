"""Rows: which tokens carry loss, what reaches what, and that nothing is lost between batches."""

from typing import Any

import numpy as np
import pytest
from stage_cases import copy_task, tasks

from train.optimizer import OptimizerSettings
from train.phases import SFT
from train.post.environment import Episode, Turn, no_tokens
from train.post.rewards import score
from train.post.rows import DocumentStream, episode_rows, pack_batch, row_of
from train.post.sft import Samples, demonstration, demonstration_stream, keep_best, sample_stream
from train.post.text import TurnText
from train.settings import PhaseSettings, Stage

TEXT = TurnText.load(None, vocab_size=256, end_of_turn="\n")


def supervised(*stages):
    return (PhaseSettings(SFT, stages, backbone=OptimizerSettings(1e-3), indexer=OptimizerSettings(1e-3)),)


def ids(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def episode(*turns, prompt="p:", **changes):
    """An episode whose turns are (text, observation); the log-probabilities count down."""
    made, value = [], -1.0
    for text, observation in turns:
        tokens = ids(text + "\n")
        log_probs = np.arange(value, value - len(tokens), -1, dtype=np.float32)
        made.append(Turn(text, tokens, log_probs, observation, ids(observation)))
        value -= len(tokens)
    values: dict[str, Any] = dict(task="copy", problem=0, prompt=prompt, prompt_tokens=ids(prompt), turns=made)
    values |= {"environment": copy_task().make(0), "ended": "done"}
    return Episode(**values | changes)


def test_prompts_and_observations_are_never_learnt():
    row = row_of(episode(("ab", "obs"), ("c", "")))
    assert bytes(row.tokens.tolist()) == b"p:ab\nobsc\n"
    assert bytes(row.tokens[row.sampled].tolist()) == b"ab\nc\n"
    assert row.log_probs.tolist() == [0, 0, -1, -2, -3, 0, 0, 0, -4, -5]


def test_targets_stand_one_before_their_tokens():
    arrays = episode_rows([episode(("ab", "obs"), ("c", ""))], 12)
    targets, valid, old = (arrays[name][0] for name in ("targets", "valid", "old_log_probs"))
    assert bytes(targets[valid].tolist()) == b"ab\nc\n"
    assert old[valid].tolist() == [-1, -2, -3, -4, -5] and not old[~valid].any()
    assert arrays["stop"][0].tolist() == [*range(1, 11), 0, 0]  # padding reaches nothing


def test_an_episode_may_fill_its_row_and_not_more():
    whole = episode(("abcdef", ""))  # nine tokens, the last of which is a target alone
    assert episode_rows([whole], 8)["valid"].sum() == 7
    with pytest.raises(ValueError, match="task copy must have at most 8 tokens, got 9 for problem 0"):
        episode_rows([whole], 7)


def test_an_episode_without_turns_is_an_empty_row():
    arrays = episode_rows([episode(prompt="p" * 50), episode(("a", ""))], 8)
    assert not arrays["valid"][0].any() and not arrays["stop"][0].any() and arrays["valid"][1].any()


def documents():
    rng = np.random.default_rng(0)
    number = 0
    while True:
        tokens = rng.integers(1, 200, rng.integers(2, 7)).astype(np.int32)
        number += 1
        yield tokens, np.arange(len(tokens)) > 0


def test_packed_documents_are_whole_and_apart():
    batch = pack_batch(documents(), 3, 16)
    found = []
    for row in range(3):
        for start in np.unique(batch.start[row][batch.stop[row] > batch.start[row]]):
            places = np.flatnonzero((batch.start[row] == start) & (batch.stop[row] > batch.start[row]))
            assert batch.positions[row][places].tolist() == list(range(len(places)))
            assert batch.valid[row][places].sum() == len(places) - 1
            found.append(batch.tokens[row][places].tolist())
    source = documents()
    assert found == [next(source)[0].tolist() for _ in found] and len(found) > 6


def test_no_document_is_lost_between_batches():
    taken = []

    def document(number):
        taken.append(number)
        return np.full(5, number + 1, np.int32), np.ones(5, bool)

    stream = DocumentStream(document, lambda _: (2, 11))
    seen = [set(np.unique(next(stream).tokens).tolist()) - {0} for _ in range(3)]
    assert seen == [{1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10, 11, 12}]


def test_a_stream_goes_on_where_it_was_saved():
    settings = supervised(Stage(2, 2, 16), Stage(2, 3, 24))
    stream = demonstration_stream(list(tasks().values()), TEXT, settings, 0)
    batches, states = [], []
    for _ in range(4):
        batches.append(next(stream))
        states.append(stream.get_state())
    assert [batch.tokens.shape for batch in batches] == [(2, 16)] * 2 + [(3, 24)] * 2
    again = demonstration_stream(list(tasks().values()), TEXT, settings, 0)
    again.set_state(states[1])
    np.testing.assert_array_equal(next(again).tokens, batches[2].tokens)


def test_a_demonstration_is_played_with_its_environment():
    tokens, learnt = demonstration([tasks()["twice"]], TEXT, 0, 0)
    letter = chr(tokens[0])
    assert bytes(tokens.tolist()).decode() == f"{letter}:{letter}\nagain:{letter}\n"
    assert bytes(tokens[learnt].tolist()).decode() == f"{letter}\n{letter}\n"


def test_a_demonstration_that_cannot_be_played_names_its_problem():
    bad = copy_task(demonstrate=lambda number: ["a", "b"])
    with pytest.raises(ValueError, match="of task copy raised ValueError: the environment ended before turn 2 of 2"):
        demonstration([bad], TEXT, 0, 0)


def test_samples_are_kept_whole_and_come_in_each_epoch(tmp_path):
    kept = Samples.of([episode(("a", "")), episode(("bc", "o"), ("d", ""))])
    kept.save(tmp_path / "x.npz")
    loaded = Samples.load(tmp_path / "x.npz")
    assert bytes(loaded.document(1)[0].tolist()) == b"p:bc\nod\n"
    settings = supervised(Stage(4, 2, 16))
    batch = next(sample_stream({"x": loaded}, settings, 0))
    assert batch.valid.any()
    with pytest.raises(ValueError, match="task x has no samples to learn from"):
        sample_stream({"x": Samples.of([])}, settings, 0)
    (tmp_path / "x.npz").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match="must hold samples, and cannot be read"):
        Samples.load(tmp_path / "x.npz")


def test_the_best_samples_of_each_problem_are_kept():
    values = {0: [1.0, 0.2], 1: [0.4, 0.4], 2: [0.9, 0.9]}
    episodes = [episode(problem=number) for number in values for _ in range(2)]
    wanted = [value for each in values.values() for value in each]
    task = copy_task(rewards=((lambda found: wanted[: len(found)], 1.0),))
    assert keep_best(episodes, score(task.rewards, episodes)) == [0, 4, 5]


def test_a_text_whose_end_is_not_one_token():
    with pytest.raises(ValueError, match="end_of_turn must be one token"):
        TurnText.load(None, vocab_size=256, end_of_turn="ab")
    assert not len(no_tokens())
