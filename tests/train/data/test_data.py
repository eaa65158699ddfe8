"""Splits share nothing, streams resume bitwise, and packed rows do not leak."""

import gzip
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from train_cases import DOCUMENTS, batch_at, write_documents

from dsa_jax.key_range import KeyRange
from train.data import TOKEN_FIELDS, Batch, DataConfig, load, text_row
from train.data.text import choose_held_out, find_files, read_files


@pytest.fixture
def folder(tmp_path):
    """Writes the files that the tests read."""
    return write_documents(tmp_path)


def text_config(folder, **changes) -> DataConfig:
    return DataConfig(data=(f"{folder}/*.txt",), **changes)


def take(batches, count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.replay is None and b.replay is None
        for name in TOKEN_FIELDS:
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def documents(split) -> list[bytes]:
    return [split.tokens[a:b].tobytes() for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True)]


def test_every_file_lies_in_one_split(folder):
    corpus = load(text_config(folder, held_out=0.3))
    train, held_out = documents(corpus.train), documents(corpus.held_out)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(path.read_bytes() for path in folder.glob("*.txt"))
    assert 0.1 * DOCUMENTS < len(held_out) < 0.5 * DOCUMENTS


def test_held_out_text_never_reaches_a_training_batch(folder):
    corpus = load(text_config(folder, held_out=0.3))
    names = {document[:6] for document in documents(corpus.held_out)}
    batches = corpus.dataset("train", batch_size=8, seq_len=96, seed=3)
    epoch = len(corpus.train.tokens) // (8 * 96)
    seen = b"".join(batch_at(batches, i).tokens.astype(np.uint8).tobytes() for i in range(2 * epoch + 1))
    assert not any(name in seen for name in names)
    assert all(document[:6] in seen for document in documents(corpus.train))


def test_the_split_of_a_file_depends_on_its_contents_alone(folder, tmp_path):
    before = set(documents(load(text_config(folder, held_out=0.3)).held_out))
    moved = tmp_path / "moved"
    moved.mkdir()
    for i, path in enumerate(sorted(folder.glob("*.txt"))):
        (moved / f"{DOCUMENTS - i}.txt").write_bytes(path.read_bytes())
    (moved / "copy.txt").write_bytes((moved / "3.txt").read_bytes())
    (moved / "more.txt").write_text("another file\n")
    after = load(text_config(moved, held_out=0.3))
    assert before == set(documents(after.held_out)) - {b"another file\n"}
    assert len(after.train) + len(after.held_out) == DOCUMENTS + 1  # the copy counts once


def test_two_files_give_both_splits(folder):
    config = DataConfig(data=(f"{folder}/f00.txt", f"{folder}/f01.txt"), held_out=1e-9)
    corpus = load(config)
    assert len(corpus.train) == len(corpus.held_out) == 1


def test_text_row_is_the_file_with_a_document_a_key_range(folder):
    corpus = load(text_config(folder))
    split, seq_len = corpus.train, 150
    for begin in (0, seq_len, 7 * seq_len):
        row = text_row(split, begin, seq_len)
        place = np.arange(begin, begin + seq_len)
        ids = np.sum(split.offsets[1:, None] <= place, axis=0)  # naive: how many documents end at or before each place
        next_ids = np.sum(split.offsets[1:, None] <= place + 1, axis=0)
        np.testing.assert_array_equal(row.tokens, split.tokens[place])
        np.testing.assert_array_equal(row.targets, split.tokens[place + 1])
        np.testing.assert_array_equal(row.valid, ids == next_ids)
        expected = KeyRange.packed(jnp.asarray(ids[None]))
        np.testing.assert_array_equal(row.start, expected.start[0])
        np.testing.assert_array_equal(row.stop, expected.stop[0])
        first = np.array([np.flatnonzero(ids == i)[0] for i in ids])
        np.testing.assert_array_equal(row.positions, np.arange(seq_len) - first)


def test_packed_rows_occur(folder):
    batch = batch_at(load(text_config(folder)).dataset("train", batch_size=32, seq_len=300, seed=0), 0)
    assert (batch.start > 0).any() and (~batch.valid).any()
    assert (batch.positions == np.arange(300) - batch.start).all()


def test_batches_are_a_function_of_their_arguments(folder):
    corpus, again = (load(text_config(folder)) for _ in range(2))
    arguments = {"batch_size": 5, "seq_len": 64}
    first = take(corpus.batches("train", seed=1, **arguments), 12)
    assert_same(first, take(again.batches("train", seed=1, **arguments), 12))
    dataset = again.dataset("train", seed=1, **arguments)
    assert_same(first[::-1], [batch_at(dataset, i) for i in reversed(range(12))])  # random access, any order
    other = take(corpus.batches("train", seed=2, **arguments), 12)
    assert any((a.tokens != b.tokens).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_end(tmp_path, batch_size):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 10)
    batches = load(text_config(tmp_path)).batches("train", batch_size=batch_size, seq_len=60, seed=0)
    assert len(take(batches, 20)) == 20  # of the one window there is


@pytest.mark.parametrize("at", [0, 1, 7])
def test_resumed_iterator_continues_bitwise(folder, at):
    arguments = {"batch_size": 3, "seq_len": 80, "seed": 5}
    batches = load(text_config(folder)).batches("train", **arguments)
    take(batches, at)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 6)
    resumed = load(text_config(folder)).batches("train", **arguments)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(expected, take(resumed, 6))
    batches.set_state(state)  # and back in place
    assert_same(expected, take(batches, 6))


def test_a_state_of_another_stream_is_refused(folder):
    corpus = load(text_config(folder))
    state = corpus.batches("train", batch_size=2, seq_len=64, seed=0).get_state()
    with pytest.raises(ValueError, match="batch size"):
        corpus.batches("train", batch_size=4, seq_len=64, seed=0).set_state(state)
    (folder / "new.txt").write_text("changed text\n")
    with pytest.raises(ValueError, match="text"):
        load(text_config(folder)).batches("train", batch_size=2, seq_len=64, seed=0).set_state(state)


def test_batch_is_a_tree_with_a_key_range(folder):
    batch = batch_at(load(text_config(folder)).dataset("train", batch_size=2, seq_len=32, seed=0), 0)
    assert len(jax.tree.leaves(batch)) == 6
    assert jax.jit(lambda batch: batch.keys.stop - batch.start)(batch).shape == (2, 32)
    for name in ("tokens", "targets", "start", "stop", "positions"):
        assert getattr(batch, name).dtype == np.int32
    assert batch.valid.dtype == bool


@pytest.fixture
def tokenizer(tmp_path):
    """Words of the test's files, after a token that begins every document."""
    words = ["[BOS]", "[UNK]", "=", "#", "na", *(f"file{i:02d}" for i in range(DOCUMENTS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    tokenizer.add_special_tokens(["[BOS]"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_tokenizer(folder, tokenizer):
    corpus = load(text_config(folder, tokenizer=tokenizer), vocab_size=50)
    split = corpus.train
    assert split.tokens.max() < 50 and (split.tokens[split.offsets[:-1]] == 0).all()
    assert corpus.decode(corpus.encode("file03 = file04")) == "file03 = file04"
    with pytest.raises(ValueError, match="vocab_size 44, got 45 tokens up to id 44"):
        load(text_config(folder, tokenizer=tokenizer), vocab_size=44)


def test_truncation_and_padding_of_the_last_use_are_forgotten(folder, tokenizer):
    expected = load(text_config(folder, tokenizer=tokenizer), vocab_size=50)
    used = Tokenizer.from_file(str(tokenizer))
    used.enable_truncation(4)
    used.enable_padding(length=5000)
    used.save(str(tokenizer))
    corpus = load(text_config(folder, tokenizer=tokenizer), vocab_size=50)
    for split in ("train", "held_out"):
        np.testing.assert_array_equal(corpus.documents(split).tokens, expected.documents(split).tokens)
        np.testing.assert_array_equal(corpus.documents(split).offsets, expected.documents(split).offsets)
    assert len(corpus.encode("= = = = = = =")) == 8


def test_an_id_past_the_vocabulary_is_refused_when_it_is_read(folder, tmp_path):
    """Fewer tokens than the model's vocabulary, of which one has an id of its own choice."""
    words = {"[UNK]": 0, "=": 1, "<think>": 300}
    path = tmp_path / "gap.json"
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(path))
    with pytest.raises(ValueError, match=r"vocab_size 256, got 3 tokens up to id 300 \('<think>'\)"):
        load(text_config(folder, tokenizer=path))
    load(text_config(folder, tokenizer=path), vocab_size=301)
    odd = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    odd.post_processor = processors.TemplateProcessing(single="[B] $A", special_tokens=[("[B]", 400)])
    odd.save(str(path))
    with pytest.raises(ValueError, match=r"vocab_size 256, got 400 for .*\.txt"):
        load(text_config(folder, tokenizer=path))


def with_end(path, token, *, special=True, adds=False):
    """Writes the tokenizer again with one more token, which its post-processor adds or not; returns the token's id."""
    tokenizer = Tokenizer.from_file(str(path))
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    number = tokenizer.token_to_id(token)
    if adds:
        special_tokens = [("[BOS]", 0), (token, number)]
        tokenizer.post_processor = processors.TemplateProcessing(f"[BOS] $A {token}", special_tokens=special_tokens)
    tokenizer.save(str(path))
    return number


def last_tokens(corpus):
    return {int(split.tokens[end - 1]) for split in (corpus.train, corpus.held_out) for end in split.offsets[1:]}


@pytest.mark.parametrize("token", ["</s>", "<|endoftext|>", "<｜end▁of▁sentence｜>"])
def test_a_document_ends_with_the_tokenizers_end_token(folder, tokenizer, token):
    before = load(text_config(folder, tokenizer=tokenizer), vocab_size=50)
    assert before.end_token is None
    end = with_end(tokenizer, token)
    corpus, plain = (load(text_config(folder, tokenizer=tokenizer, append=a), vocab_size=50) for a in (True, False))
    assert corpus.end_token == token and last_tokens(corpus) == {end}
    assert plain.end_token is None and end not in last_tokens(plain)
    assert corpus.fingerprint != plain.fingerprint
    for split in ("train", "held_out"):
        np.testing.assert_array_equal(plain.documents(split).tokens, before.documents(split).tokens)
        assert len(corpus.documents(split).tokens) == len(plain.documents(split).tokens) + len(plain.documents(split))
    row = text_row(corpus.train, 0, int(corpus.train.offsets[1]))
    assert row.valid.tolist() == [True] * (len(row.tokens) - 1) + [False] and row.targets[-2] == end  # it is trained


def test_an_end_token_that_is_there_is_not_doubled(folder, tokenizer):
    end = with_end(tokenizer, "</s>", adds=True)
    corpus = load(text_config(folder, tokenizer=tokenizer), vocab_size=50)
    assert last_tokens(corpus) == {end} and (corpus.train.tokens == end).sum() == len(corpus.train)


def test_the_end_token_that_is_configured_comes_first(folder, tokenizer):
    with_end(tokenizer, "</s>")
    mine = with_end(tokenizer, "[MINE]", special=False)
    settings = tokenizer.with_name("tokenizer_config.json")
    for value in ("[MINE]", {"content": "[MINE]", "lstrip": False}):
        settings.write_text(json.dumps({"eos_token": value}))
        assert last_tokens(load(text_config(folder, tokenizer=tokenizer), vocab_size=50)) == {mine}
    settings.write_text(json.dumps({"eos_token": "[GONE]"}))
    with pytest.raises(ValueError, match=r"eos_token '\[GONE\]', which .* does not have.*--no-append"):
        load(text_config(folder, tokenizer=tokenizer), vocab_size=50)
    settings.write_text("{")
    with pytest.raises(ValueError, match="must be readable JSON"):
        load(text_config(folder, tokenizer=tokenizer), vocab_size=50)
    load(text_config(folder, tokenizer=tokenizer, append=False), vocab_size=50)


def test_an_unknown_word_without_a_token_for_it_names_the_file(folder, tmp_path):
    path = tmp_path / "strict.json"
    Tokenizer(models.WordLevel({"[X]": 0}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(ValueError, match=r"cannot read .*\.txt"):
        load(text_config(folder, tokenizer=path))


def test_ids_beyond_bytes_are_written_as_no_text(folder):
    assert load(text_config(folder)).decode([104, 300, 105]) == "h\N{REPLACEMENT CHARACTER}i"


@pytest.mark.parametrize("name", ["a.txt.gz", "a.parquet", "a.JSONL", "a.ndjson", "a.zst"])
def test_files_that_are_no_text_are_refused_by_name(folder, name):
    for other in (name, f"b{name}"):
        (folder / other).write_text("text\n")
    with pytest.raises(ValueError, match=f"must be plain text, got .*{name} and 1 more, "):
        load(DataConfig(data=(f"{folder}/*",)))


def test_a_compressed_file_of_another_name_is_refused(folder):
    (folder / "f03.txt").write_bytes(gzip.compress(b"text"))
    with pytest.raises(ValueError, match="must be plain text, got .*f03.txt, which begins with"):
        load(text_config(folder))


def share_held_out(tmp_path, sizes, share=0.1):
    """Writes files of these sizes and contents of their own; (sizes held out, share of the bytes)."""
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_bytes(np.random.default_rng((i, *sizes)).integers(97, 122, size, np.uint8))
    held = np.diff(load(text_config(tmp_path, held_out=share)).held_out.offsets).tolist()
    return held, sum(held) / sum(sizes)


@pytest.mark.parametrize("seed", range(12))
def test_of_a_large_and_a_small_file_the_small_one_is_held_out(tmp_path, seed):
    assert share_held_out(tmp_path, (100_000 + seed, 3_000))[0] == [3_000]
    assert share_held_out(tmp_path, (3_000, 100_000 + seed))[0] == [3_000]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_the_split_is_by_bytes(tmp_path, seed, share):
    sizes = (np.random.default_rng(seed).pareto(2.0, 60) * 1000 + 50).astype(int).tolist()
    assert 0.75 * share <= share_held_out(tmp_path, sizes, share)[1] <= 1.25 * share


def test_both_splits_have_a_file_whatever_the_share(tmp_path):
    for i, share in enumerate((1e-9, 0.5, 1 - 1e-6)):
        folder = tmp_path / str(i)
        folder.mkdir()
        held, _ = share_held_out(folder, (100, 200, 70), share)
        assert 1 <= len(held) <= 2


def test_bytes_round_trip(folder):
    corpus = load(text_config(folder))
    assert corpus.decode(corpus.encode("naïve")) == "naïve"
    assert corpus.encode("naïve").dtype == np.int32


def test_standard_library_is_the_default():
    corpus = load(DataConfig())
    assert any(b"def namedtuple(" in document for document in documents(corpus.train) + documents(corpus.held_out))
    assert 2_000_000 < len(corpus.train.tokens) + len(corpus.held_out.tokens) < 40_000_000


def test_the_split_of_the_standard_library_is_that_of_the_hashes():
    """Keeps the demo's text as it was recorded: the same files and the same fingerprint as from the hashes alone."""
    files = read_files(find_files(()), 1 << 26).read
    assert choose_held_out(files, 0.1) == [int.from_bytes(file.digest[:8]) < 0.1 * 2**64 for file in files]


def test_what_max_bytes_leaves_out_is_said(folder, caplog):
    load(text_config(folder))
    assert not caplog.messages
    corpus = load(text_config(folder, max_bytes=20_000))
    total = sum(path.stat().st_size for path in folder.glob("*.txt"))
    read = len(corpus.train.tokens) + len(corpus.held_out.tokens)
    files = DOCUMENTS - len(corpus.train) - len(corpus.held_out)
    assert corpus.left_out == (files, total - read)
    assert caplog.messages == [
        f"{files} of {DOCUMENTS} files, {total - read:,} of {total:,} bytes, are left out: max_bytes is 20,000"
    ]
    with pytest.raises(ValueError, match="got 0 within max_bytes 10 of .*, and 40 past it"):
        load(text_config(folder, max_bytes=10))


def test_max_bytes_caps_what_is_read_the_same_way_every_time(folder):
    first, second = (load(text_config(folder, max_bytes=20_000)) for _ in range(2))
    total = len(first.train.tokens) + len(first.held_out.tokens)
    assert 15_000 < total <= 20_000
    assert first.fingerprint == second.fingerprint != load(text_config(folder)).fingerprint


def test_bad_settings():
    with pytest.raises(ValueError, match="held_out must be"):
        DataConfig(held_out=0.0)
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        DataConfig(max_bytes=0)


def test_bad_text(folder, tmp_path):
    with pytest.raises(ValueError, match=r"nothing\*.txt.*matches none"):
        load(DataConfig(data=(str(tmp_path / "nothing*.txt"),)))
    with pytest.raises(ValueError, match="names a folder"):
        load(DataConfig(data=(str(folder),)))
    with pytest.raises(ValueError, match="two different files.*got 1"):
        load(DataConfig(data=(f"{folder}/f00.txt",)))
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in "ab":
        (empty / name).write_bytes(b"")
    with pytest.raises(ValueError, match="not empty.*got 0"):
        load(DataConfig(data=(f"{empty}/*",)))
    with pytest.raises(ValueError, match="at least 256.*got 200"):
        load(text_config(folder), vocab_size=200)
    with pytest.raises(ValueError, match="tokenizer.json, got"):
        load(text_config(folder, tokenizer=folder / "f00.txt"))
    with pytest.raises(ValueError, match="tokenizer.json, got"):
        load(text_config(folder, tokenizer=folder / "missing.json"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_unreadable_file(folder):
    (folder / "f07.txt").chmod(0)
    with pytest.raises(ValueError, match="f07.txt: Permission denied"):
        load(text_config(folder))


def test_vanished_file(folder, monkeypatch):
    monkeypatch.setattr("train.data.splits.find_files", lambda patterns: [folder / "f00.txt", folder / "gone.txt"])
    with pytest.raises(ValueError, match="gone.txt: No such file"):
        load(text_config(folder))


def test_text_that_is_not_utf8(folder, tokenizer):
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    load(text_config(folder))  # bytes are bytes
    with pytest.raises(ValueError, match="must be UTF-8, got .*latin.txt"):
        load(text_config(folder, tokenizer=tokenizer))


def test_bad_batches(folder):
    corpus = load(text_config(folder))
    good = {"batch_size": 2, "seq_len": 64, "seed": 0}
    for changes, message in (
        ({"seq_len": 10**6}, "takes 1000001 tokens, but the train text has"),
        ({"seq_len": 0}, "at least 1, got 2 and 0"),
        ({"batch_size": 0}, "at least 1, got 0 and 64"),
        ({"seed": -1}, "seed must be"),
    ):
        with pytest.raises(ValueError, match=message):
            corpus.dataset("train", **{**good, **changes})
    with pytest.raises(ValueError, match="split must be 'train' or 'held_out', got 'test'"):
        corpus.batches("test", **good)  # pyright: ignore[reportArgumentType]
