"""Recall episodes: mixed in evenly, answered by what was declared, and streams that resume bitwise."""

import json

import numpy as np
import pytest
from train_cases import batch_at, write_documents

from studies.tiny import recall
from studies.tiny.recall import RecallConfig, RecallCorpus, draw_held_out, load, scored_answers
from train import data
from train.data import DataConfig


@pytest.fixture
def folder(tmp_path):
    """Writes the files that the tests read."""
    return write_documents(tmp_path)


def corpus_of(folder, share=0.5) -> RecallCorpus:
    return load(RecallConfig(data=(f"{folder}/*.txt",), recall=share))


def has_questions(batch):
    """Says of each row whether it asks for a register."""
    return ((batch.tokens >= recall.ASK) & (batch.tokens < recall.ASK + recall.REGISTERS)).any(axis=1)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_every_batch_holds_its_share_of_episodes(folder, share, expected):
    dataset = corpus_of(folder, share).dataset("train", batch_size=8, seq_len=128, seed=0)
    for i in range(5):
        # The text itself holds bytes from 192 up, but none of 128 … 135.
        assert has_questions(batch_at(dataset, i)).sum() == expected


def parse_episode(tokens) -> tuple[dict[int, int], list[int]]:
    """Reads the registers' values and the scored places from the bytes alone."""
    values: dict[int, int] = {}
    last: dict[int, int] = {}
    scored = []
    for place, token in enumerate(int(token) for token in tokens):
        if token < recall.STATE:
            assert token < recall.ASK + recall.REGISTERS
            continue
        register, value = divmod(token - 192, 8)
        if place and recall.ASK <= tokens[place - 1] < recall.STATE:
            assert tokens[place - 1] - recall.ASK == register, "the answer is of the register that was asked"
            assert values[register] == value, "the answer is what was declared"
            if place - last[register] > 64:
                scored.append(place)
        else:
            assert register not in values, "a register is declared once"
            values[register] = value
        last[register] = place
    return values, scored


def test_recall_answers_are_what_was_declared(folder):
    dataset = corpus_of(folder, 1.0).dataset("held_out", batch_size=4, seq_len=512, seed=0)
    seen = set()
    for i in range(10):
        batch = batch_at(dataset, i)
        assert batch.valid.all() and (batch.start == 0).all()
        for row in range(4):
            tokens = np.append(batch.tokens[row], batch.targets[row, -1])
            values, scored = parse_episode(tokens)
            assert len(values) == recall.REGISTERS
            assert len(scored) >= 5
            np.testing.assert_array_equal(np.flatnonzero(scored_answers(batch)[row]) + 1, scored)
            seen.update(values.items())
    assert len(seen) == recall.REGISTERS * recall.VALUES  # every value of every register turns up


def test_code_in_an_episode_cannot_collide_with_the_task(folder):
    assert "ï".encode() in (folder / "f03.txt").read_bytes()
    dataset = corpus_of(folder, 1.0).dataset("train", batch_size=1, seq_len=400, seed=0)
    tokens = batch_at(dataset, 0).tokens[0]
    declared = sum(token >= recall.STATE for token in tokens)
    asked = sum(recall.ASK <= token < recall.STATE for token in tokens)
    assert declared == recall.REGISTERS + asked or declared == recall.REGISTERS + asked - 1  # cut after a question


def test_text_without_a_single_ascii_line_still_makes_episodes(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_bytes(("é" * 900 + name).encode())
    batch = batch_at(corpus_of(tmp_path, 1.0).dataset("train", batch_size=1, seq_len=300, seed=0), 0)
    parse_episode(batch.tokens[0])


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_batches_are_a_function_of_their_arguments_and_resume(folder, share):
    arguments = {"batch_size": 5, "seq_len": 64, "seed": 1}
    batches = corpus_of(folder, share).batches("train", **arguments)
    dataset = corpus_of(folder, share).dataset("train", **arguments)
    first = [next(batches) for _ in range(6)]
    state = json.loads(json.dumps(batches.get_state()))
    resumed = corpus_of(folder, share).batches("train", **arguments)
    resumed.set_state(state)
    for i, batch in enumerate([*first, next(resumed)]):
        np.testing.assert_array_equal(batch.tokens, batch_at(dataset, i).tokens)
    assert np.array_equal(next(batches).tokens, batch_at(dataset, 6).tokens)


def test_the_share_is_part_of_the_stream(folder):
    arguments = {"batch_size": 2, "seq_len": 64, "seed": 0}
    half = corpus_of(folder).batches("train", **arguments)
    for other in (corpus_of(folder, 0.25), data.load(DataConfig(data=(f"{folder}/*.txt",)))):
        with pytest.raises(ValueError, match="what is mixed in"):
            other.batches("train", **arguments).set_state(half.get_state())
    text = data.load(DataConfig(data=(f"{folder}/*.txt",))).batches("train", **arguments)
    corpus_of(folder, 0.0).batches("train", **arguments).set_state(text.get_state())  # without episodes it is the text


def test_held_out_parts_do_not_mix(folder):
    held_out = draw_held_out(corpus_of(folder), 2, 4, 256)
    assert held_out.names == ("all", "text", "recall", "answers")
    assert held_out.mixture == {"text": 0.5, "recall": 0.5}
    assert not any(has_questions(batch).any() for batch in held_out.parts["text"])
    assert all(has_questions(batch).all() for batch in held_out.parts["recall"])
    assert all(mask.any() for mask in held_out.subsets["recall"]["answers"])
    assert draw_held_out(corpus_of(folder, 0.0), 2, 4, 256).names == ("all", "text")
    assert draw_held_out(corpus_of(folder, 1.0), 2, 4, 256).names == ("all", "recall", "answers")


def test_bad_settings(folder):
    with pytest.raises(ValueError, match="recall must be between 0 and 1, got 1.5"):
        RecallConfig(recall=1.5)
    with pytest.raises(ValueError, match="tokenizer must be None"):
        RecallConfig(tokenizer=folder / "tokenizer.json")
    with pytest.raises(ValueError, match="held_out must be"):
        RecallConfig(held_out=0.0)
