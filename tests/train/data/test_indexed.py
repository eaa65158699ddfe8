"""Token files hold what Megatron-LM's hold, bit for bit; damaged ones are refused in one line."""

import dataclasses
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import shards as shards_module
from train.data.indexed import IndexedDataset, IndexedWriter
from train.data.manifest import MANIFEST, Manifest, Shard, load_manifest, open_shards, token_dtype
from train.data.shards import Shards

ROOT = Path(__file__).parents[3]
MEGATRON = ROOT / "tests" / "oracle" / "megatron"  # made by its own builder: see make_token_files.py
DOCUMENTS = [[11, 12, 13, 14, 15], [21], [31, 32, 33, 34]]


def write(prefix, documents=DOCUMENTS, dtype=np.uint16):
    """Writes a pair of files; a document is a list of ids."""
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        writer.add(np.array(document, np.int64))
    return writer.close()


def write_bytes(
    prefix, *, version=1, code=8, lengths=(5, 1, 4), pointers=(0, 10, 12), documents=(0, 1, 2, 3), tail=b""
):
    """Writes a pair of files by hand, of ten tokens of two bytes."""
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, len(lengths), len(documents))
    arrays = struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(documents)}q", *lengths, *pointers, *documents)
    Path(f"{prefix}.idx").write_bytes(head + arrays + tail)
    Path(f"{prefix}.bin").write_bytes(struct.pack("<10H", *(token for document in DOCUMENTS for token in document)))
    return prefix


def contents(dataset):
    return [dataset.read(i).tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("name", ["uint16", "int32"])
def test_files_of_megatron_are_read(name):
    dataset = IndexedDataset(MEGATRON / name)
    expected = [*DOCUMENTS[:2], [31, 32, 33, 34 if name == "uint16" else 70000]]
    assert contents(dataset) == expected  # the first is of two sequences
    assert (dataset.dtype, dataset.tokens, len(dataset)) == (np.dtype(name), 10, 3)
    assert dataset.lengths.tolist() == [5, 1, 4] and dataset.lengths.dtype == np.int32
    assert dataset.bytes_read == 10 * dataset.dtype.itemsize


def test_bytes_are_those_of_the_layout(tmp_path):
    write(tmp_path / "ours")
    write_bytes(tmp_path / "theirs")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_what_was_written_is_said(tmp_path):
    written = write(tmp_path / "a.b", DOCUMENTS[::-1])
    assert (written.documents, written.tokens, written.size, written.max_id) == (3, 10, 20, 34)
    for suffix, sha in ((".bin", written.bin_sha256), (".idx", written.idx_sha256)):
        printed = subprocess.run(["sha256sum", tmp_path / f"a.b{suffix}"], capture_output=True, text=True, check=True)
        assert printed.stdout.split()[0] == sha


@settings(max_examples=40)
@given(
    documents=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=1, max_size=9),
    cuts=st.integers(1, 4),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int32]),
)
def test_what_is_written_is_read(tmp_path_factory, documents, cuts, dtype):
    prefix = tmp_path_factory.mktemp("files") / "shard"
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        parts = np.array_split(np.array(document), cuts)
        for i, part in enumerate(parts):
            writer.add(part, ends=i == cuts - 1)
    writer.close()
    dataset = IndexedDataset(prefix)
    assert contents(dataset) == documents and dataset.tokens == sum(map(len, documents))


def test_ranges_are_views_and_are_counted(tmp_path):
    write(tmp_path / "a")
    dataset = IndexedDataset(tmp_path / "a")
    assert dataset.read(0, 1, 3).tolist() == [12, 13] and dataset.bytes_read == 4
    assert dataset.read(2, begin=4).tolist() == [] and dataset.read(2, end=1).tolist() == [31]
    assert dataset.bytes_read == 6
    assert not dataset.read(0).flags.owndata
    for arguments in ((3,), (-1,), (0, 2, 1), (0, 0, 6), (0, -1)):
        with pytest.raises(ValueError, match="must be from 0 to"):
            dataset.read(*arguments)


def test_a_document_that_is_open_ends_with_the_file(tmp_path):
    writer = IndexedWriter(tmp_path / "a", np.uint8)
    writer.add(np.array([1, 2]), ends=False)
    assert writer.is_open and writer.close().documents == 1
    assert contents(IndexedDataset(tmp_path / "a")) == [[1, 2]]


@pytest.mark.parametrize("token", [-1, 2**16])
def test_tokens_that_do_not_fit(tmp_path, token):
    writer = IndexedWriter(tmp_path / "a", np.uint16)
    with pytest.raises(ValueError, match=r"tokens must fit uint16 .* got"):
        writer.add(np.array([token]))
    writer.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab, name", [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")])
def test_types_of_vocabularies(vocab, name):
    assert token_dtype(vocab) == np.dtype(name)
    assert np.iinfo(token_dtype(vocab)).max >= vocab - 1


def test_many_shards_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_MAPPED", 2)
    prefixes = [tmp_path / f"s{i}" for i in range(5)]
    for i, prefix in enumerate(prefixes):
        write(prefix, [[10 * i + j] * (j + 1) for j in range(i + 1)])
    shards = Shards(prefixes)
    expected = [[10 * i + j] * (j + 1) for i in range(5) for j in range(i + 1)]
    before = len(os.listdir("/proc/self/fd"))
    held = [shards.read(i) for i in (0, 5)]
    assert contents(shards) == expected and contents(shards)[::-1] == expected[::-1]
    assert shards.lengths.tolist() == [len(document) for document in expected]
    assert shards.tokens == sum(map(len, expected)) and len(shards) == 15
    assert shards.bytes_read == 2 * (2 * shards.tokens + len(held[0]) + len(held[1]))
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 2 + 2  # and those that are held
    assert held[0].tolist() == [0] and held[1].tolist() == expected[5]
    for document in (15, -1):
        with pytest.raises(ValueError, match=f"from 0 to 14 of 5 shards, got {document}"):
            shards.read(document)
    with pytest.raises(ValueError, match="one or more"):
        Shards([])


LENGTHS = [5, 0, 5, 0, 3, 1, 2]


@given(
    reads=st.lists(
        st.integers(0, 6).flatmap(
            lambda i: st.tuples(st.just(i), st.integers(0, LENGTHS[i]), st.integers(0, LENGTHS[i]))
        )
    )
)
def test_many_documents_are_read_at_once(odd_shards, reads):
    """Of shards of several types, with documents of several sequences and of none; as they are read one by one."""
    reads = [(document, min(a, b), abs(a - b)) for document, a, b in reads]
    documents, begins, sizes = np.array(reads, int).reshape(-1, 3).T
    places = np.cumsum(sizes + 1) - sizes
    out, before = np.full(int((sizes + 1).sum()) + 1, -1), odd_shards.bytes_read
    odd_shards.read_into(out, places, documents, begins, sizes)
    expected = [-1]
    for document, begin, size in reads:
        expected += [*odd_shards.read(document, begin, begin + size).tolist(), -1]
    assert out.tolist() == expected
    assert (odd_shards.bytes_read - before) == 2 * sum((2 if i < 4 else 4) * size for i, _, size in reads)


@pytest.fixture(scope="module")
def odd_shards(tmp_path_factory):
    """Four documents of uint16, of one and two sequences and of none, and three of int32."""
    folder = tmp_path_factory.mktemp("odd")
    write_bytes(folder / "a", documents=(0, 1, 1, 3, 3))
    write(folder / "b", [[70000, 2, 3], [4], [5, 6]], np.int32)
    shards = Shards([folder / "a", folder / "b"])
    assert shards.lengths.tolist() == LENGTHS and shards.dtype == np.int32
    assert contents(shards)[2:5] == [[21, 31, 32, 33, 34], [], [70000, 2, 3]]
    return shards


@pytest.mark.parametrize("wrong", [(7, 0, 1), (-1, 0, 0), (2, 0, 6), (2, -1, 2), (2, 3, -1), (1, 0, 1)])
def test_documents_that_are_not_there_are_not_read(odd_shards, wrong):
    document, begin, size = ([0, value] for value in wrong)
    with pytest.raises(ValueError, match="must be from 0 to"):
        odd_shards.read_into(np.empty(9, int), *map(np.array, ([0, 0], document, begin, size)))


DAMAGE = {
    "version 2": dict(version=2),
    "floating-point": dict(code=7),
    "unknown type": dict(code=9),
    "modes of images": dict(tail=bytes(3)),
    "got 103": dict(tail=bytes(1)),
    "must have the 12 bytes": dict(lengths=(5, 1), pointers=(0, 10), documents=(0, 1, 2)),
    "end with 3": dict(documents=(0, 1, 2, 4)),
    "index 0": dict(documents=(1, 1, 2, 3)),
    "document indices": dict(documents=()),
    "last sequence of -4": dict(lengths=(5, 1, -4), pointers=(0, 10, 28)),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_damage_that_headers_show(tmp_path, said):
    prefix = write_bytes(tmp_path / "a", **DAMAGE[said])
    with pytest.raises(ValueError, match=said) as refused:
        IndexedDataset(prefix)
    assert str(tmp_path / "a") in str(refused.value) and len(str(refused.value)) < 900


@pytest.mark.parametrize(
    "said, damage",
    [
        ("rise from 0", dict(documents=(0, 2, 1, 3))),
        ("rise from 0", dict(documents=(0, -1, 2, 3))),
        ("follow one another", dict(pointers=(0, 8, 12))),
        ("follow one another", dict(pointers=(2, 10, 12), lengths=(4, 1, 4))),
        ("follow one another", dict(lengths=(7, -1, 4), pointers=(0, 14, 12))),
    ],
)
def test_damage_that_documents_show(tmp_path, said, damage):
    dataset = IndexedDataset(write_bytes(tmp_path / "a", **damage))
    with pytest.raises(ValueError, match=said):
        dataset.read(0)


def test_files_that_are_cut_empty_or_missing(tmp_path):
    prefix = write_bytes(tmp_path / "a")
    idx, data = (Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin"))
    whole = idx.read_bytes()
    data.write_bytes(data.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"a\.bin must have the 20 bytes .* got 17"):
        Shards([prefix])
    data.unlink()
    with pytest.raises(ValueError, match=r"a\.bin: No such file"):
        Shards([prefix])
    for length in (0, 9, 33):
        idx.write_bytes(whole[:length])
        data.write_bytes(b"")
        with pytest.raises(ValueError, match=f"34 bytes or longer, got {length}"):
            Shards([prefix])
    idx.write_bytes(b"TNTIDX" + whole)
    with pytest.raises(ValueError, match="no index of token files"):
        Shards([prefix])
    write(tmp_path / "none", [])
    with pytest.raises(ValueError, match="must have tokens"):
        Shards([tmp_path / "none"])


# Manifests


def make_folder(folder, count=2):
    """Writes shards and their manifest."""
    folder.mkdir()
    shards = [Shard(f"s{i}", **dataclasses.asdict(write(folder / f"s{i}"))) for i in range(count)]
    Manifest(folder, "abc", 40, "uint16", 3, tuple(shards), ()).save()
    return folder


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    folder = make_folder(tmp_path / "corpus")
    manifest = load_manifest(folder, checksums=True)
    assert (manifest.tokenizer_hash, manifest.vocab_size, manifest.end_token_id, manifest.max_id) == ("abc", 40, 3, 34)
    assert (manifest.documents, manifest.tokens, manifest.dtype) == (6, 20, "uint16")
    assert contents(manifest.open()) == contents(open_shards(folder)) == 2 * DOCUMENTS
    assert contents(open_shards(folder / "s1")) == DOCUMENTS
    manifest.check_vocabulary(35)
    with pytest.raises(ValueError, match=r"vocab_size 34, got 34 in .*corpus/s0\.bin"):
        manifest.check_vocabulary(34)


def change(folder, **values):
    """Changes fields of the first shard in a manifest, or of the manifest."""
    there = json.loads((folder / MANIFEST).read_text())
    for name, value in values.items():
        (there if name in there else there["shards"][0])[name] = value
    (folder / MANIFEST).write_text(json.dumps(there))


@pytest.mark.parametrize("name", ["../s0", "/s0", "s0/../s1", "", "..", "a\\b", "a\0b"])
def test_shards_lie_in_the_folder(tmp_path, name):
    folder = make_folder(tmp_path / "corpus")
    write(tmp_path / "s0")
    change(folder, name=name)
    with pytest.raises(ValueError, match="must be names in its folder"):
        load_manifest(folder)


def test_shards_are_no_links(tmp_path):
    folder = make_folder(tmp_path / "corpus")
    (folder / "s0.bin").rename(tmp_path / "s0.bin")
    (folder / "s0.bin").symlink_to(tmp_path / "s0.bin")
    with pytest.raises(ValueError, match=r"got the link .*s0\.bin"):
        load_manifest(folder)


@pytest.mark.parametrize(
    "said, values",
    [
        ("version 1", dict(version=2)),
        ("dtype must be", dict(dtype="float32")),
        ("got 3, 10 of uint16", dict(dtype="int32")),
        ("must hold 4 documents", dict(documents=4)),
        ("must hold 3 documents, 11", dict(tokens=11)),
        ("must hold", dict(size=21)),
        ("tokens must be a number", dict(tokens="10")),
        ("max_id must be a number", dict(max_id=-1)),
        ("vocab_size must be a number", dict(vocab_size=True)),
        ("shards must be a list", dict(shards={})),
        ("must have shards", dict(shards=[])),
        ("a shard of", dict(shards=[{}])),
        ("end_token_id must be", dict(end_token_id="x")),
    ],
)
def test_manifests_that_do_not_fit(tmp_path, said, values):
    folder = make_folder(tmp_path / "corpus")
    change(folder, **values)
    with pytest.raises(ValueError, match=said) as refused:
        load_manifest(folder)
    assert "corpus" in str(refused.value) and len(str(refused.value)) < 900


def test_shards_that_changed(tmp_path):
    folder = make_folder(tmp_path / "corpus")
    data = bytearray((folder / "s1.bin").read_bytes())
    data[0] ^= 1
    (folder / "s1.bin").write_bytes(data)
    load_manifest(folder)
    with pytest.raises(ValueError, match=r"got others of s1\.bin:"):
        load_manifest(folder, checksums=True)
    write(folder / "s1", DOCUMENTS[:2])
    with pytest.raises(ValueError, match=r"s1 must hold 3 documents, 10 tokens .* got 2, 6"):
        load_manifest(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"must have a manifest\.json, got none"):
        load_manifest(folder)


def test_reading_and_tokenising_do_without_jax():
    """Workers, which import the command's module anew, have memory for a tokenizer, not for JAX beside it."""
    code = "import sys, train.__main__, train.data.tokenize_command; sys.exit('jax' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0
