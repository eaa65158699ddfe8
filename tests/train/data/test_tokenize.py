"""Text becomes the same shards whatever the workers and the interruptions; what cannot be read is named or listed."""

import concurrent.futures
import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from train.data import indexed, inputs, tokenize_command
from train.data import tokenize as tokenizing
from train.data.encoding import Encoder
from train.data.inputs import Position, Reader, find_inputs
from train.data.manifest import hash_tokenizer, load_manifest, open_shards
from train.data.tokenize import Job, TokenizeConfig, tokenize

ROOT = Path(__file__).parents[3]
WORDS = ["<s>", "</s>", "[UNK]", "one", "two", "three", "four"]
ONE, TWO, THREE, FOUR = range(3, 7)


class Inline(concurrent.futures.Executor):
    """Encodes where it is called: processes take time to start."""

    def __init__(self, settings):
        self.encoder = Encoder(settings)

    def submit(self, fn, piece, /):
        future = concurrent.futures.Future()
        try:
            future.set_result(self.encoder.encode(piece))
        except ValueError as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def inline(job):
    yield Inline(job.settings)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(tokenizing, "_workers", inline)


@pytest.fixture
def tokenizer(tmp_path):
    """Words, after a token that begins every document."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def make(tmp_path, *names, out="out", **values):
    """Makes shards of files of a folder; gives the manifest and the documents."""
    config = TokenizeConfig(tuple(str(tmp_path / name) for name in names), tmp_path / out, **values)
    manifest = tokenize(Job.of(config))
    assert load_manifest(tmp_path / out, checksums=True).shards == manifest.shards
    shards = manifest.open()
    return manifest, [shards.read(i).tolist() for i in range(len(shards))]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def texts(documents):
    """Decodes documents of bytes."""
    return [bytes(document).decode() for document in documents]


# Which files


def test_files_folders_and_globs(tmp_path, monkeypatch):
    names = ["b.txt", "a.py", "sub/c.JSONL.gz", "sub/d.parquet", "e.jsonl.zst"]
    left_out = ["sub/.hidden", "sub/__pycache__/x.pyc", "sub/__pycache__/y.pyc", ".git/x"]
    for name in names + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    found, counts = find_inputs([str(tmp_path), f"{tmp_path}/*.txt", f"{tmp_path}/sub"])
    assert counts == (3, 0, 2)  # files and folders: those of .git and __pycache__ count as one
    assert [(os.path.relpath(file.path, tmp_path), file.kind, file.source) for file in found] == [
        ("a.py", "text", 0),
        ("b.txt", "text", 0),
        ("e.jsonl.zst", "jsonl", 0),
        ("sub/c.JSONL.gz", "jsonl", 0),
        ("sub/d.parquet", "parquet", 0),
    ]
    assert [file.begin for file in found] == [0, 4, 9, 20, 34] and found[0].size == 4
    monkeypatch.chdir(tmp_path)
    assert [os.path.basename(file.path) for file in find_inputs(["*.txt", "**/*.parquet"]).files] == [
        "b.txt",
        "d.parquet",
    ]
    assert [file.kind for file in find_inputs(["b.txt"], "jsonl").files] == ["jsonl"]
    (tmp_path / "hidden" / ".x").mkdir(parents=True)
    with pytest.raises(ValueError, match="got 'hidden', of which 1 hidden or __pycache__ are left out"):
        find_inputs(["hidden"])
    (tmp_path / "empty").mkdir()
    for pattern in ("none", "*.none", "empty"):
        with pytest.raises(ValueError, match=f"inputs must name files.*{pattern[-4:]}"):
            find_inputs(["b.txt", pattern])
    (tmp_path / "t.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"t\.tar\.gz: write it as that"):
        find_inputs(["t.tar.gz"])


# Parts


def parts_of(path, part_bytes, at=None):
    reader = Reader(find_inputs([str(path)]).files, part_bytes=part_bytes)
    return [part for piece in reader.pieces(at or Position()) for part in piece]


@given(
    text=st.lists(st.sampled_from(["a", "\n", "é", "漢", "😀", "b" * 9]), max_size=60).map("".join),
    part_bytes=st.integers(4, 20),
)
def test_a_text_is_cut_at_line_ends_and_read_on_from_any_cut(tmp_path_factory, text, part_bytes):
    path = tmp_path_factory.mktemp("parts") / "a.txt"
    path.write_text(text, newline="")
    parts = parts_of(path, part_bytes)
    assert b"".join(part.data for part in parts).decode() == text
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    seen = 0
    for i, part in enumerate(parts):
        part.data.decode()  # no character is divided
        assert len(part.data) <= part_bytes and part.line == 1 + text.encode()[:seen].count(b"\n")
        seen += len(part.data)
        assert part.ends or part.data.endswith(b"\n") or b"\n" not in part.data
        assert parts_of(path, part_bytes, part.end) == parts[i + 1 :]


@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    part_bytes=st.integers(4, 20),
    end=st.sampled_from(["", "\n"]),
)
def test_lines_stay_whole_and_are_read_on_from_any_cut(tmp_path_factory, sizes, part_bytes, end):
    path = tmp_path_factory.mktemp("parts") / "a.jsonl"
    data = ("\n".join("x" * size for size in sizes) + end).encode()
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "MAX_LINE_BYTES", 24)
        parts = parts_of(path, part_bytes)
        lines = data.split(b"\n")
        for i, part in enumerate(parts):
            assert parts_of(path, part_bytes, part.end) == parts[i + 1 :]
            if part.problem:
                assert f"got {len(lines[part.line - 1]) + (part.line < len(lines))}" in part.problem
                assert len(lines[part.line - 1]) >= 24
            else:
                whole = part.data.removesuffix(b"\n").split(b"\n")
                assert whole == lines[part.line - 1 : part.line - 1 + len(whole)]
    read = sum(part.data.count(b"\n") + (not part.data.endswith(b"\n")) if part.data else 1 for part in parts)
    assert read == len(lines) - (lines[-1] == b"")


def test_rows_are_read_on_from_any_cut(tmp_path):
    path = tmp_path / "a.parquet"
    values = [f"{'x' * (i % 7)}{i}" for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.table({"text": values, "n": range(50)}), path, row_group_size=17)
    parts = parts_of(path, 40)
    assert [value for part in parts for value in part.data] == values and len(parts) > 6
    for i, part in enumerate(parts):
        assert values[part.line - 1] == part.data[0]
        assert parts_of(path, 40, part.end) == parts[i + 1 :]
    assert parts[-1].done == path.stat().st_size


# Documents


def test_every_format_gives_the_same_documents(tmp_path, in_process):
    wanted = ["one\ntwo", "trois é", "漢" * 30]
    records = [{"text": text, "id": i} for i, text in enumerate(wanted)]
    write_lines(tmp_path / "a.jsonl", records)
    raw = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw[:20]) + gzip.compress(raw[20:]))
    halves = b"".join(pyarrow.compress(half, "zstd", asbytes=True) for half in (raw[:20], raw[20:]))
    (tmp_path / "a.jsonl.zst").write_bytes(halves)
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary()):
        column = pyarrow.array(wanted).cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{kind}.parquet")
    packed = gzip.compress((tmp_path / "string.parquet").read_bytes())
    (tmp_path / "b.parquet.gz").write_bytes(packed)
    names = [
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.zst",
        *(f"{kind}.parquet" for kind in ("string", "large_string", "binary")),
    ]
    for i, name in enumerate([*names, "b.parquet.gz"]):
        manifest, documents = make(tmp_path, name, out=f"out{i}", part_bytes=16)
        assert texts(documents) == wanted, name
        assert (manifest.dtype, manifest.vocab_size, manifest.tokenizer_hash) == ("uint8", 256, None)
        (source,) = manifest.sources
        assert (source.files, source.documents, source.tokens) == (1, 3, manifest.tokens)
        assert source.size == (tmp_path / name).stat().st_size
    for i, text in enumerate(wanted):
        (tmp_path / f"t{i}.txt").write_text(text)
    assert texts(make(tmp_path, "t?.txt", part_bytes=16)[1]) == wanted


def test_documents_are_those_of_training(tmp_path, in_process, tokenizer):
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.txt").write_text("three </s>")
    write_lines(tmp_path / "c.jsonl", [{"body": "four"}, {"body": ""}])
    manifest, documents = make(tmp_path, "a.txt", "b.txt", "c.jsonl", tokenizer=tokenizer, field="body")
    assert documents == [[0, ONE, TWO, 1], [0, THREE, 1], [0, FOUR, 1]]
    assert (manifest.end_token_id, manifest.vocab_size, manifest.max_id) == (1, 7, 6)
    assert [(source.documents, source.tokens, source.empty) for source in manifest.sources] == [
        (1, 4, 0),
        (1, 3, 0),
        (1, 3, 1),
    ]
    _, documents = make(tmp_path, "a.txt", tokenizer=tokenizer, append=False, out="plain")
    assert documents == [[0, ONE, TWO]]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_long_document_has_its_special_tokens_at_its_ends(tmp_path, in_process, tokenizer, name):
    text = "one two\nthree\n" * 4 + "four"
    write_lines(tmp_path / "a.jsonl", [{"text": text}])
    (tmp_path / "a.txt").write_text(text)
    _, documents = make(tmp_path, name, tokenizer=tokenizer, part_bytes=10)
    assert documents == [[0, *[ONE, TWO, THREE] * 4, FOUR, 1]]


def test_a_document_that_fills_two_shards_is_cut(tmp_path, in_process):
    (tmp_path / "a.txt").write_text("0123\n" * 16)
    (tmp_path / "b.txt").write_text("end")
    manifest, documents = make(tmp_path, "a.txt", "b.txt", part_bytes=10, shard_tokens=20)
    assert texts(documents) == ["0123\n" * 8, "0123\n" * 8, "end"]
    assert [shard.tokens for shard in manifest.shards] == [40, 40, 3]
    assert [source.documents for source in manifest.sources] == [1, 1]


def test_a_tokenizer_is_known_by_what_it_says(tmp_path, tokenizer):
    values = json.loads(tokenizer.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(dict(reversed(values.items()), truncation={"max_length": 4}), indent=1))
    assert hash_tokenizer(other) == hash_tokenizer(tokenizer) != hash_tokenizer(None)
    values["model"]["vocab"]["five"] = 7
    other.write_text(json.dumps(values))
    assert hash_tokenizer(other) != hash_tokenizer(tokenizer)


# What cannot be read

BAD_LINES = {
    "must be JSON, got": b"{",
    "must be a JSON object": b"[1]",
    "must have the field 'text', got ['txt']": b'{"txt": 1}',
    "a document must be text, got 1": b'{"text": 1}',
    "a document must be text, got None": b'{"text": null}',
    "must be UTF-8, got b'\\xff": b'{"text": "\xff"}',
    "must be whole characters": b'{"text": "\\ud800"}',
    "nests too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("said", BAD_LINES)
def test_bad_lines_are_named_or_listed(tmp_path, in_process, said):
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(2 * good + b"\n" + BAD_LINES[said] + b"\n" + good)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: .*--on-error skip") as refused:
        make(tmp_path, "a.jsonl")
    assert said in str(refused.value) and len(str(refused.value)) < 900
    manifest, documents = make(tmp_path, "a.jsonl", on_error="skip")  # into the same folder
    assert texts(documents) == ["good"] * 3 and manifest.sources[0].skipped == 1
    assert manifest.skipped[0].startswith(f"{tmp_path}/a.jsonl:4: ") and said in manifest.skipped[0]


def test_bad_lines_of_text_and_bad_rows(tmp_path, in_process, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"one\n\xe9 two\nthree\n\xff")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    for name, line, wanted, skipped in (("a.txt", "line 2", [[0, ONE, THREE, 1]], 2), ("a.parquet", "row 2", None, 1)):
        with pytest.raises(ValueError, match=f"{name}, {line}: "):
            make(tmp_path, name, tokenizer=tokenizer, out=name[2:])
        manifest, documents = make(tmp_path, name, tokenizer=tokenizer, out=name[2:], on_error="skip")
        assert documents == (wanted or [[0, ONE, 1], [0, TWO, 1]])
        assert manifest.sources[0].skipped == len(manifest.skipped) == skipped


def test_lines_that_are_skipped_behind_the_last_shard_are_counted(tmp_path, in_process):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "long enough"}\n' + b"bad\n" * 300)
    manifest, _ = make(tmp_path, "a.jsonl", part_bytes=30, shard_tokens=5, on_error="skip")
    assert (len(manifest.shards), manifest.sources[0].skipped, len(manifest.skipped)) == (1, 300, 8 + 100)
    assert make(tmp_path, "a.jsonl", part_bytes=30, shard_tokens=5, on_error="skip")[0] == manifest


def test_files_that_are_not_whole(tmp_path, in_process):
    raw = json.dumps({"text": "x" * 5000}).encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"] * 999}), tmp_path / "d.parquet")
    cut = (tmp_path / "d.parquet").read_bytes()[:-20]
    broken = {
        "a.jsonl.gz": gzip.compress(raw)[:-9],
        "b.jsonl.zst": pyarrow.compress(raw, "zstd", asbytes=True)[:-5],
        "c.txt.gz": b"plain",
        "c.txt.zst": b"plain",
        "d.parquet": cut,
        "e.parquet.gz": gzip.compress(cut),
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"inputs must be whole .*{name}") as refused:
            make(tmp_path, name, on_error="skip")
        assert len(str(refused.value)) < 900
    pyarrow.parquet.write_table(pyarrow.table({"text": [1], "more": ["x"]}), tmp_path / "f.parquet")
    with pytest.raises(ValueError, match="must hold text, got int64"):
        make(tmp_path, "f.parquet")
    with pytest.raises(ValueError, match=r"must have the column 'body', got \['text', 'more'\]"):
        make(tmp_path, "f.parquet", field="body")


def test_what_is_missing_is_named(tmp_path, in_process, monkeypatch):
    (tmp_path / "a.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'dsa-jax\[data\]'"):
        make(tmp_path, "a.zst")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="inputs must have text, got none in 1 files of 0 bytes"):
        make(tmp_path, "a.txt")


# The folder


def write_corpus(folder, count=6):
    """Writes files of many lines, of which each shard takes about one."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i}.txt").write_text("".join(f"file {i} line {j}\n" for j in range(9 + i)))
    return folder


SIZES = dict(part_bytes=50, shard_tokens=100)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_missing_and_changed_shards_are_made_anew(tmp_path, in_process):
    write_corpus(tmp_path / "in")
    make(tmp_path, "in", **SIZES)
    out, whole = tmp_path / "out", contents(tmp_path / "out")
    assert len(whole) > 3 + 2 * 4
    times = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    (out / "shard-00001.bin").unlink()
    (out / "shard-00003.idx").write_bytes(b"")
    make(tmp_path, "in", **SIZES)
    assert contents(out) == whole
    kept = [path for path in times if path.stem not in ("shard-00001", "shard-00003")]
    assert all(path.stat().st_mtime_ns == times[path] for path in kept)
    data = bytearray(whole["shard-00002.bin"])
    data[5] ^= 1
    (out / "shard-00002.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"got others of shard-00002\.bin"):
        load_manifest(out, checksums=True)
    make(tmp_path, "in", **SIZES, verify=True)
    assert contents(out) == whole


def test_a_folder_is_one_jobs(tmp_path, in_process, tokenizer):
    write_corpus(tmp_path / "in")
    make(tmp_path, "in", **SIZES)
    whole = contents(tmp_path / "out")
    changes = {"shard_tokens 100, got 90": dict(shard_tokens=90), "tokenizer_hash None": dict(tokenizer=tokenizer)}
    for said, values in changes.items():
        with pytest.raises(ValueError, match=f"was begun with {said}"):
            make(tmp_path, "in", **SIZES | values)
    (tmp_path / "in" / "0.txt").write_text("other")
    with pytest.raises(ValueError, match=r"begun with inputs 6 files of \d+ bytes .* got 6 files of") as refused:
        make(tmp_path, "in", **SIZES)
    assert len(str(refused.value)) < 900 and contents(tmp_path / "out") == whole
    with pytest.raises(ValueError, match=r"empty folder .* which has 0\.txt"):
        make(tmp_path, "in", out="in2" if (write_corpus(tmp_path / "in2")) else "")
    with pytest.raises(ValueError, match="must not be a folder of the inputs"):
        make(tmp_path, "in", out="in")


def test_two_do_not_work_in_one_folder(tmp_path, in_process, monkeypatch):
    write_corpus(tmp_path / "in")

    def second(*arguments):
        with pytest.raises(ValueError, match="another works in"):
            make(tmp_path, "in", **SIZES)
        seen.append(True)
        return make_shards(*arguments)

    seen, make_shards = [], tokenizing.make_shards
    monkeypatch.setattr(tokenizing, "make_shards", second)
    make(tmp_path, "in", **SIZES)
    assert seen


def test_inputs_that_change_while_they_are_read(tmp_path, in_process):
    write_corpus(tmp_path / "in")
    job = Job.of(TokenizeConfig((str(tmp_path / "in"),), tmp_path / "out"))
    (tmp_path / "in" / "3.txt").write_text("other")
    with pytest.raises(ValueError, match=r"3\.txt changed from \d+ to 5 bytes"):
        tokenize(job)


def test_a_full_disk_is_named(tmp_path, in_process, monkeypatch):
    write_corpus(tmp_path / "in")

    def full(file):
        if "shard-00001" in str(file.name):
            raise OSError(28, "No space left on device")
        sync(file)

    sync = indexed.sync
    monkeypatch.setattr(indexed, "sync", full)
    with pytest.raises(ValueError, match=r"shard-00001\.bin must be writable, got No space left on device"):
        make(tmp_path, "in", **SIZES)
    assert sorted(path.name for path in (tmp_path / "out").glob("shard-*")) == ["shard-00000.bin", "shard-00000.idx"]
    monkeypatch.setattr(indexed, "sync", sync)
    make(tmp_path, "in", **SIZES)


@pytest.mark.parametrize(
    "said, values",
    [("got none", dict(inputs=())), ("workers must be", dict(workers=0)), ("shard_tokens", dict(shard_tokens=0))],
)
def test_configurations_that_cannot_be(tmp_path, said, values):
    with pytest.raises(ValueError, match=said):
        TokenizeConfig(**{"inputs": ("a",), "out": tmp_path} | values)


# Processes

KILLS = textwrap.dedent("""
    import itertools, os, shutil, signal, sys
    from pathlib import Path
    sys.path.insert(0, "tests/train/data")
    import test_tokenize as cases
    from train.data import indexed, journal, tokenize
    from train.data.tokenize import Job, TokenizeConfig

    folder = Path(sys.argv[1])
    tokenize._workers = cases.inline

    def run(out, kill_at=None):
        '''Runs the job in a process that kills itself before its n-th touch of the disk; tells how it ended.'''
        if (child := os.fork()) == 0:
            numbers = itertools.count()
            def counted(function):
                def wrapped(*arguments, **options):
                    if next(numbers) == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments, **options)
                return wrapped
            for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "open"), (Path, "write_text")):
                setattr(owner, name, counted(getattr(owner, name)))
            tokenize.tokenize(Job.of(TokenizeConfig((str(folder / "in"),), out, **cases.SIZES)))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert run(folder / "whole") == 0
    whole = cases.contents(folder / "whole")
    for number in itertools.count():
        out = folder / "killed"
        status = run(out, number)
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        assert not (out / "manifest.json").exists()
        made = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
        recorded = (out / "shards.jsonl").read_text().count("\\n") if (out / "shards.jsonl").exists() else 0
        if number % 3 == 0 and (out / "shards.jsonl").exists():  # as if killed within the write
            with (out / "shards.jsonl").open("a") as file:
                file.write('{"shard": {"na')
        assert run(out) == 0
        assert cases.contents(out) == whole, number
        kept = [path for path in made if path.suffix in (".bin", ".idx") and int(path.stem[6:]) < recorded]
        assert len(kept) == 2 * recorded and all(path.stat().st_mtime_ns == made[path] for path in kept)
        shutil.rmtree(out)
    print(number)
""")


def environment():
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}


def test_killed_at_any_touch_of_the_disk(tmp_path):
    write_corpus(tmp_path / "in", count=3)
    command = [sys.executable, "-W", "ignore", "-c", KILLS, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 20


KILLED_WITH_WORKERS = textwrap.dedent("""
    import multiprocessing, os, signal, sys
    from train.data import journal, tokenize_command

    def keep(self, number, record, keep=journal.Journal.keep):
        keep(self, number, record)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    journal.Journal.keep = keep
    tokenize_command.main(sys.argv[1:])
""")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_change_nothing_and_end_with_what_started_them(tmp_path, tokenizer, in_process, capsys):
    write_corpus(tmp_path / "in")
    make(tmp_path, "in", **SIZES, tokenizer=tokenizer, out="one")
    arguments = f"{tmp_path / 'in'} --out {tmp_path / 'two'} --tokenizer {tokenizer} --workers 2".split()
    arguments += "--part-bytes 50 --shard-tokens 100".split()
    command = [sys.executable, "-c", KILLED_WITH_WORKERS, *arguments]
    killed = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "two" / "manifest.json").exists()
    workers = killed.stdout.split()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "the workers live on"
        time.sleep(0.01)
    code = "import sys; from train.data.tokenize_command import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and ended.stderr == ""
    assert "6 files, 6 documents" in ended.stdout and f"{tmp_path}/two/manifest.json: " in ended.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_command(tmp_path, in_process, capsys):
    write_corpus(tmp_path / "in")
    (tmp_path / "bad.jsonl").write_text("{\n" + json.dumps({"text": "good"}))
    (tmp_path / "in" / "__pycache__").mkdir()
    arguments = [
        str(tmp_path / "in"),
        str(tmp_path / "bad.jsonl"),
        "--out",
        str(tmp_path / "out"),
        "--on-error",
        "skip",
    ]
    tokenize_command.main(arguments)
    printed = capsys.readouterr()
    assert "1 files, 1 documents, 4 tokens, 1 lines skipped" in printed.out and printed.err == ""
    assert "tokens, 1 hidden or __pycache__ left out" in printed.out
    assert [source.left_out for source in load_manifest(tmp_path / "out").sources] == [1, 0]
    assert len(open_shards(tmp_path / "out")) == 7
    with pytest.raises(ValueError, match="unknown arguments: --nothing"):
        tokenize_command.main([*arguments, "--nothing"])


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    write_corpus(tmp_path / "in")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize_command, "tokenize", interrupted)
    with pytest.raises(SystemExit) as ended:
        tokenize_command.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 130 and "the same command" in capsys.readouterr().err


def test_a_worker_that_is_killed_is_told(tmp_path, monkeypatch):
    write_corpus(tmp_path / "in")

    class Broken(concurrent.futures.Executor):
        def submit(self, fn, piece, /):
            future = concurrent.futures.Future()
            future.set_exception(concurrent.futures.process.BrokenProcessPool("terminated abruptly"))
            return future

    monkeypatch.setattr(tokenizing, "_workers", lambda job: contextlib.nullcontext(Broken()))
    with pytest.raises(ValueError, match="a worker ended before its time"):
        make(tmp_path, "in")
