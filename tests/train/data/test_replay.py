"""What a batch replays is cut, stacked and joined with its tokens."""

import numpy as np
from cases import same_bits

from train.data import Batch, Replay


def batch(rows=2, length=6, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    plain = Batch.from_tokens(rng.integers(9, size=(rows, length)))
    replay = Replay(
        routes=rng.integers(4, size=(rows, length, 3, 2)).astype(np.int16),
        selections=rng.integers(length, size=(rows, length, 3, 5)).astype(np.int16),
    )
    return Batch(**vars(plain) | {"replay": replay})


def test_rows_are_stacked_with_what_they_replay():
    whole = batch()
    rows = []
    for place in range(2):
        own = {name: array[place] for name, array in vars(whole).items() if name != "replay"}
        parts = {name: None if x is None else x[place] for name, x in vars(whole.replay).items()}
        rows.append(Batch(**own, replay=Replay(**parts)))
    again = Batch.stack(rows)
    same_bits(again.tokens, whole.tokens)
    same_bits(again.replay.routes, whole.replay.routes)
    same_bits(again.replay.selections, whole.replay.selections)
    assert again.replay.kept is None and Batch.stack([row for row in rows]).canonical().replay is not None


def test_parts_are_joined_with_what_they_replay():
    first, second = batch(length=4), batch(length=3, seed=1)
    joined = Batch.concatenate([first, second])
    assert joined.tokens.shape == (2, 7) and joined.replay.routes.shape == (2, 7, 3, 2)
    same_bits(joined.replay.selections[:, 4:], second.replay.selections)
    assert Batch.concatenate([first]).replay is first.replay


def test_batches_of_text_replay_nothing():
    plain = Batch.from_tokens([[1, 2, 3]])
    assert plain.replay is None and plain.canonical().replay is None
    assert Batch.concatenate([plain, plain]).replay is None
