"""Training on shards: mixtures, splits within them, positions, progress, and what is refused when they are opened."""

import json

import numpy as np
import pytest
from shard_cases import random_documents, write_shards
from tokenizers import Tokenizer, models
from train_cases import batch_at, write_documents

from train.data import TOKEN_FIELDS, Batch, DataConfig, load, mixing
from train.data.manifest import hash_tokenizer


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Three sources: shards of even and of odd tokens, and text."""
    folder = tmp_path_factory.mktemp("places")
    even = [[t // 2 * 2 for t in document] for document in random_documents(60, seed=0)]
    odd = [[t // 2 * 2 + 1 for t in document] for document in random_documents(40, seed=1)]
    write_shards(folder / "even", [even[:25], even[25:]])
    write_shards(folder / "odd", [odd])
    write_shards(folder / "bare", [random_documents(50, seed=2)], manifest=False)
    (folder / "text").mkdir()
    write_documents(folder / "text")
    return folder


def mixture(places, **changes) -> DataConfig:
    data = (f"even=0.7:{places}/even", f"odd=0.3:{places}/odd")
    return DataConfig(**{"data": data} | changes)


def tokens_of(documents) -> list[list[int]]:
    ends = documents.offsets.tolist()
    return [documents.read(a, b).tolist() for a, b in zip(ends[:-1], ends[1:], strict=True)]


def assert_same(first: Batch, second: Batch) -> None:
    for name in TOKEN_FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_each_batch_holds_its_shares(places, pack):
    dataset = load(mixture(places, pack=pack)).dataset("train", batch_size=10, seq_len=16, seed=0)
    for i in range(20):
        batch = batch_at(dataset, i)
        real = batch.stop > batch.start
        odd = [{token % 2 for token in row[mask].tolist()} for row, mask in zip(batch.tokens, real, strict=True)]
        assert sorted(odd, key=min) == [{0}] * 7 + [{1}] * 3


def test_without_weights_sources_are_mixed_by_their_tokens(places):
    corpus = load(DataConfig(data=(f"{places}/even", f"{places}/odd")))
    sizes = [source.documents.size for source in corpus.train_sources]
    progress = corpus.rows("train", batch_size=1, seq_len=16, seed=0).progress(1000)
    assert [source.name for source in corpus.train_sources] == [f"{places}/even", f"{places}/odd"]
    for part, size in zip(progress.values(), sizes, strict=True):
        assert abs(part.tokens - 16000 * size / sum(sizes)) < 16


def test_shards_mix_with_text_and_bare_prefixes(places):
    data = (f"{places}/text/*.txt", f"{places}/even", f"{places}/bare/shard-00000")
    corpus = load(DataConfig(data=data))
    assert [source.name for source in corpus.train_sources] == ["text", *data[1:]]
    assert corpus.tokens("train") == sum(source.documents.size for source in corpus.train_sources)
    batch_at(corpus.dataset("train", batch_size=4, seq_len=32, seed=0), 3)


def test_a_glob_of_folders_is_one_source(places):
    corpus = load(DataConfig(data=(f"both=1:{places}/[eo]*",)))
    assert sorted(tokens_of(corpus.train) + tokens_of(corpus.held_out)) == sorted(
        tokens_of(load(DataConfig(data=(f"{places}/even",), held_out_data=(f"{places}/odd",))).train)
        + tokens_of(load(DataConfig(data=(f"{places}/odd",), held_out_data=(f"{places}/even",))).train)
    )


def test_documents_of_a_shard_lie_in_one_split(places, tmp_path):
    corpus = load(DataConfig(data=(f"{places}/even",), held_out=0.3))
    train, held_out = tokens_of(corpus.train), tokens_of(corpus.held_out)
    assert len(train) + len(held_out) == 60 and 8 < len(held_out) < 30
    moved = tmp_path / "moved"
    moved.symlink_to(places / "even")
    again = load(DataConfig(data=(str(moved),), held_out=0.3))
    assert tokens_of(again.held_out) == held_out  # wherever it lies
    odd, both = (load(DataConfig(data=(f"{places}/{name}",), held_out=0.3)) for name in ("odd", "[eo]*"))
    assert tokens_of(both.held_out) == held_out + tokens_of(odd.held_out)  # and whatever lies beside it
    few = load(DataConfig(data=(f"{places}/even",), held_out=1e-9))
    most = load(DataConfig(data=(f"{places}/even",), held_out=1 - 1e-6))
    assert len(few.held_out) == 1 and len(most.train) == 1


def test_named_held_out_documents_are_all_that_is_held_out(places):
    corpus = load(mixture(places, data=(f"{places}/even",), held_out_data=(f"{places}/odd",)))
    assert len(corpus.train) == 60 and len(corpus.held_out) == 40
    with pytest.raises(ValueError, match="must not be trained on, got 2 files .* share"):
        load(mixture(places, held_out_data=(f"{places}/even",)))
    text = f"{places}/text/*.txt"
    with pytest.raises(ValueError, match="got 1 files or conversations that text and text share"):
        load(DataConfig(data=(text,), held_out_data=(f"{places}/text/f00.txt",)))


def test_short_documents_are_left_out(places):
    for data in (f"{places}/even", f"{places}/text/*.txt"):
        corpus = load(DataConfig(data=(data,), min_document=30))
        assert corpus.train.lengths.min() >= 30 and corpus.held_out.lengths.min() >= 30
    whole = load(DataConfig(data=(f"{places}/even",)))
    assert (whole.train.lengths < 30).any()
    with pytest.raises(ValueError, match="min_document 1000 tokens or more"):
        load(DataConfig(data=(f"{places}/even",), min_document=1000))
    with pytest.raises(ValueError, match="min_document 100000 tokens or more to train on, got none"):
        load(DataConfig(data=(f"{places}/text/*.txt",), min_document=100_000))


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
@pytest.mark.parametrize("at", [0, 3, 90])
def test_a_resumed_mixture_continues_bitwise(places, pack, at, monkeypatch):
    """Behind several epochs and blocks of the schedule too."""
    monkeypatch.setattr(mixing, "BLOCK", 64)
    arguments = {"batch_size": 3, "seq_len": 24, "seed": 5}
    corpus = load(mixture(places, pack=pack))
    dataset = corpus.dataset("train", **arguments)
    batches = corpus.batches("train", **arguments)
    for _ in range(at):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    assert len(json.dumps(state)) < 300
    resumed = load(mixture(places, pack=pack)).batches("train", **arguments)
    resumed.set_state(state)
    assert resumed.get_state() == state
    for i in range(at, at + 4):
        expected = batch_at(dataset, i)
        assert_same(next(batches), expected)
        assert_same(next(resumed), expected)
    assert resumed.progress() == batches.progress() and resumed.get_state() == batches.get_state()


def test_changed_mixtures_are_other_streams(places):
    changes = [
        {},
        {"data": (f"even=0.6:{places}/even", f"odd=0.4:{places}/odd")},
        {"pack": "best_fit"},
        {"min_document": 9},
        {"held_out": 0.2},
        {"held_out_data": (f"{places}/bare/shard-00000",)},
    ]
    names = [load(mixture(places, **change)).fingerprint for change in changes]
    assert len(set(names)) == len(names) and load(mixture(places)).fingerprint == names[0]


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_progress_counts_tokens_and_epochs(places, pack):
    corpus = load(mixture(places, pack=pack))
    batches = corpus.batches("train", batch_size=5, seq_len=16, seed=0)
    rows, tokens = 0, {"even": 0, "odd": 0}
    for _ in range(60):
        batch = next(batches)
        rows += 5
        for row, start, stop in zip(batch.tokens, batch.start, batch.stop, strict=True):
            tokens["odd" if row[0] % 2 else "even"] += int((stop > start).sum())
    found, expected = batches.progress(), corpus.progress(rows, seq_len=16)
    for source in corpus.train_sources:
        size, name = source.documents.size, source.name
        slack = 0 if pack == "concat" else 0.15 * tokens[name]  # of the rows of a window some hold more
        assert abs(found[name].tokens - tokens[name]) <= slack
        assert found[name].epochs == pytest.approx(tokens[name] / size, rel=0.15)
        assert abs(expected[name].tokens - rows * 16 * {"even": 0.7, "odd": 0.3}[name]) < 1
    assert found["even"].tokens > 2 * found["odd"].tokens


def test_another_tokenizer_than_the_shards_is_refused(tmp_path):
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.json")
        Tokenizer(models.WordLevel({"[UNK]": 0, f"word{i}": 1}, unk_token="[UNK]")).save(str(paths[i]))
    shards = write_shards(tmp_path / "shards", [[[0, 1], [1, 0]]], tokenizer_hash=hash_tokenizer(paths[0]))
    assert load(DataConfig(data=(str(shards),), tokenizer=paths[0])).tokens("train") == 2
    with pytest.raises(ValueError, match=r"must be the one that made .*shards, of hash \w{12}, got of hash \w{12} "):
        load(DataConfig(data=(str(shards),), tokenizer=paths[1]))
    with pytest.raises(ValueError, match=r"of hash \w{12}, got bytes \(no --tokenizer\): give that one"):
        load(DataConfig(data=(str(shards),)))


def test_shards_that_do_not_fit_are_refused_when_they_are_opened(tmp_path, places):
    shards = write_shards(tmp_path / "large", [[[1, 2], [300, 2]]])
    with pytest.raises(ValueError, match=r"vocab_size 256, got 300 in .*shard-00000.bin"):
        load(DataConfig(data=(str(shards),)))
    one = write_shards(tmp_path / "one", [[[1, 2, 3]]])
    with pytest.raises(ValueError, match="at least two documents .* got 1 of 1: give more, or name held-out data"):
        load(DataConfig(data=(str(one),)))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"must name text files, got .*none', which matches none"):
        load(DataConfig(data=(str(tmp_path / "none"),)))
    with open(shards / "shard-00000.bin", "r+b") as file:
        file.truncate(2)
    with pytest.raises(ValueError, match="shard-00000.bin must have the 8 bytes"):
        load(DataConfig(data=(str(shards),)), vocab_size=400)
    (one / "shard-00000.bin").unlink()
    with pytest.raises(ValueError, match=r"shard-00000.bin: No such file"):
        load(DataConfig(data=(str(one / "shard-00000"),)))
    with pytest.raises(ValueError, match=r"one sequence takes 9001 tokens, but the train text of even has"):
        load(mixture(places)).batches("train", batch_size=1, seq_len=9000, seed=0)


def test_ids_of_bare_files_are_not_known_before_they_are_read(tmp_path):
    """Without a manifest only the batch shows them; a run refuses it before the step."""
    folder = write_shards(tmp_path, [[[1, 2, 3], [300, 2, 1]] * 5], manifest=False)
    corpus = load(DataConfig(data=(str(folder / "shard-00000"),)))
    batches = [batch_at(corpus.dataset("train", batch_size=1, seq_len=4, seed=0), i) for i in range(8)]
    assert max(int(batch.tokens.max()) for batch in batches) == 300
