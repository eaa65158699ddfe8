"""Every depth is asked for as often as it should be, and an answer is right if greedy generation would write it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import small_config
from needle_cases import make_tokenizer
from train_cases import small_params

from studies.needle.needles import Needles
from studies.needle.oracle import attend_to_oracle
from studies.needle.questions import Cell, ask, attending, draw_questions
from train.data import MemoryDocuments
from train.phases import merge_groups, window_selection
from train.state import abstract_params

pytestmark = pytest.mark.usefixtures("in_a_hurry")
DEPTHS, SIZE = 4, 470


@pytest.fixture(scope="module")
def needles():
    return Needles.of(make_tokenizer(size=SIZE))


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return MemoryDocuments.join([rng.integers(300, SIZE, size=900).astype(np.int32) for _ in range(3)])


def draw(needles, documents, **changes):
    options = dict(seq_len=200, depths=DEPTHS, a_row=1, questions=3, batch_size=2, seed=0) | changes
    return list(draw_questions(documents, needles, **options))


@pytest.mark.parametrize(("a_row", "rows"), [(1, 12), (2, 6), (3, 4), (4, 4)])
def test_every_depth_is_asked_for(needles, documents, a_row, rows):
    drawn = draw(needles, documents, a_row=a_row)
    depths = np.concatenate([each.depths for each in drawn])
    assert depths.shape == (rows, a_row) and all(len(set(row)) == a_row for row in depths.tolist())
    assert (np.bincount(depths.reshape(-1), minlength=DEPTHS) >= 3).all()
    for each in drawn:
        found = needles.find(np.concatenate([each.batch.tokens, each.batch.targets[:, -1:]], 1))[:, 1:]
        rows_of = np.broadcast_to(np.arange(len(found))[:, None, None], each.answers.shape)
        marked = np.zeros_like(found)
        marked[rows_of, each.answers] = True
        np.testing.assert_array_equal(found, marked)
        digits = each.batch.targets[rows_of, each.answers]
        assert np.isin(digits, needles.digits).all()
    again = draw(needles, documents, a_row=a_row)
    assert all((one.batch.tokens == two.batch.tokens).all() for one, two in zip(drawn, again, strict=True))


WAYS = {
    "dense": attending("dense"),
    "sparse": attending("sparse"),
    "window": attending("sparse", window_selection),
    "oracle": attend_to_oracle,
}


@pytest.mark.parametrize(
    "way", ["window", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way != "window")]
)
def test_right_is_what_greedy_generation_writes(needles, documents, way):
    """The model's own likeliest digits are right; with one of another kind they are wrong."""
    config = small_config(vocab_size=SIZE, max_position_embeddings=256)
    (graphdef, _), params = abstract_params(config), small_params(config)
    drawn = draw(needles, documents, a_row=2)
    told, expected = [], np.zeros((DEPTHS, 2), int)
    for number, each in enumerate(drawn):
        hidden = WAYS[way](graphdef, params, each.batch)
        likeliest = np.asarray(jnp.argmax(merge_groups(graphdef, params).unembed(hidden), -1))
        targets = each.batch.targets.copy()
        for row in range(len(targets)):
            for needle, places in enumerate(each.answers[row]):
                targets[row, places] = likeliest[row, places]
                spoilt = (row + needle + number) % 3 == 0
                if spoilt:
                    targets[row, places[number % 5]] = (likeliest[row, places[number % 5]] + 1) % SIZE
                expected[each.depths[row, needle]] += (not spoilt, 1)
        told.append(dataclasses.replace(each, batch=dataclasses.replace(each.batch, targets=targets)))
    cells = ask(graphdef, params, iter(told), DEPTHS, attend=WAYS[way])
    assert [(cell.right, cell.asked) for cell in cells] == [tuple(pair) for pair in expected.tolist()]
    assert 0 < expected[:, 0].sum() < expected[:, 1].sum()


def test_intervals_hold_the_share_and_stay_within_0_and_1():
    for right, asked in ((0, 50), (1, 50), (25, 50), (50, 50), (1, 1)):
        low, high = Cell(right, asked).interval
        assert 0 <= low <= right / asked <= high <= 1 and low < high
    assert Cell(25, 50).interval == pytest.approx((0.3664, 0.6336), abs=1e-4)  # Wilson's, from a table


def test_more_needles_than_depths_are_refused(needles, documents):
    with pytest.raises(ValueError, match="a row must have from 1 to 4 needles, as many as there are depths, got 5"):
        draw(needles, documents, a_row=5)
    with pytest.raises(ValueError, match="the held_out text must have a document of at least 1001 tokens"):
        draw(needles, documents, seq_len=1000)
