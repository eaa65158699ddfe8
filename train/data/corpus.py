"""Text files as batches of packed documents.

Whole files are either training text or held-out text, decided by hashes of their contents. Batches are a pure function
of the seed, the split, the sizes and the text, in random access, so a run continues where its saved state says. Rows
are built with NumPy alone.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, SupportsInt, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from train.checks import check_integer, check_number, shown
from train.data.batch import Batch, window_row
from train.data.text import choose_held_out, find_files, read_files
from train.data.tokenizing import BYTES, encode_files, find_end_token, load_tokenizer

SplitName = Literal["train", "held_out"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Says which text to read and how."""

    data: tuple[str, ...] = ()
    """Globs of text files; none: the sources of the running interpreter's standard library."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; none: bytes are the tokens."""
    held_out: float = 0.1
    """About the share of the text, in whole files, that is kept out of training."""
    max_bytes: int = 64 * 2**20
    """Files beyond this total are left unread, the same ones every time; how many is said."""
    append: bool = True
    """End every document with the tokenizer's end token, if it has one."""

    def __post_init__(self):
        if not isinstance(self.data, tuple) or not all(isinstance(pattern, str) for pattern in self.data):
            raise ValueError(f"data must be a tuple of globs, got {shown(self.data)}")
        if self.tokenizer is not None:
            if not isinstance(self.tokenizer, str | Path):
                raise ValueError(f"tokenizer must be a path, got {shown(self.tokenizer)}")
            object.__setattr__(self, "tokenizer", Path(self.tokenizer))
        check_number("held_out", self.held_out, above=0, below=1)
        check_integer("max_bytes", self.max_bytes, most=2**63 - 1)
        if not isinstance(self.append, bool):
            raise ValueError(f"append must be True or False, got {shown(self.append)}")


@dataclasses.dataclass(frozen=True)
class Documents:
    """Holds the documents of one split, end to end: document i is `tokens[offsets[i] : offsets[i + 1]]`."""

    tokens: np.ndarray  # uint8 or int32 [n]
    offsets: np.ndarray  # int64 [documents + 1]

    @classmethod
    def join(cls, documents: Sequence[np.ndarray]) -> Self:
        """Joins documents in the order given."""
        return cls(np.concatenate(documents), np.cumsum([0, *(len(document) for document in documents)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1


@runtime_checkable
class BatchStream(Protocol):
    """An endless iterator of batches whose position can be saved: all that a run needs of data of one's own.

    A run draws one batch a step, through all its stages and phases; each has the shape of the stage's. What `get_state`
    gives is saved as JSON in every checkpoint.
    """

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any:
        """Gives the position behind the last batch, as JSON values."""
        ...

    def set_state(self, state: Any) -> None:
        """Continues behind the batch after which `get_state` gave this."""
        ...


@runtime_checkable
class BatchSource(Protocol):
    """Gives batches to a run, each stage's by themselves: `Corpus`, or anything with this method."""

    def batches(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> "BatchIterator":
        """Begins an endless iterator whose position can be saved; a pure function of the arguments and the text."""
        ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Holds tokenised text in two splits that share no file; see `load`.

    Examples:
      >>> corpus = load(DataConfig(data=("books/*.txt",)))
      >>> batch = next(corpus.batches("train", batch_size=4, seq_len=512, seed=0))
    """

    train: Documents
    held_out: Documents
    tokenizer: Tokenizer | None
    fingerprint: str
    """Changes with the text, the tokenizer and the split."""
    end_token: str | None = None
    """The token that ends every document."""
    left_out: tuple[int, int] = (0, 0)
    """Files, and their bytes, that `max_bytes` had no room for."""

    def batches(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> "BatchIterator":
        """Begins an endless iterator over `dataset(...)`, one thread ahead, whose position can be saved."""
        dataset = self.dataset(split, batch_size=batch_size, seq_len=seq_len, seed=seed)
        return BatchIterator(dataset, stream_name(self, split, batch_size, seq_len, seed))

    def dataset(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> grain.MapDataset[Batch]:
        """Makes endless batches in random access: every epoch visits each window of `seq_len` tokens once.

        Raises:
          ValueError: if a size or the seed cannot be, or the split has no window.
        """
        documents = self.documents(split)
        windows = self.windows(split, batch_size=batch_size, seq_len=seq_len, seed=seed)
        rows = windows.map(lambda window: text_row(documents, window * seq_len, seq_len))
        return rows.batch(batch_size, batch_fn=Batch.stack)

    def documents(self, split: SplitName) -> Documents:
        """Gives the documents of a split."""
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
        return self.train if split == "train" else self.held_out

    def windows(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> grain.MapDataset[int]:
        """Shuffles the numbers of a split's windows of `seq_len` tokens, anew in every epoch, without end."""
        documents = self.documents(split)
        if batch_size < 1 or seq_len < 1:
            raise ValueError(f"batch_size and seq_len must be at least 1, got {batch_size} and {seq_len}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
        if len(documents.tokens) <= seq_len:
            raise ValueError(
                f"one sequence takes {seq_len + 1} tokens, but the {split} text has {len(documents.tokens)} "
                f"in {len(documents)} files; give more text or a smaller seq_len"
            )
        count = (len(documents.tokens) - 1) // seq_len
        epochs = 2**40 // count + 1  # without end for any run; grain's own endless length overflows in rows of one
        return grain.MapDataset.range(count).shuffle(seed=seed).repeat(epochs)

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


def stream_name(corpus: Corpus, split: SplitName, batch_size: int, seq_len: int, seed: int, share: float = 0.0) -> str:
    """Names a stream of batches; `share` is that of rows which are something else than text."""
    name = f"{corpus.fingerprint} {split} {batch_size} {seq_len} {seed} {share}"
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


class BatchIterator(Iterator[Batch]):
    """Gives batches in order, with a position that is saved as JSON and restored exactly."""

    def __init__(self, dataset: grain.MapDataset[Batch], stream: str):
        # One thread and a few batches ahead: rows take microseconds, and the model wants the cores.
        self._batches = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        self._stream = stream

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, int | str]:
        """Gives the position, and the name of the stream it belongs to."""
        return {"stream": self._stream, **self._batches.get_state()}

    def set_state(self, state: dict[str, int | str]) -> None:
        """Continues from a state of the same stream.

        Raises:
          ValueError: if text, tokenizer, seed or sizes are others.
        """
        if state.get("stream") != self._stream:
            raise ValueError(
                f"the saved data position belongs to stream {state.get('stream')}, this one is {self._stream}: "
                "text, tokenizer, seed, batch size, sequence length and what is mixed in must be those of the saved run"
            )
        self._batches.set_state({"next_index": state["next_index"]})


def load(config: DataConfig, *, vocab_size: int = 256) -> Corpus:
    """Reads, tokenises and splits the text.

    About `config.held_out` of the bytes are held out, by hashes of the files' contents; identical files are read once,
    empty ones never. With two files or more both splits have at least one.

    Args:
      config: which text, and by which tokenizer.
      vocab_size: the model's; no token may lie beyond it.

    Raises:
      ValueError: if there are no two files to read, or the tokenizer does not fit.
    """
    tokenizer = load_tokenizer(config.tokenizer, vocab_size)
    end = None if tokenizer is None or not config.append else find_end_token(tokenizer, _path(config))
    found = read_files(find_files(config.data), config.max_bytes)
    files = found.read
    if len(files) < 2:
        raise ValueError(
            f"text must come in at least two different files that are not empty, one to train on and one to hold out, "
            f"got {len(files)} within max_bytes {config.max_bytes} of {_described(config.data)}, and {found.left_out} "
            "past it; split it up"
        )
    marks = choose_held_out(files, config.held_out)
    splits = [[file for file, is_held in zip(files, marks, strict=True) if is_held is held] for held in (False, True)]
    train, held_out = (Documents.join(encode_files(split, tokenizer, end, vocab_size)) for split in splits)
    return Corpus(
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        fingerprint=_fingerprint(config, [file.digest for file in files], marks, None if end is None else end.id),
        end_token=None if end is None else end.token,
        left_out=(found.left_out, found.left_out_bytes),
    )


def _fingerprint(config: DataConfig, digests: Sequence[bytes], marks: Sequence[bool], end: int | None) -> str:
    """Names a text by its files, their split and how they become tokens."""
    count = sum(marks)
    name = hashlib.blake2b(b"".join(digests) + repr(count).encode(), digest_size=8)
    if not all(marks[:count]):  # else the count says which, as it did when only the first hashes were held out
        name.update(bytes(marks))
    if config.tokenizer is not None:
        name.update(_path(config).read_bytes() + repr(end).encode())
    return name.hexdigest()


def _path(config: DataConfig) -> Path:
    return Path(config.tokenizer or "")


def text_row(documents: Documents, begin: int, seq_len: int) -> Batch:
    """Cuts one window of text; a document that begins before it starts at the window's edge, at position 0."""
    window = documents.tokens[begin : begin + seq_len + 1].astype(np.int32)
    place = np.arange(begin, begin + seq_len + 1)
    document = np.searchsorted(documents.offsets, place, side="right") - 1
    return window_row(window, np.maximum(documents.offsets[document] - begin, 0).astype(np.int32))


def _described(patterns: Sequence[str]) -> str:
    """Names the sources of the text, in a message."""
    return shown(", ".join(patterns)) if patterns else "the standard library"
