"""What a model is measured on: batches that were never trained on, by part, and which of their tokens count."""

import dataclasses
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from train.data import TOKEN_FIELDS, Batch, BatchSource, Corpus

MIXTURE = "all"  # the name of the mixture of the parts, where there is one
POSITION_RANGES = 8  # at most, of which each is twice as long as all before it

type ByPart = dict[str, float | None]  # one number for each name of `HeldOut.names`, None where there was nothing


class Measured(NamedTuple):
    """A batch to measure, the tokens that count for each name that it belongs to, and the numbers of its rows."""

    batch: Batch
    masks: dict[str, Bool[np.ndarray, "B T"]]
    rows: Int[np.ndarray, " B"]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Holds the batches that a model is measured on, by part.

    Args:
      parts: the batches of each part, all of one shape.
      subsets: of a part, further numbers by name: of the tokens [B, T] that a mask of each of its batches marks.
      mixture: weights of the parts in "all", which is what training sees; without them there is no "all".

    Raises:
      ValueError: if a subset or a weight is of no part, a part has not a mask for each batch, or batches of a part
        differ in shape.

    Examples:
      >>> from train.data import DataConfig, load
      >>> corpus = load(DataConfig(data=("books/*.txt",)))
      >>> held_out = HeldOut({"text": draw_batches(corpus, 4, batch_size=4, seq_len=512)})
    """

    parts: Mapping[str, tuple[Batch, ...]]
    subsets: Mapping[str, Mapping[str, tuple[Bool[np.ndarray, "B T"], ...]]] = types.MappingProxyType({})
    mixture: Mapping[str, float] = types.MappingProxyType({})

    def __post_init__(self):
        unknown = (self.subsets.keys() | self.mixture.keys()) - self.parts.keys()
        if unknown:
            raise ValueError(f"subsets and mixture must be of the parts {[*self.parts]}, got {sorted(unknown)}")
        for part, masks in self.subsets.items():
            if any(len(each) != len(self.parts[part]) for each in masks.values()):
                raise ValueError(f"the subsets of {part} must have a mask for each batch, of {len(self.parts[part])}")
        for part, batches in self.parts.items():
            shapes = sorted({np.shape(batch.tokens) for batch in batches})
            if len(shapes) > 1:
                raise ValueError(f"the batches of {part} must be of one shape, got {shapes}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which something is measured: the mixture, then each part and its subsets."""
        parts = [name for part in self.parts for name in (part, *self.subsets.get(part, ()))]
        return (MIXTURE, *parts) if self.mixture else tuple(parts)

    def batches(self, multiple: int = 1) -> Iterator[Measured]:
        """Yields the batches, with a multiple of so many rows each; rows that fill the last of a part count nowhere.

        Rows keep their numbers whatever the multiple, so what is drawn by them is the same.
        """
        first = 0
        for part, batches in self.parts.items():
            masks = [
                {part: np.ones(batch.tokens.shape, bool)}
                | {name: each[number] for name, each in self.subsets.get(part, {}).items()}
                for number, batch in enumerate(batches)
            ]
            yield from _dealt(batches, masks, first, multiple)
            first += sum(len(batch.tokens) for batch in batches)

    def mix(self, values: Mapping[str, Any]) -> Any:
        """Computes a number of the mixture from those of the parts; None where one of them has none."""
        if not self.mixture or any(values.get(part) is None for part in self.mixture):
            return None
        return sum(weight * values[part] for part, weight in self.mixture.items())


def _dealt(
    batches: Sequence[Batch], masks: Sequence[dict[str, np.ndarray]], first: int, multiple: int
) -> Iterator[Measured]:
    """Deals the rows of a part out into batches whose rows are a multiple of a number; row `first` comes first."""
    if not batches:
        return
    rows = len(batches[0].tokens)
    size, total = -(-rows // multiple) * multiple, rows * len(batches)

    def dealt(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        joined = np.concatenate([np.asarray(array) for array in arrays])
        filling = np.zeros((-total % size, *joined.shape[1:]), joined.dtype)  # empty key ranges, and nothing valid
        return np.split(np.concatenate([joined, filling]), (total + len(filling)) // size)

    fields = {name: dealt([getattr(b, name) for b in batches]) for name in TOKEN_FIELDS}
    named = {name: dealt([each[name] for each in masks]) for name in masks[0]}
    numbers = dealt([first + np.arange(total)])
    for i, numbered in enumerate(numbers):
        own: dict[str, Any] = {name: arrays[i] for name, arrays in fields.items()}
        batch = Batch(**own)
        yield Measured(batch, {name: arrays[i] for name, arrays in named.items()}, numbered)


def draw_batches(
    corpus: Corpus, batches: int, batch_size: int, seq_len: int, *, seed: int = 0, source: BatchSource | None = None
) -> tuple[Batch, ...]:
    """Takes up to `batches` held-out batches, no window of the text twice: what is little is measured once.

    Args:
      corpus: the text.
      batches: how many at most.
      batch_size: sequences of each.
      seq_len: tokens of a sequence.
      seed: of their order.
      source: makes the batches of the text; without it they are the text itself.

    Raises:
      ValueError: if `batches` is below 1, or the text is shorter than a sequence.
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    windows = (corpus.tokens("held_out") - 1) // seq_len
    found = (source or corpus).batches("held_out", batch_size=batch_size, seq_len=seq_len, seed=seed)
    return tuple(itertools.islice(found, min(batches, max(1, windows // batch_size))))


def position_masks(batches: Sequence[Batch]) -> dict[str, tuple[Bool[np.ndarray, "B T"], ...]]:
    """Marks the tokens of each range of positions within their documents; the ranges double.

    Examples:
      >>> batch = Batch.from_tokens(np.zeros((1, 512), int))
      >>> list(position_masks([batch]))[-2:]
      ['positions 128 to 255', 'positions 256 to 511']
    """
    length = max(batch.tokens.shape[1] for batch in batches)
    edges = [0, *(length >> i for i in reversed(range(POSITION_RANGES)) if length >> i)]
    ranges = [(low, high) for low, high in itertools.pairwise(edges) if low < high]
    return {
        f"positions {low} to {high - 1}": tuple((low <= b.positions) & (b.positions < high) for b in batches)
        for low, high in ranges
    }
