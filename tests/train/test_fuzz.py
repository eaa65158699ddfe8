"""Presets, tokenizers and folders of text of any kind are taken, or refused in one short line."""

import copy
import json

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from train_cases import small_run, write_documents

from train.__main__ import main
from train.data import DataConfig, load

LONG_NUMBER, HUGE = "a number of 5000 digits", 10**400
HOSTILE = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, HUGE, LONG_NUMBER, 0.5, -0.0, 1e-60, 1e39, 1e308),
    *(float("nan"), float("inf"), "", "x" * 3000, "\ud800", "\0", "a\nb", [], {}, [None], [[]], {"": 0}, [{}] * 40),
)
SHORT = hypothesis.settings(max_examples=100, suppress_health_check=list(hypothesis.HealthCheck))
FULL = hypothesis.settings(SHORT, max_examples=1500)


def paths_of(values, here=()):
    """Lists the paths of all values of a JSON tree."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [here, *(path for key, part in items for path in paths_of(part, (*here, key)))]


def spoil(values, draw):
    """Replaces, removes or adds a value somewhere."""
    values = copy.deepcopy(values)
    path = draw(st.sampled_from(paths_of(values)))
    kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    hostile = draw(st.sampled_from(HOSTILE))
    if not path:
        return hostile if kind == "replace" else values
    inside = values
    for key in path[:-1]:
        inside = inside[key]
    if kind == "replace":
        inside[path[-1]] = hostile
    elif kind == "remove":
        del inside[path[-1]]
    elif isinstance(inside, dict):
        inside[draw(st.text(max_size=3))] = hostile
    else:
        inside.append(hostile)
    return values


@st.composite
def spoilt_json(draw, values):
    """Spoils a JSON tree up to three times, and at times its text."""
    for _ in range(draw(st.integers(1, 3))):
        values = spoil(values, draw)
    text = json.dumps(values).replace(json.dumps(LONG_NUMBER), "9" * 5000)
    what = draw(st.sampled_from(["whole", "whole", "whole", "cut", "twice", "deep", "bytes"]))
    if what == "cut":
        return text[: draw(st.integers(0, len(text)))].encode()
    if what == "twice" and text.startswith("{") and len(text) > 2:
        return f"{text[:-1]}, {text[1:]}".encode()
    return {"deep": b"[" * 100_000, "bytes": b"\xff" + text.encode()}.get(what, text.encode())


@pytest.fixture
def ends(tmp_path, capsys, monkeypatch):
    """Runs the command as far as training; checks how it ends."""
    started = []
    monkeypatch.setattr("train.experiment.Experiment.run", lambda self, *_, **__: started.append(self))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main([*arguments, "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert status in (0, 2)
        if status == 2:
            assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1000, error
        return status

    return run


def check_presets(tmp_path, ends, examples):
    run = small_run(tmp_path / "text")
    path = tmp_path / "spoilt.json"
    statuses = []

    @examples
    @given(text=spoilt_json(run.to_json()))
    def check(text):
        path.write_bytes(text)
        statuses.append(ends("--preset", str(path)))

    check()
    assert 2 in statuses
    path.write_text(json.dumps(run.to_json()))
    assert ends("--preset", str(path)) == 0


@pytest.mark.usefixtures("unchecked")
def test_spoilt_presets(tmp_path, ends):
    check_presets(tmp_path, ends, SHORT)


@pytest.mark.variants
@pytest.mark.usefixtures("unchecked")
def test_many_spoilt_presets(tmp_path, ends):
    check_presets(tmp_path, ends, FULL)


def tokenizer_json():
    words = {"[UNK]": 0, "=": 1, "na": 2, "file03": 3, "</s>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 4)])
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    return json.loads(tokenizer.to_str())


def load_or_refuse(config):
    """Loads; says whether it could."""
    try:
        corpus = load(config, vocab_size=260)
    except ValueError as error:
        assert 0 < len(str(error)) < 1000
        return False
    assert all(split.tokens.max(initial=0) < 260 for split in (corpus.train, corpus.held_out))
    return True


def check_tokenizers(tmp_path, examples):
    folder, path, beside = write_documents(tmp_path), tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    config = DataConfig((f"{folder}/f0*.txt",), tokenizer=path)
    could = []

    @examples
    @given(text=spoilt_json(tokenizer_json()), settings=spoilt_json({"eos_token": {"content": "</s>"}}))
    def check(text, settings):
        path.write_bytes(text)
        beside.write_bytes(settings)
        could.append(load_or_refuse(config))
        beside.unlink()
        could.append(load_or_refuse(config))

    check()
    assert set(could) == {True, False}


def test_spoilt_tokenizers(tmp_path):
    check_tokenizers(tmp_path, SHORT)


@pytest.mark.variants
def test_many_spoilt_tokenizers(tmp_path):
    check_tokenizers(tmp_path, FULL)


PATTERNS = (*["*"] * 9, "**", "**/*", "*.txt", "[*", "", ".", "*\0", "\ud800", "~nobody/*", "x" * 3000)
CONTENTS = st.binary(max_size=40) | st.text(max_size=20).map(str.encode)
GOOD_NAMES = st.sampled_from(["a", "b.txt", "c d.txt", "[e].txt", "é.py", "-h", "i\nj", "k", "l"])
NAMES = st.one_of(*[GOOD_NAMES] * 9, st.sampled_from([".hidden", "f.gz", "g.jsonl"]))


def check_folders(tmp_path, examples):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps(tokenizer_json()))
    could, folders = [], iter(range(10**6))

    @examples
    @given(
        files=st.dictionaries(NAMES, CONTENTS, min_size=2, max_size=5),
        pattern=st.sampled_from(PATTERNS),
        max_bytes=st.sampled_from([2**40, 2**30, 50, 1]),
        held_out=st.floats(1e-6, 0.999),
        tokenizer=st.sampled_from([None, tokenizer]),
    )
    def check(files, pattern, **settings):
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        for name, contents in files.items():
            (folder / name).write_bytes(contents)
        could.append(load_or_refuse(DataConfig((f"{folder}/{pattern}",), **settings)))

    check()
    assert set(could) == {True, False}


def test_folders_of_anything(tmp_path):
    check_folders(tmp_path, SHORT)


@pytest.mark.variants
def test_many_folders_of_anything(tmp_path):
    check_folders(tmp_path, FULL)
