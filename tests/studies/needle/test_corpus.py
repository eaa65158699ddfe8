"""The text is split by whole packages, without what stands in both, and made into tokens once."""

import json

import pytest
from needle_cases import write_packages
from tokenizers import Tokenizer

from studies.needle.corpus import SPLITS, CorpusConfig, make_corpus
from studies.needle.packages import Package, Text, installed_packages, packages_of, read_split, some_of
from studies.needle.rows import NeedleConfig, load

LINES = [f"this is line number {i} of a file of some length" for i in range(40)]


def write(folder, name, lines):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    return path


def test_whole_packages_are_held_out_and_another_package_moves_none(tmp_path):
    packages = packages_of([write_packages(tmp_path, packages=20)])
    split = read_split(packages, 0.2)
    held, kept = ({text.name for text in texts} for texts in (split.held_out, split.train))
    assert held and kept and not held & kept and held | kept == {package.name for package in packages}
    size = sum(text.bytes for text in split.held_out) / sum(text.bytes for text in split.held_out + split.train)
    assert 0.1 < size < 0.35
    fewer = read_split(packages[:-1], 0.2)
    order = [text.name for text in fewer.held_out]
    assert set(order) <= held or held <= set(order) | {packages[-1].name}


def test_some_packages_are_those_that_fit_in_the_order_of_their_hashes(tmp_path):
    packages = packages_of([write_packages(tmp_path, packages=20)])
    sizes = {package.name: sum(path.stat().st_size for path in package.files) for package in packages}
    half = some_of(packages, sum(sizes.values()) // 2)
    assert 5 < len(half) < 15 and [package for package in packages if package in half] == half
    assert sum(sizes[package.name] for package in half) <= sum(sizes.values()) // 2
    assert {package.name for package in some_of(packages[:10], 10**9)} == {package.name for package in packages[:10]}
    assert some_of(packages, min(sizes.values()) - 1) == []
    with pytest.raises(ValueError, match="max_bytes"):
        CorpusConfig(max_bytes=0)


def test_what_stands_in_both_splits_is_left_out_and_counted(tmp_path):
    glob = write_packages(tmp_path, packages=12)
    held = read_split(packages_of([glob]), 0.2).held_out[0]
    lines = held.files[0].splitlines()
    train = next(
        p for p in packages_of([glob]) if p.name not in {t.name for t in read_split(packages_of([glob]), 0.2).held_out}
    )
    folder = tmp_path / train.name.rsplit("/", 1)[1]
    near = write(folder, "near.txt", [*lines[:150], *LINES])
    write(folder, "far.txt", [*lines[:10], *LINES])
    write(folder, "same.txt", held.files[1].splitlines())
    split = read_split(packages_of([glob]), 0.2)
    assert held.name in {text.name for text in split.held_out}
    assert split.near == (1, near.stat().st_size)
    assert split.identical == (1, len(held.files[1].encode()))
    files = [file for text in split.train for file in text.files]
    assert "\n".join([*lines[:10], *LINES]) in files and near.read_text() not in files


def test_documents_are_files_of_one_package_in_a_random_order(monkeypatch):
    text = Text("p", "1", tuple(f"file {i} " * 20 for i in range(30)))
    monkeypatch.setattr("studies.needle.packages.MAX_DOCUMENT_BYTES", 1000)
    documents = list(text.documents(0))
    assert len(documents) > 3 and all(len(document.encode()) <= 1000 + 2 * 30 for document in documents)
    assert sorted("\n\n".join(documents).split("\n\n")) == sorted(text.files)
    assert documents == list(text.documents(0)) and documents != list(text.documents(1))


def test_this_machines_packages_are_found():
    packages = {package.name.lower(): package for package in installed_packages()}
    assert {"python", "numpy", "jax"} <= packages.keys() and not {"dsa_jax", "dsa-jax"} & packages.keys()
    assert packages["numpy"].version.count(".") >= 1 and len(packages["numpy"].files) > 100
    assert len(packages["python"].files) > 500
    assert not any("site-packages" in path.parts for path in packages["python"].files)


def test_a_corpus_is_made_once_and_is_what_needles_are_planted_in(tmp_path):
    config = CorpusConfig((write_packages(tmp_path / "text"),), vocab_size=512, held_out=0.3)
    folder, said = tmp_path / "corpus", []
    record = make_corpus(config, folder, say=said.append)
    assert said == ["reading text", "training the tokenizer", "tokenising train", "tokenising held_out"]
    assert {package["split"] for package in record["packages"]} == set(SPLITS)
    assert all(len(package["sha256"]) == 64 for package in record["packages"])
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.json", "held_out", "tokenizer.json", "train"]
    places = {f"{name}_data" if name == "held_out" else "data": (str(folder / name),) for name in SPLITS}
    corpus = load(NeedleConfig(**places, tokenizer=folder / "tokenizer.json"), vocab_size=512)
    assert (corpus.text.tokens("train"), corpus.text.tokens("held_out")) == tuple(record["tokens"].values())
    batch = next(corpus.batches("held_out", batch_size=2, seq_len=1024, seed=0))
    assert "Question: the code of" in corpus.text.decode(batch.tokens.reshape(-1))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make_corpus(config, folder) == record
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(ValueError, match="must hold the corpus of these settings, got one of .*'vocab_size': 512"):
        make_corpus(CorpusConfig(config.data, vocab_size=600, held_out=0.3), folder)
    (folder / "corpus.json").unlink()  # as if it had been killed
    assert make_corpus(config, folder) == record


def test_digits_are_single_tokens(tmp_path):
    config = CorpusConfig((write_packages(tmp_path / "text"),), vocab_size=512, held_out=0.3)
    make_corpus(config, tmp_path / "corpus")
    tokenizer = Tokenizer.from_file(str(tmp_path / "corpus" / "tokenizer.json"))
    assert tokenizer.encode("i 48213.").tokens == ["i", "Ġ", "4", "8", "2", "1", "3", "."]
    assert json.loads(tokenizer.to_str())["added_tokens"][0]["content"] == "<|endoftext|>"


def test_text_that_cannot_become_a_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data must name files, got .* which matches none"):
        packages_of([f"{tmp_path}/none/*.txt"])
    with pytest.raises(ValueError, match="for both splits, got 1 with text, of which 0 are held out"):
        read_split([Package("p", "1", (write(tmp_path, "a.txt", LINES),))], 0.2)
    with pytest.raises(ValueError, match="held_out must be"):
        read_split([], 1.5)
    glob = write_packages(tmp_path / "text")
    with pytest.raises(ValueError, match="enough for a vocabulary of 100000, got "):
        make_corpus(CorpusConfig((glob,), vocab_size=100_000, held_out=0.3), tmp_path / "corpus")
    with pytest.raises(ValueError, match="vocab_size must be at least 512"):
        CorpusConfig(vocab_size=100)
