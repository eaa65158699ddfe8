"""Packed rows: nothing is lost, cut or leaked, and every row is found from anywhere."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import MemoryDocuments, Source
from train.data import packing as module
from train.data.packing import BestFit, best_fit, cut_documents, make_packing, read_places
from train.data.rows import Rows

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(lambda sizes: max(sizes) > 1)


def documents_of(sizes) -> MemoryDocuments:
    """Makes documents whose every token names its document and its place: 1000 (i + 1) + place."""
    return MemoryDocuments.join([np.arange(size, dtype=np.int32) + 1000 * (i + 1) for i, size in enumerate(sizes)])


def rows_of_an_epoch(packing: BestFit) -> int:
    rows = 0
    while packing.epochs(rows) < 1:
        rows += 1
    return rows


@pytest.fixture(params=[3, 1024], ids=["small windows", "one window"])
def windows(request, monkeypatch):
    """Packs few documents at a time, as a large corpus would be."""
    monkeypatch.setattr(module, "LEAST_WINDOW", request.param)
    monkeypatch.setattr(module, "MOST_WINDOW", request.param)


@settings(max_examples=30)
@given(sizes=SIZES, seq_len=st.integers(1, 30), width=st.sampled_from([3, 1024]), seed=st.integers(0, 5))
def test_an_epoch_learns_every_target_once(sizes, seq_len, width, seed):
    """Every pair of neighbours of a document is a token and its target of exactly one row, and nothing else is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST_WINDOW", width)
        patch.setattr(module, "MOST_WINDOW", width)
        documents = documents_of(sizes)
        packing = BestFit(documents, seq_len=seq_len, seed=seed)
        count = rows_of_an_epoch(packing)
        batch = Rows([Source("x", documents, pack="best_fit")], seq_len=seq_len, seed=seed).batch(
            range(count, 2 * count) if packing.epochs(2 * count) == 2 else range(count), [(0, seq_len)]
        )
    pairs = sorted(zip(batch.tokens[batch.valid].tolist(), batch.targets[batch.valid].tolist(), strict=True))
    expected = [(1000 * (i + 1) + j, 1000 * (i + 1) + j + 1) for i, n in enumerate(sizes) for j in range(n - 1)]
    assert pairs == sorted(expected)


@settings(max_examples=40)
@given(sizes=SIZES, seq_len=st.integers(1, 30))
def test_rows_keep_documents_apart_and_padding_reaches_nothing(sizes, seq_len):
    documents = documents_of(sizes)
    for pack in ("concat", "best_fit"):
        if pack == "concat" and documents.size <= seq_len:
            continue
        packing = make_packing(pack, documents, seq_len=seq_len, seed=1)
        batch = read_places([(documents, packing.row(i)) for i in range(4)], 0, seq_len)
        place = np.arange(seq_len)
        for row in range(4):
            tokens, start, stop = batch.tokens[row], batch.start[row], batch.stop[row]
            real = tokens > 0
            assert (stop[~real] == start[~real]).all() and not batch.valid[row][~real].any()
            assert (stop[real] == place[real] + 1).all()
            for t in place[real]:
                assert (tokens[start[t] : t + 1] // 1000 == tokens[t] // 1000).all()  # reaches its document alone
                assert start[t] == 0 or tokens[start[t] - 1] // 1000 != tokens[t] // 1000  # and all of it in the row
            assert (batch.positions[row] == place - start).all()


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_best_fit_is_the_textbooks(sizes):
    """Against brute force: each size, the largest first, goes where it leaves the least room, the earliest of these."""
    places, free, expected = 20, [], {}
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        fits = [row for row in range(len(free)) if free[row] >= sizes[item]]
        row = min(fits, key=lambda row: free[row], default=len(free))
        if row == len(free):
            free.append(places)
        free[row] -= sizes[item]
        expected[item] = row
    assert best_fit(np.array(sizes), places).tolist() == [expected[item] for item in range(len(sizes))]


def test_documents_are_cut_only_when_longer_than_a_row():
    begins, sizes = cut_documents(np.array([0, 5, 11, 12]), np.array([5, 11, 12, 30]), 6)
    assert begins.tolist() == [0, 5, 12, 17, 22, 27] and sizes.tolist() == [5, 6, 6, 6, 6, 3]


def test_rows_are_the_same_from_anywhere(windows):
    documents = documents_of(np.random.default_rng(0).integers(1, 60, 200).tolist())
    packing = BestFit(documents, seq_len=16, seed=4)
    rows = [packing.row(i).reads.tolist() for i in range(2 * rows_of_an_epoch(packing))]
    order = np.random.default_rng(1).permutation(len(rows)).tolist()
    again = BestFit(documents, seq_len=16, seed=4)
    assert [again.row(i).reads.tolist() for i in order] == [rows[i] for i in order]
    at = len(rows) - 3
    resumed = BestFit(documents, seq_len=16, seed=4)
    resumed.set_state(json.loads(json.dumps(packing.get_state(at))))
    assert [resumed.row(i).reads.tolist() for i in (at, len(rows) - 1, 0)] == [rows[i] for i in (at, len(rows) - 1, 0)]
    assert resumed.epochs(at) == packing.epochs(at)
    other = BestFit(documents, seq_len=16, seed=5)
    assert [other.row(i).reads.tolist() for i in range(len(rows))] != rows
    half = len(rows) // 2
    assert rows[:half] != rows[half:]  # every epoch has an order of its own


def test_a_resumed_window_is_found_without_those_before(windows, monkeypatch):
    documents = documents_of([5] * 300)
    first = BestFit(documents, seq_len=16, seed=0)
    state = first.get_state(80)
    resumed = BestFit(documents, seq_len=16, seed=0)
    resumed.set_state(state)
    packed = []
    monkeypatch.setattr(module, "best_fit", lambda *arguments: packed.append(1) or best_fit(*arguments))
    resumed.row(80)
    assert len(packed) == 1


def test_waste_is_what_is_counted(windows):
    sizes = np.random.default_rng(2).integers(2, 30, 400).tolist()
    documents = documents_of(sizes)
    concat = make_packing("concat", documents, seq_len=19, seed=0)
    edges = np.arange(19, documents.size, 19)
    ends = np.cumsum(sizes)
    crossed = [((edges > end - size) & (edges < end)).any() for end, size in zip(ends, sizes, strict=True)]
    assert concat.waste().padding == 0 and concat.waste().cut == pytest.approx(np.mean(crossed))
    packing = make_packing("best_fit", documents, seq_len=19, seed=0)
    assert packing.waste().cut == np.mean(np.array(sizes) > 20)
    assert 0 <= packing.waste().padding < 0.5


def test_large_windows_waste_little():
    sizes = np.random.default_rng(3).lognormal(5, 1, 20000).astype(int) + 1
    packing = BestFit(documents_of(sizes.tolist()), seq_len=2048, seed=0)
    assert packing.waste().padding < 0.003


@pytest.mark.parametrize("state", [[1], [1, -1], [1.0, 2], "ab", {"a": 1}, [True, 0]])
def test_a_state_of_no_packing_is_refused(state):
    with pytest.raises(ValueError, match="must be one that this packing gave"):
        BestFit(documents_of([5, 6]), seq_len=4, seed=0).set_state(state)


def test_parts_of_a_row_are_the_row():
    documents = documents_of([7, 3, 30, 2, 11])
    for pack in ("concat", "best_fit"):
        rows = Rows([Source("x", documents, pack=pack)], seq_len=12, seed=0)
        whole = rows.batch(range(3), [(0, 12)])
        parts = rows.batch(range(3), [(3, 6), (9, 12)])
        for name in ("tokens", "targets", "valid", "start", "stop", "positions"):
            np.testing.assert_array_equal(
                getattr(parts, name), np.delete(getattr(whole, name), [0, 1, 2, 6, 7, 8], axis=1)
            )
