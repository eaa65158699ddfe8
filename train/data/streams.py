"""Streams of batches: what a run asks of data, and the iterators that a corpus gives."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import grain
from jax.sharding import Mesh

from train.data.batch import Batch
from train.data.parts import BatchParts
from train.data.rows import Progress, Rows

SplitName = Literal["train", "held_out"]


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
class FollowingStream(BatchStream, Protocol):
    """A stream whose batches depend on the weights, such as one of a model's own samples."""

    def follow(self, params: Any) -> None:
        """Takes the parameters before each batch; the step after it takes their memory over, so none may be kept."""
        ...

    def measures(self) -> Mapping[str, float]:
        """Gives numbers about the last batch for its step's line in the metrics."""
        ...


@runtime_checkable
class BatchSource(Protocol):
    """Gives batches to a run, each stage's by themselves: `Corpus`, or anything with this method."""

    def batches(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> "BatchIterator[Batch]":
        """Begins an endless iterator whose position can be saved; a pure function of the arguments and the text."""
        ...


@runtime_checkable
class PartSource(BatchSource, Protocol):
    """Gives the same batches also in parts: on a mesh, each process asks for those of its own devices alone."""

    def parts(
        self, split: SplitName, *, batch_size: int, seq_len: int, seed: int, mesh: Mesh
    ) -> "BatchIterator[BatchParts]":
        """Begins an iterator over this process's parts of the batches of `batches`, of the same positions."""
        ...


class BatchIterator[T](Iterator[T]):
    """Gives batches in order, with a position that is saved as JSON and restored exactly.

    Args:
      dataset: batches, or parts of them, by their number.
      stream: names what the batches are a function of.
      rows: what their rows are read from, where these are found faster with its state.
      batch_size: rows of a batch.
    """

    def __init__(self, dataset: grain.MapDataset[T], stream: str, *, rows: Rows | None = None, batch_size: int = 0):
        # One thread and a few batches ahead: rows take microseconds, and the model wants the cores.
        self._batches = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        self._stream, self._rows, self._batch_size = stream, rows, batch_size

    def __next__(self) -> T:
        return next(self._batches)

    def progress(self) -> dict[str, Progress]:
        """Says what of each source has been taken since the stream's beginning; empty where there are no sources."""
        return {} if self._rows is None else self._rows.progress(self._rows_taken())

    def get_state(self) -> dict[str, Any]:
        """Gives the position, and the name of the stream it belongs to."""
        rows = {} if self._rows is None else self._rows.get_state(self._rows_taken())
        return {"stream": self._stream, **self._batches.get_state(), **({"rows": rows} if rows else {})}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state of the same stream.

        Raises:
          ValueError: if text, tokenizer, seed or sizes are others.
        """
        if state.get("stream") != self._stream:
            raise ValueError(
                f"the saved data position belongs to stream {state.get('stream')}, this one is {self._stream}: "
                "text, tokenizer, seed, batch size, sequence length and what is mixed in must be those of the saved run"
            )
        if self._rows is not None:
            self._rows.set_state(state.get("rows", {}))
        self._batches.set_state({"next_index": state["next_index"]})

    def _rows_taken(self) -> int:
        return self._batches.get_state()["next_index"] * self._batch_size
