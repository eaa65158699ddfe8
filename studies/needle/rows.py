"""Rows of long text with needles in them: each a part of one document, seen from position 0."""

import dataclasses
from typing import Self

import grain
import numpy as np
from jaxtyping import Bool, Integer

from studies.needle.needles import Needles, plant
from train import data
from train.checks import check_number, shown
from train.data import Batch, BatchIterator, Corpus, DataConfig, Documents, SplitName, stream_name, window_row
from train.data.packing import shuffled_windows
from train.evaluation.held_out import HeldOut, draw_batches, position_masks

SHORT = 1024  # tokens of a row, up to which needles stand twice as dense, in most rows but not in all


@dataclasses.dataclass(frozen=True)
class NeedleConfig(DataConfig):
    """Says which text is read, and how many needles are planted in a row.

    Raises:
      ValueError: if a density cannot be, or there is no tokenizer.
    """

    density: float = 1 / 128
    """A row of T tokens has from none to `density` · T needles, all numbers alike."""
    short_density: float = 1 / 64
    """The same of rows of at most 1024 tokens."""
    short_share: float = 0.8
    """The share of these rows that have needles."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("density", "short_density", "short_share"):
            check_number(name, getattr(self, name), least=0)
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be between 0 and 1, got {shown(getattr(self, name))}")
        if self.tokenizer is None:
            raise ValueError("needles are made of a tokenizer's tokens: give one, whose digits are single tokens")
        if self.pack != "concat":
            raise ValueError(f"rows are parts of one document each: pack must be concat, got {self.pack}")


@dataclasses.dataclass(frozen=True)
class NeedleCorpus:
    """Gives batches of rows with needles; a `BatchSource`.

    Attributes:
      text: the documents.
      needles: how needles are written in its tokens.
      config: how many.
    """

    text: Corpus
    needles: Needles
    config: NeedleConfig

    @property
    def fingerprint(self) -> str:
        """Names the text and the densities."""
        return f"{self.text.fingerprint} {self.config.density} {self.config.short_density} {self.config.short_share}"

    def batches(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> BatchIterator[Batch]:
        """Begins an endless iterator over `dataset(...)`, whose position can be saved."""
        dataset = self.dataset(split, batch_size=batch_size, seq_len=seq_len, seed=seed)
        return BatchIterator(dataset, stream_name(self.fingerprint, split, batch_size, seq_len, seed))

    def dataset(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> grain.MapDataset[Batch]:
        """Makes endless batches in random access: every epoch visits each window of the documents once.

        Raises:
          ValueError: if no document is as long as a row.
        """
        windows = Windows.of(self.text.documents(split), split, seq_len)

        def row(index: int, window: int) -> Batch:
            rng = np.random.default_rng((seed, index))
            return one_document(plant(windows.read(window), self.needles, self._count(seq_len, rng), rng).tokens)

        shuffled = shuffled_windows(len(windows), seed)
        return shuffled.map_with_index(row).batch(batch_size, batch_fn=Batch.stack)

    def _count(self, seq_len: int, rng: np.random.Generator) -> int:
        """Draws how many needles a row has, no more than there is room for."""
        config = self.config
        density, share = (config.density, 1.0) if seq_len > SHORT else (config.short_density, config.short_share)
        wanted = round(rng.uniform() * density * seq_len) if rng.uniform() < share else 0
        return min(wanted, (seq_len + 1) // self.needles.cell // 2)


def draw_held_out(corpus: NeedleCorpus, batches: int, batch_size: int, seq_len: int, *, seed: int = 0) -> HeldOut:
    """Draws held-out text without needles, by position, and the same with them, whose answers are a part of their own.

    Args:
      corpus: the text, and how needles are planted.
      batches: how many at most of each.
      batch_size: rows of each.
      seq_len: tokens of a row.
      seed: of their order.

    Raises:
      ValueError: as `draw_batches`, and if no document is as long as a row.
    """
    none = dataclasses.replace(corpus.config, density=0.0, short_density=0.0)
    many = dataclasses.replace(corpus.config, short_share=1.0)
    parts = {
        part: draw_batches(
            corpus.text, batches, batch_size, seq_len, seed=seed, source=dataclasses.replace(corpus, config=config)
        )
        for part, config in {"text": none, "needles": many}.items()
    }
    answers = tuple(_answers(batch, corpus.needles) for batch in parts["needles"])
    return HeldOut(parts, {"text": position_masks(parts["text"]), "needles": {"answers": answers}})


def _answers(batch: Batch, needles: Needles) -> Bool[np.ndarray, "B T"]:
    """Marks the targets that are digits of answers."""
    return needles.find(np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1))[:, 1:]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Numbers the windows of T + 1 tokens that lie within one document each, end to end but for the last token."""

    documents: Documents
    seq_len: int
    before: Integer[np.ndarray, " n"]  # windows of all documents up to each

    @classmethod
    def of(cls, documents: Documents, split: str, seq_len: int) -> Self:
        """Counts the windows.

        Raises:
          ValueError: if no document is as long as a row.
        """
        counts = (documents.lengths - 1) // seq_len
        if not counts.sum():
            longest = int(documents.lengths.max(initial=0))
            raise ValueError(
                f"the {split} text must have a document of at least {seq_len + 1} tokens, a row and a target, "
                f"got {longest}"
            )
        return cls(documents, seq_len, np.cumsum(counts))

    def __len__(self) -> int:
        return int(self.before[-1])

    def read(self, window: int) -> Integer[np.ndarray, " T"]:
        """Reads the tokens of a window, and the target of its last."""
        document = int(np.searchsorted(self.before, window, side="right"))
        within = window - (int(self.before[document - 1]) if document else 0)
        begin = int(self.documents.offsets[document]) + within * self.seq_len
        return self.documents.read(begin, begin + self.seq_len + 1)


def one_document(tokens: Integer[np.ndarray, " L"]) -> Batch:
    """Makes a row of one document from position 0, all of whose tokens count as targets."""
    return window_row(np.asarray(tokens, np.int32), np.zeros(len(tokens), np.int32))


def load(config: NeedleConfig, *, vocab_size: int) -> NeedleCorpus:
    """Reads the text by `train.data.load`, and how needles are written in its tokens.

    Raises:
      ValueError: as `train.data.load` and `Needles.of`.
    """
    text = data.load(config, vocab_size=vocab_size)
    assert text.tokenizer is not None  # the configuration has one
    return NeedleCorpus(text, Needles.of(text.tokenizer), config)
