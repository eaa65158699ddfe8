"""Rows are parts of one document each, from position 0, with needles of the densities asked for."""

import numpy as np
import pytest
from needle_cases import make_tokenizer

from studies.needle.needles import Needles
from studies.needle.rows import NeedleConfig, NeedleCorpus, Windows
from train.data import BatchSource, Corpus, MemoryDocuments, Source

LENGTHS = (50, 3000, 1025, 4200)


@pytest.fixture(scope="module")
def needles():
    return Needles.of(make_tokenizer())


@pytest.fixture
def corpus(needles, tmp_path):
    """Documents whose tokens say which they are of and where; needles are made of other tokens."""
    documents = [1000 * (i + 1) * 10 + np.arange(length, dtype=np.int32) for i, length in enumerate(LENGTHS)]
    source = Source("text", MemoryDocuments.join(documents), None, "concat")
    text = Corpus((source,), (source,), make_tokenizer(), "fingerprint")
    return NeedleCorpus(text, needles, NeedleConfig(tokenizer=tmp_path / "tokenizer.json"))


def test_windows_lie_within_documents_end_to_end(corpus):
    windows = Windows.of(corpus.text.train, "train", 1024)
    found = [windows.read(i) for i in range(len(windows))]
    assert len(windows) == 2 + 1 + 4
    begins = [(int(tokens[0]) // 10000, int(tokens[0]) % 10000) for tokens in found]
    assert begins == [(2, 0), (2, 1024), (3, 0), (4, 0), (4, 1024), (4, 2048), (4, 3072)]
    assert all((np.diff(tokens) == 1).all() and len(tokens) == 1025 for tokens in found)


def test_rows_are_documents_from_position_0(corpus):
    assert isinstance(corpus, BatchSource)
    batch = next(corpus.batches("train", batch_size=3, seq_len=512, seed=0))
    assert batch.tokens.shape == (3, 512) and batch.valid.all()
    assert (batch.targets[:, :-1] == batch.tokens[:, 1:]).all()
    assert (batch.start == 0).all() and (batch.stop == np.arange(1, 513)).all()
    assert (batch.positions == np.arange(512)).all()


@pytest.mark.parametrize(("seq_len", "most", "share"), [(1024, 16, 0.8), (2048, 16, 1.0)])
def test_densities_are_those_asked_for(corpus, needles, seq_len, most, share):
    dataset = corpus.dataset("train", batch_size=1, seq_len=seq_len, seed=3)
    size = sum(len(write((0, 1), (0,) * 5)) for write in (needles.state, needles.ask))
    counts = np.asarray([round(int((dataset[i].tokens < 10000).sum()) / size) for i in range(200)])
    assert counts.max() == most and abs(counts.mean() - share * most / 2) < 1.2
    assert abs((counts == 0).mean() - (1 - share) - 0.5 / most) < 0.08


def test_a_stream_goes_on_where_it_was_and_knows_its_own(corpus):
    one, two = (corpus.batches("train", batch_size=2, seq_len=512, seed=1) for _ in range(2))
    for _ in range(5):
        next(one)
    two.set_state(one.get_state())
    assert (next(one).tokens == next(two).tokens).all()
    other = corpus.batches("train", batch_size=2, seq_len=512, seed=2)
    with pytest.raises(ValueError, match="the saved data position belongs to stream"):
        other.set_state(one.get_state())


def test_text_too_short_for_a_row_is_refused_before_anything_is_read(corpus):
    with pytest.raises(ValueError, match="the held_out text must have a document of at least 8193 tokens, .* got 4200"):
        corpus.batches("held_out", batch_size=1, seq_len=8192, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": -0.1}, "density must be"),
        ({"short_density": 1.5}, "short_density must be between 0 and 1, got 1.5"),
        ({"short_share": float("nan")}, "short_share must be"),
        ({"tokenizer": None}, "give one, whose digits are single tokens"),
        ({"pack": "best_fit"}, "pack must be concat"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        NeedleConfig(**{"tokenizer": tmp_path / "t.json", **changes})
