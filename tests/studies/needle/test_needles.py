"""Needles are written as they read, where they are said to stand, and never between the text."""

import numpy as np
import pytest
from needle_cases import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from studies.needle.needles import DIGITS, Needles, plant, plant_at


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def needles(tokenizer):
    return Needles.of(tokenizer)


def text_of(length):
    return np.full(length, 300, np.int32)


def read(needles, planted, place):
    """Reads the pair and the code whose first digit stands at a place."""
    words = {int(number): i for i, number in enumerate(needles.words)}
    digits = {int(number): i for i, number in enumerate(needles.digits)}
    pair = planted.tokens[place - len(needles.statement[1]) - 2 : place - len(needles.statement[1])]
    return [words[int(x)] for x in pair], [digits[int(x)] for x in planted.tokens[place : place + DIGITS]]


def test_they_read_as_sentences(tokenizer, needles):
    pair, code = (3, 5), (4, 8, 2, 1, 3)
    one, two = (tokenizer.decode([int(needles.words[word])]) for word in pair)
    assert tokenizer.decode(needles.state(pair, code)) == f"\n\nThe code of{one}{two} is 48213.\n\n"
    asked = needles.ask(pair, code)
    assert tokenizer.decode(asked) == f"\n\nQuestion: the code of{one}{two} is 48213.\n\n"
    assert tokenizer.decode(asked[needles.answer : needles.answer + DIGITS]) == "48213"
    assert len(asked) <= needles.cell and len(needles.state(pair, code)) <= needles.cell


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_each_is_stated_before_it_is_asked(needles, count):
    length = 2 * 20 * needles.cell + 5
    planted = plant(text_of(length), needles, count, np.random.default_rng(count))
    assert planted.tokens.shape == (length,) and planted.codes.shape == (count, DIGITS)
    assert (planted.stated < planted.asked).all()
    pairs = []
    for stated, asked, code in zip(planted.stated, planted.asked, planted.codes, strict=True):
        assert read(needles, planted, stated) == read(needles, planted, asked)
        pairs.append(tuple(read(needles, planted, stated)[0]))
        assert read(needles, planted, stated)[1] == code.tolist()
    assert len(set(pairs)) == count  # no pair has two codes
    written = count * sum(len(f((0, 1), (0,) * DIGITS)) for f in (needles.state, needles.ask))
    assert (planted.tokens != 300).sum() == written  # all else is the text


def test_the_same_draw_gives_the_same_row(needles):
    one, two, other = (plant(text_of(2000), needles, 9, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (one.tokens == two.tokens).all() and (one.tokens != other.tokens).any()


@pytest.mark.parametrize("depths", [(0.0,), (0.5,), (0.999,), (0.0, 0.2, 0.2, 0.2, 0.9), tuple(np.arange(8) / 8)])
def test_they_stand_at_their_depths_and_are_asked_at_the_end(needles, depths):
    length = 3000
    planted = plant_at(text_of(length), needles, depths, np.random.default_rng(0))
    cells = (length - len(depths) * needles.cell) // needles.cell
    assert (planted.asked >= length - len(depths) * needles.cell).all() and len(set(planted.asked)) == len(depths)
    where = planted.stated // needles.cell / cells
    assert (np.abs(where - np.asarray(depths)) < 4 / cells).all()
    for stated, asked in zip(planted.stated, planted.asked, strict=True):
        assert stated < asked and read(needles, planted, stated) == read(needles, planted, asked)


def test_a_row_without_room_is_refused(needles):
    with pytest.raises(ValueError, match="2 needles must have 4 cells of a row, got 2 in"):
        plant(text_of(2 * needles.cell), needles, 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="2 needles must have 2 cells of a row, got 1 in"):
        plant_at(text_of(3 * needles.cell), needles, (0.0, 0.5), np.random.default_rng(0))
    with pytest.raises(ValueError, match="depths must leave room for 3 needles in 5 cells"):
        plant_at(text_of(8 * needles.cell), needles, (0.9, 0.9, 0.9), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"depths must be from 0 up to but without 1, got \[1.0\]"):
        plant_at(text_of(1000), needles, (1.0,), np.random.default_rng(0))


def test_a_tokenizer_that_makes_codes_easy_is_refused():
    vocabulary = {token: i for i, token in enumerate(["48213", *"0123456789", "[UNK]"])}
    bad = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    bad.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="48213 must be 5 tokens, got 1"):
        Needles.of(bad)
    with pytest.raises(ValueError, match="at least 100 lower-case words of one token, got "):
        Needles.of(make_tokenizer(words=3, size=280))


@pytest.mark.parametrize("count", [0, 1, 9])
def test_answers_are_found_where_they_stand(needles, count):
    planted = plant(text_of(1000), needles, count, np.random.default_rng(count))
    marked = np.zeros(1000, bool)
    for place in planted.asked:
        marked[place : place + DIGITS] = True
    np.testing.assert_array_equal(needles.find(planted.tokens), marked)
    rows = needles.find(np.stack([planted.tokens, text_of(1000)]))
    np.testing.assert_array_equal(rows, [marked, np.zeros(1000, bool)])


def test_an_answer_that_is_cut_is_marked_up_to_there(needles):
    planted = plant_at(text_of(1000), needles, (0.5,), np.random.default_rng(0))
    place = int(planted.asked[0])
    for end in (place, place + 2, place + DIGITS):
        assert np.flatnonzero(needles.find(planted.tokens[:end])).tolist() == list(range(place, end))
    assert not needles.find(planted.tokens[: place - 1]).any()
    other = planted.tokens.copy()
    other[place - len(needles.question[1]) - 1] = needles.digits[0]  # no word: it is no question
    assert not needles.find(other).any()
