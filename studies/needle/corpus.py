"""The corpus of the study: this machine's text, a tokenizer trained on it, and both splits tokenised, made once."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from studies.needle.needles import Needles
from studies.needle.packages import Split, Text, installed_packages, packages_of, read_split, some_of
from train.checks import check_integer
from train.data.manifest import hash_tokenizer
from train.data.tokenize import Job, TokenizeConfig, tokenize
from train.files import replace_text

END_TOKEN = "<|endoftext|>"
RECORD, TOKENIZER = "corpus.json", "tokenizer.json"
SPLITS = ("train", "held_out")
TRAINER_BYTES = 64 * 2**20  # of training text that the tokenizer is trained on
PIECE_CHARACTERS = 4096


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Says which text becomes the corpus.

    Raises:
      ValueError: if a number cannot be.
    """

    data: tuple[str, ...] = ()
    """Globs of text files, of which a folder's are one document; without it the installed packages."""
    vocab_size: int = 8192
    """Tokens of the tokenizer."""
    held_out: float = 0.1
    """About the share of the text that is held out, in whole packages."""
    max_bytes: int | None = None
    """How much text is read at most, in whole packages; None: all."""
    seed: int = 0
    """Of the order of files in their documents."""

    def __post_init__(self):
        check_integer("vocab_size", self.vocab_size, least=512)
        check_integer("seed", self.seed, least=0)
        if self.max_bytes is not None:
            check_integer("max_bytes", self.max_bytes)


def make_corpus(
    config: CorpusConfig, folder: Path, *, workers: int = 1, say: Callable[[str], object] = lambda text: None
) -> dict[str, Any]:
    """Makes the corpus, unless the folder has it: a tokenizer, the tokens of both splits, and what they were made of.

    Args:
      config: which text.
      folder: where it goes; `corpus.json` appears last in it.
      workers: processes that make tokens.
      say: told what is being done.

    Returns:
      the record: packages, versions and hashes, what was left out, and the tokens of each split.

    Raises:
      ValueError: if the folder has another corpus, or the text cannot become one.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if (folder / RECORD).exists():
        record = json.loads((folder / RECORD).read_text())
        if record["config"] != settings:
            raise ValueError(f"{folder} must hold the corpus of these settings, got one of {record['config']}")
        return record
    say("reading text")
    packages = packages_of(config.data) if config.data else installed_packages()
    split = read_split(packages if config.max_bytes is None else some_of(packages, config.max_bytes), config.held_out)
    folder.mkdir(parents=True, exist_ok=True)
    say("training the tokenizer")
    path = train_tokenizer(split.train, config.vocab_size, folder / TOKENIZER)
    Needles.of(Tokenizer.from_file(str(path)))  # refused before anything is tokenised
    counts = {}
    for name, texts in zip(SPLITS, (split.train, split.held_out), strict=True):
        say(f"tokenising {name}")
        counts[name] = _tokenise(texts, folder / name, path, config.seed, workers)
    record = {"config": settings, **_describe(split), "tokenizer": hash_tokenizer(path), "tokens": counts}
    replace_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return record


def train_tokenizer(texts: Sequence[Text], vocab_size: int, path: Path) -> Path:
    """Trains a byte-level BPE whose digits are single tokens, on text spread evenly over all there is.

    Args:
      texts: what it is trained on.
      vocab_size: its tokens, the end token among them.
      path: the tokenizer.json that it is saved as.

    Raises:
      ValueError: if the text is too little for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the text must be enough for a vocabulary of {vocab_size}, got {tokenizer.get_vocab_size()} tokens from "
            f"{sum(text.bytes for text in texts)} bytes"
        )
    tokenizer.save(str(path))
    return path


def _pieces(texts: Sequence[Text]) -> Iterator[str]:
    """Takes pieces of all files evenly, of at most 64 MiB together."""
    stride = max(1, -(-sum(text.bytes for text in texts) // TRAINER_BYTES))
    number = 0
    for text in texts:
        for file in text.files:
            for begin in range(0, len(file), PIECE_CHARACTERS):
                if number % stride == 0:
                    yield file[begin : begin + PIECE_CHARACTERS]
                number += 1


def _tokenise(texts: Sequence[Text], out: Path, tokenizer: Path, seed: int, workers: int) -> int:
    """Writes the documents as files for as long as they are tokenised; returns the tokens."""
    source = out.with_name(f"{out.name}.text")
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)  # of a corpus that was not finished
    source.mkdir()
    documents = [document for text in texts for document in text.documents(seed)]
    for number, place in enumerate(np.random.default_rng(seed).permutation(len(documents))):
        (source / f"{number:06}.txt").write_text(documents[place], encoding="utf-8")
    manifest = tokenize(Job.of(TokenizeConfig((str(source),), out, tokenizer, workers=workers)))
    shutil.rmtree(source)
    return manifest.tokens


def _describe(split: Split) -> dict[str, Any]:
    packages = [
        {"name": text.name, "version": text.version, "bytes": text.bytes, "sha256": text.sha256, "split": name}
        for name, texts in zip(SPLITS, (split.train, split.held_out), strict=True)
        for text in texts
    ]
    left_out = {
        name: {"files": files, "bytes": size}
        for name, (files, size) in (("identical", split.identical), ("nearly held out", split.near))
    }
    return {"packages": packages, "left_out": left_out}
