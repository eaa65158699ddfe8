"""Opens places of documents and splits each into what is trained on and what is held out."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Integer
from tokenizers import Tokenizer

from train.checks import shown
from train.data.config import DataConfig
from train.data.conversations import encode_conversation, load_template, split_lines
from train.data.documents import Documents, MemoryDocuments, ShardDocuments
from train.data.indexed import file_of
from train.data.manifest import Manifest, hash_tokenizer, load_manifest
from train.data.shards import Shards
from train.data.sources import Place, matches
from train.data.text import TextFile, choose_held_out, find_files, read_files
from train.data.tokenizing import EndToken, encode_files


@dataclasses.dataclass(frozen=True)
class Opened:
    """Holds the documents of a place.

    Attributes:
      train: what is trained on; all of it where nothing is to be held out.
      held_out: what is held out.
      fingerprint: changes with the documents, their tokens and the split.
      contents: hashes of the files, by which two places are found to share some.
      left_out: files, and their bytes, that `max_bytes` had no room for.
    """

    train: Documents
    held_out: Documents
    fingerprint: str
    contents: frozenset[bytes]
    left_out: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Opener:
    """Opens places.

    Args:
      config: how documents are read.
      tokenizer: None: bytes are the tokens.
      end: the token that ends a document of text.
      vocab_size: the model's.
      hold_out: whether a part of each place is held out.
    """

    config: DataConfig
    tokenizer: Tokenizer | None
    end: EndToken | None
    vocab_size: int
    hold_out: bool = True

    @property
    def end_token(self) -> str | None:
        """The token that ends a document of text."""
        return None if self.end is None else self.end.token

    @functools.cached_property
    def _tokenizer_hash(self) -> str | None:
        return hash_tokenizer(self.config.tokenizer)

    def open(self, place: Place) -> Opened:
        """Reads the documents of a place, or their index.

        Raises:
          ValueError: naming what cannot be read, does not fit tokenizer or vocabulary, or is too little.
        """
        kinds = {
            "text": self._text,
            "conversations": self._conversations,
            "shards": self._shards,
            "indexed": self._indexed,
        }
        opened = kinds[place.kind](place)
        if not len(opened.train):
            raise ValueError(
                f"{_described(place)} must have a document of min_document {self.config.min_document} tokens or more "
                "to train on, got none: give more, or a smaller min_document"
            )
        return opened

    def _text(self, place: Place) -> Opened:
        found = read_files(find_files(place.patterns), self.config.max_bytes)
        left_out = (found.left_out, found.left_out_bytes)
        marks = self._marks(found.read, place, "files", left_out[0])
        documents = encode_files(found.read, self.tokenizer, self.end, self.vocab_size)
        train, held_out = (self._join(documents, marks, held) for held in (False, True))
        name = self._fingerprint([file.digest for file in found.read], marks)
        return Opened(train, held_out, name, frozenset(file.digest for file in found.read), left_out)

    def _conversations(self, place: Place) -> Opened:
        if self.tokenizer is None:
            raise ValueError(f"conversations need a tokenizer, got none for {_described(place)}: give --tokenizer")
        files = read_files(matches(place.patterns[0]), self.config.max_bytes)
        lines = split_lines(files.read)
        marks = self._marks(lines, place, "conversations", files.left_out)
        template = load_template(self.tokenizer, _path(self.config), self.config.chat_template)
        encoded = [encode_conversation(line, template, self.vocab_size) for line in lines]
        documents, learnt = ([pair[i] for pair in encoded] for i in (0, 1))
        train, held_out = (self._join(documents, marks, held, learnt) for held in (False, True))
        tokens = hashlib.blake2b(b"".join(document.tobytes() for document in documents), digest_size=16).digest()
        name = self._fingerprint([tokens, *(line.digest for line in lines)], marks)
        contents = frozenset(line.digest for line in lines)
        return Opened(train, held_out, name, contents, (files.left_out, files.left_out_bytes))

    def _marks(self, files: Sequence[TextFile], place: Place, what: str, left_out: int) -> list[bool]:
        """Says which files are held out."""
        if len(files) < 1 + self.hold_out:
            least, why = (
                ("at least two different ", ", one to train on and one to hold out") if self.hold_out else ("", "")
            )
            raise ValueError(
                f"text must come in {least}{what} that are not empty{why}, got {len(files)} within max_bytes "
                f"{self.config.max_bytes} of {_described(place)}, and {left_out} past it; "
                f"{'split it up, or name held-out text' if self.hold_out else 'give more'}"
            )
        return choose_held_out(files, self.config.held_out) if self.hold_out else [False] * len(files)

    def _join(
        self,
        documents: Sequence[np.ndarray],
        marks: Sequence[bool],
        held: bool,
        learnt: Sequence[np.ndarray] | None = None,
    ) -> MemoryDocuments:
        """Joins the documents of a split that are long enough."""
        least = self.config.min_document
        numbers = [i for i, mark in enumerate(marks) if mark is held and len(documents[i]) >= least]
        masks = None if learnt is None else [learnt[i] for i in numbers]
        return MemoryDocuments.join([documents[i] for i in numbers], masks)

    def _fingerprint(self, digests: Sequence[bytes], marks: Sequence[bool]) -> str:
        """Names a text by its files, their split and how they become tokens."""
        count = sum(marks)
        name = hashlib.blake2b(b"".join(digests) + repr(count).encode(), digest_size=8)
        if not all(marks[:count]):  # else the count says which, as it did when only the first hashes were held out
            name.update(bytes(marks))
        if self.config.tokenizer is not None:
            end = None if self.end is None else self.end.id
            name.update(_path(self.config).read_bytes() + repr(end).encode())
        return name.hexdigest()

    def _shards(self, place: Place) -> Opened:
        manifests = [load_manifest(folder) for folder in matches(place.patterns[0])]
        for manifest in manifests:
            self._check_manifest(manifest)
        prefixes = [manifest.folder / shard.name for manifest in manifests for shard in manifest.shards]
        hashes = [bytes.fromhex(shard.bin_sha256) for manifest in manifests for shard in manifest.shards]
        return self._indexed_files(prefixes, hashes, place)

    def _check_manifest(self, manifest: Manifest) -> None:
        """Checks that shards were made by this tokenizer, and fit the vocabulary."""
        mine = self._tokenizer_hash
        if manifest.tokenizer_hash != mine:
            made, given = (_tokenizer_name(value) for value in (manifest.tokenizer_hash, mine))
            raise ValueError(
                f"tokenizer must be the one that made {manifest.folder}, {made}, got {given} "
                f"({self.config.tokenizer or 'no --tokenizer'}): give that one, or tokenize again"
            )
        manifest.check_vocabulary(self.vocab_size)

    def _indexed(self, place: Place) -> Opened:
        """Opens one pair of files without a manifest; ids beyond the vocabulary are found when they are read."""
        prefix = Path(place.patterns[0]).expanduser()
        shards = Shards([prefix])  # checks both files, before the index is hashed
        with file_of(prefix, ".idx").open("rb") as index:
            digest = hashlib.file_digest(index, "sha256").digest()
        return self._indexed_files(shards.prefixes, [digest], place)

    def _indexed_files(self, prefixes: Sequence[Path], hashes: Sequence[bytes], place: Place) -> Opened:
        shards = Shards(prefixes)
        lengths = shards.lengths
        long_enough = lengths >= self.config.min_document
        draws = np.concatenate(
            [draw_documents(digest, header.documents) for digest, header in zip(hashes, shards.headers, strict=True)]
        )
        held = self._choose(draws, long_enough, place)
        name = hashlib.blake2b(b"".join(hashes), digest_size=8)
        name.update(repr((self.hold_out and self.config.held_out, self._tokenizer_hash)).encode())
        train, held_out = ShardDocuments.split(shards, lengths, long_enough & ~held, long_enough & held)
        return Opened(train, held_out, name.hexdigest(), frozenset(hashes))

    def _choose(
        self, draws: Integer[np.ndarray, " n"], long_enough: Bool[np.ndarray, " n"], place: Place
    ) -> Bool[np.ndarray, " n"]:
        """Marks the documents to hold out: those of low draws, at least one, and not all."""
        if not self.hold_out:
            return np.zeros(len(draws), bool)
        numbers = np.flatnonzero(long_enough)
        if len(numbers) < 2:
            raise ValueError(
                f"{_described(place)} must have at least two documents of min_document {self.config.min_document} "
                f"tokens or more, one to hold out, got {len(numbers)} of {len(draws)}: give more, or name held-out data"
            )
        held = draws < np.uint64(self.config.held_out * 2**64)
        low, high = numbers[np.argmin(draws[numbers])], numbers[np.argmax(draws[numbers])]
        held[low], held[high] = True, False
        return held


def draw_documents(digest: bytes, count: int) -> Integer[np.ndarray, " n"]:
    """Draws 64 bits for each document of a shard, by the shard's hash: the same wherever it lies."""
    return np.random.Philox(key=int.from_bytes(digest[:16])).random_raw(count)


def _path(config: DataConfig) -> Path:
    return Path(config.tokenizer or "")


def _tokenizer_name(value: str | None) -> str:
    return "bytes" if value is None else f"of hash {value[:12]}"


def _described(place: Place) -> str:
    """Names the files of a place, in a message."""
    return shown(", ".join(place.patterns)) if place.patterns else "the standard library"
