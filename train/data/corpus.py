"""Documents from several sources as batches of rows, in random access.

Documents are either training text or held-out text, decided by hashes. Batches are a pure function of the seed, the
split, the sizes and the documents, whatever the processes and the mesh, so a run continues where its saved state says.
Rows are built with NumPy alone.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import SupportsInt

import grain
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from tokenizers import Tokenizer

from train.data.batch import Batch
from train.data.config import DataConfig
from train.data.documents import Documents
from train.data.packing import ENDLESS, Waste, shuffled_windows
from train.data.parts import BatchLayout, BatchParts
from train.data.rows import Progress, Rows, Source, check_sizes, row_numbers, whole_row
from train.data.sources import Place, find_places
from train.data.splits import Opened, Opener
from train.data.streams import BatchIterator, SplitName
from train.data.tokenizing import BYTES, find_end_token, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Holds the sources of two splits that share no document; see `load`.

    Examples:
      >>> corpus = load(DataConfig(data=("books/*.txt",)))
      >>> batch = next(corpus.batches("train", batch_size=4, seq_len=512, seed=0))
    """

    train_sources: tuple[Source, ...]
    held_out_sources: tuple[Source, ...]
    tokenizer: Tokenizer | None
    fingerprint: str
    """Changes with the documents, the tokenizer, the split, the mixture and how rows are made."""
    end_token: str | None = None
    """The token that ends every document of text."""
    left_out: tuple[int, int] = (0, 0)
    """Files, and their bytes, that `max_bytes` had no room for."""

    @property
    def train(self) -> Documents:
        """The documents that are trained on, of a corpus of one source."""
        return self.documents("train")

    @property
    def held_out(self) -> Documents:
        """The documents that are held out, of a corpus of one source."""
        return self.documents("held_out")

    def sources(self, split: SplitName) -> tuple[Source, ...]:
        """Gives the sources of a split."""
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
        return self.train_sources if split == "train" else self.held_out_sources

    def documents(self, split: SplitName) -> Documents:
        """Gives the documents of a split.

        Raises:
          ValueError: if they are of several sources.
        """
        sources = self.sources(split)
        if len(sources) != 1:
            names = ", ".join(source.name for source in sources)
            raise ValueError(f"the {split} documents must be of one source, got {names}")
        return sources[0].documents

    def tokens(self, split: SplitName) -> int:
        """Counts the tokens of a split."""
        return sum(source.documents.size for source in self.sources(split))

    def prompt(self, length: int) -> Int[np.ndarray, " T"]:
        """Gives the first tokens that are held out, at most `length`."""
        documents = self.held_out_sources[0].documents
        return documents.read(0, min(length, documents.size)).astype(np.int32)

    def batches(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> BatchIterator[Batch]:
        """Begins an endless iterator over `dataset(...)`, one thread ahead, whose position can be saved."""
        rows = self.rows(split, batch_size=batch_size, seq_len=seq_len, seed=seed)
        name = stream_name(self.fingerprint, split, batch_size, seq_len, seed)
        return BatchIterator(_whole(rows, batch_size), name, rows=rows, batch_size=batch_size)

    def parts(
        self, split: SplitName, *, batch_size: int, seq_len: int, seed: int, mesh: Mesh
    ) -> BatchIterator[BatchParts]:
        """Begins the same iterator on a mesh: of each batch it reads what this process's devices hold, no more."""
        rows = self.rows(split, batch_size=batch_size, seq_len=seq_len, seed=seed)
        name = stream_name(self.fingerprint, split, batch_size, seq_len, seed)
        return BatchIterator(_in_parts(rows, batch_size, mesh), name, rows=rows, batch_size=batch_size)

    def dataset(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> grain.MapDataset[Batch]:
        """Makes endless batches in random access: every epoch of a source visits each of its documents once.

        Raises:
          ValueError: if a size or the seed cannot be, or a source has too little for one row.
        """
        return _whole(self.rows(split, batch_size=batch_size, seq_len=seq_len, seed=seed), batch_size)

    def part_dataset(
        self, split: SplitName, *, batch_size: int, seq_len: int, seed: int, mesh: Mesh
    ) -> grain.MapDataset[BatchParts]:
        """Makes this process's parts of the same batches on a mesh, in random access."""
        return _in_parts(self.rows(split, batch_size=batch_size, seq_len=seq_len, seed=seed), batch_size, mesh)

    def rows(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> Rows:
        """Makes the rows of a split's mixture; see `dataset`."""
        sources = self.sources(split)
        check_sizes(split, sources, batch_size=batch_size, seq_len=seq_len, seed=seed)
        return Rows(sources, seq_len=seq_len, seed=seed)

    def windows(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> grain.MapDataset[int]:
        """Shuffles the numbers of the windows of `seq_len` tokens of a corpus of one source, as "concat" does."""
        documents = self.documents(split)
        check_sizes(split, self.sources(split), batch_size=batch_size, seq_len=seq_len, seed=seed)
        return shuffled_windows((documents.size - 1) // seq_len, seed)

    def progress(self, rows: int, *, seq_len: int) -> dict[str, Progress]:
        """Says what so many training rows take of each source, by the shares of the mixture; padding counts."""
        weights = {source.name: source.weight or source.documents.size for source in self.train_sources}
        total, found = sum(weights.values()), {}
        for source in self.train_sources:
            tokens = rows * seq_len * weights[source.name] / total
            found[source.name] = Progress(round(tokens), float(tokens / source.documents.size))
        return found

    def waste(self, split: SplitName, *, seq_len: int, seed: int = 0) -> dict[str, Waste]:
        """Says, of each source, what share of rows is padding, and what share of documents is cut."""
        return self.rows(split, batch_size=1, seq_len=seq_len, seed=seed).waste()

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Makes the tokens of a prompt."""
        if self.tokenizer is None:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return np.asarray(self.tokenizer.encode(text).ids, np.int32)

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        """Makes the text of tokens; bytes that are no text come out as the replacement character."""
        if self.tokenizer is None:
            none = BYTES - 1  # a byte that is in no text: a model may have more tokens than bytes
            return bytes(min(int(token), none) for token in tokens).decode(errors="replace")
        return self.tokenizer.decode([int(token) for token in tokens])


def _whole(rows: Rows, batch_size: int) -> grain.MapDataset[Batch]:
    places = whole_row(rows.seq_len)
    return grain.MapDataset.range(ENDLESS).map(lambda number: rows.batch(row_numbers(number, batch_size), places))


def _in_parts(rows: Rows, batch_size: int, mesh: Mesh) -> grain.MapDataset[BatchParts]:
    layout = BatchLayout.of(mesh, batch_size=batch_size, seq_len=rows.seq_len)
    own = layout.own_parts()

    def read(number: int) -> BatchParts:
        numbers = {part: row_numbers(number, batch_size, part.rows) for part in own}
        return BatchParts({part: rows.batch(numbers[part], part.places) for part in own}, layout)

    return grain.MapDataset.range(ENDLESS).map(read)


def stream_name(
    fingerprint: str, split: SplitName, batch_size: int, seq_len: int, seed: int, share: float = 0.0
) -> str:
    """Names a stream of batches of documents; `share` is that of rows which are something else than text."""
    name = f"{fingerprint} {split} {batch_size} {seq_len} {seed} {share}"
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


def load(config: DataConfig, *, vocab_size: int = 256) -> Corpus:
    """Opens the sources, tokenises those that are text, and splits them.

    About `config.held_out` of each source is held out, by hashes of files, of conversations, or of shards and the
    numbers of documents in them; identical files are read once, empty ones never. Unless held-out data are named, both
    splits have at least one document of each source.

    Args:
      config: which documents, by which tokenizer, and how rows are made of them.
      vocab_size: the model's; no token may lie beyond it.

    Raises:
      ValueError: if there is too little to read, or the tokenizer does not fit.
    """
    opener = _opener(config, vocab_size, hold_out=not config.held_out_data)
    places = find_places("data", config.data)
    opened = [opener.open(place) for place in places]
    named = find_places("held_out_data", config.held_out_data) if config.held_out_data else ()
    others = [opener.open(place) for place in named]
    _check_apart(places, opened, named, others)
    train = [_source(config, place, one.train) for place, one in zip(places, opened, strict=True)]
    if named:
        held_out = [_source(config, place, one.train) for place, one in zip(named, others, strict=True)]
    else:
        held_out = [_source(config, place, one.held_out) for place, one in zip(places, opened, strict=True)]
    return Corpus(
        train_sources=tuple(train),
        held_out_sources=tuple(source for source in held_out if len(source.documents)),
        tokenizer=opener.tokenizer,
        fingerprint=_fingerprint(config, [*zip(places, opened, strict=True), *zip(named, others, strict=True)]),
        end_token=opener.end_token,
        left_out=_left_out(opened),
    )


def load_whole(config: DataConfig, *, vocab_size: int = 256) -> Corpus:
    """Opens the sources with all of their documents held out, to measure a model that is trained; see `load`.

    Args:
      config: which documents; `held_out` and `held_out_data` mean nothing here.
      vocab_size: the model's.

    Raises:
      ValueError: as `load`; one file is enough.
    """
    opener, places = _opener(config, vocab_size, hold_out=False), find_places("data", config.data)
    opened = [opener.open(place) for place in places]
    return Corpus(
        train_sources=(),
        held_out_sources=tuple(_source(config, place, one.train) for place, one in zip(places, opened, strict=True)),
        tokenizer=opener.tokenizer,
        fingerprint=_fingerprint(config, list(zip(places, opened, strict=True))),
        end_token=opener.end_token,
        left_out=_left_out(opened),
    )


def _opener(config: DataConfig, vocab_size: int, *, hold_out: bool) -> Opener:
    tokenizer, path = load_tokenizer(config.tokenizer, vocab_size), config.tokenizer
    end = None if tokenizer is None or path is None or not config.append else find_end_token(tokenizer, path)
    return Opener(config, tokenizer, end, vocab_size, hold_out)


def _left_out(opened: Sequence[Opened]) -> tuple[int, int]:
    return sum(one.left_out[0] for one in opened), sum(one.left_out[1] for one in opened)


def _source(config: DataConfig, place: Place, documents: Documents) -> Source:
    """Makes a source; conversations are never cut where a row happens to end."""
    pack = "best_fit" if place.kind == "conversations" else config.pack
    return Source(place.name, documents, place.weight, pack)


def _check_apart(
    places: Sequence[Place], opened: Sequence[Opened], named: Sequence[Place], others: Sequence[Opened]
) -> None:
    """Checks that what is named to be held out is not trained on too."""
    for place, one in zip(places, opened, strict=True):
        for other, held in zip(named, others, strict=True):
            if shared := len(one.contents & held.contents):
                raise ValueError(
                    f"held-out data must not be trained on, got {shared} files or conversations that {place.name} and "
                    f"{other.name} share: take them out of one"
                )


def _fingerprint(config: DataConfig, opened: Sequence[tuple[Place, Opened]]) -> str:
    """Names the mixture; text alone keeps its own name."""
    (place, first), *more = opened
    as_ever = (place.kind, place.weight, config.pack, config.min_document) == ("text", None, "concat", 1)
    if as_ever and not more:
        return first.fingerprint
    parts = [(place.name, str(place.weight), place.kind, one.fingerprint) for place, one in opened]
    name = repr((parts, len(config.data), config.pack, config.min_document))
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
