"""The paged cache: pools of pages on the device, and on the host which pages each sequence has.

A sequence has a page for each 64 tokens. Sequences may share pages (`fork`): every page counts who has it, and a page
that is shared is copied before it is written. Latents and index keys of a page always go together.

On a mesh, each shard of rows has pools and free pages of its own, and a sequence belongs to one of them; where pages
are sharded (`context`), its pages are dealt out in turn.
"""

import dataclasses
import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, Int32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dsa_jax.cache_shapes import page_shapes, pages_that_fit
from dsa_jax.config import Config
from dsa_jax.paged import PAGE
from dsa_jax.parallel.sharding import check_model, describe_mesh, shards, spec


class OutOfPages(RuntimeError):
    """Says that a cache has fewer free pages than were asked for; nothing has been changed."""


class FreePages:
    """Counts who has each of `count` pages, and hands out those that nobody has, the lowest first."""

    def __init__(self, count: int):
        self.counts = np.zeros(count, np.int32)
        self._free = list(range(count - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Takes a free page."""
        if not self._free:
            raise OutOfPages(f"all {len(self.counts)} pages are taken")
        page = self._free.pop()
        self.counts[page] = 1
        return page

    def share(self, page: int) -> None:
        """Counts one more who has a page."""
        self.counts[page] += 1

    def release(self, page: int) -> None:
        """Counts one less who has a page, which is free again when nobody has it."""
        self.counts[page] -= 1
        if not self.counts[page]:
            self._free.append(page)


@dataclasses.dataclass
class _Sequence:
    rows: int  # its shard of rows
    pages: list[int] = dataclasses.field(default_factory=list)  # page i is one of shard i mod n
    length: int = 0


class PagedCache:
    """Holds the keys of many sequences in pages of 64 tokens, in any order.

    Sequences are numbers that `new` and `fork` give. `latents` and `index_keys` are the pools, [layers, pages, …]; a
    step takes them donated and gives them back, so they are updated in place.

    Examples:
      >>> cache = PagedCache(model.config, pages=8, format="float32")
      >>> sequence = cache.new()
      >>> cache.extend(sequence, 60)
      >>> cache.table([sequence], width=1).tolist(), cache.free_pages
      ([[0]], 7)
    """

    def __init__(
        self,
        config: Config,
        pages: int,
        *,
        format: str = "bfloat16",
        mesh: Mesh | None = None,
        predicting: bool = False,
    ):
        """Makes empty pools.

        Args:
          config: the model's.
          pages: how many pages of each layer, on each shard of a mesh.
          format: "float32", "bfloat16" or "fp8", of the latents; index keys are FP8 under `index_fp8`.
          mesh: where the pools live; one device if None.
          predicting: whether pages have entries of the prediction layers too, which then draft; pages are not sharded.

        Raises:
          ValueError: if there is no page, or the model cannot have the format, the mesh or the predictions.
        """
        if pages < 1:
            raise ValueError(f"pages must be at least 1, got {pages}")
        if mesh is not None:
            check_model(mesh, config)
        if predicting and not config.num_nextn_predict_layers:
            raise ValueError("drafts by prediction layers need a model that has some, got num_nextn_predict_layers = 0")
        if predicting and shards(mesh, "pages") > 1:
            raise ValueError(f"drafts by prediction layers need whole sequences on a shard, got {describe_mesh(mesh)}")
        self.config, self.format, self.mesh, self.pages = config, format, mesh, pages
        self.predicting = predicting
        self.row_shards, self.page_shards = shards(mesh, "rows"), shards(mesh, "pages")
        shapes = page_shapes(config, self.total_pages, format, predicting=predicting)
        sharding = None if mesh is None else NamedSharding(mesh, spec(None, "pool"))
        make = jax.jit(lambda: tuple(jnp.zeros(x.shape, x.dtype) for x in shapes), out_shardings=sharding)
        self.latents, self.index_keys = make()
        self._free = [[FreePages(pages) for _ in range(self.page_shards)] for _ in range(self.row_shards)]
        self._sequences: dict[int, _Sequence] = {}
        self._names = itertools.count()

    @classmethod
    def sized(
        cls,
        config: Config,
        *,
        format: str,
        batch: int,
        length: int,
        memory: int | None = None,
        most: int | None = None,
        mesh: Mesh | None = None,
        predicting: bool = False,
    ) -> Self:
        """Makes pools as large as the device's free memory allows.

        Args:
          config, format, mesh, predicting: as in the constructor.
          batch: rows of a decode step on a shard, whose index scores need memory beside the pools.
          length: the longest sequence, in tokens.
          memory: free bytes of each device; measured if None.
          most: how many pages to make at most.

        Raises:
          ValueError: if not even one page fits, or the device does not say how much memory is free.
        """
        free = _free_memory() if memory is None else memory
        sizes: dict[str, Any] = dict(batch=batch, length=length, memory=free, predicting=predicting)
        pages = pages_that_fit(config, format=format, **sizes)
        pages = pages if most is None else min(pages, most)
        return cls(config, pages, format=format, mesh=mesh, predicting=predicting)

    @property
    def total_pages(self) -> int:
        """Counts the pages of each layer, of all shards."""
        return self.pages * self.row_shards * self.page_shards

    @property
    def free_pages(self) -> int:
        """Counts the pages that nobody has, of all shards."""
        return sum(len(free) for row in self._free for free in row)

    def free_on(self, rows: int) -> int:
        """Counts the pages that nobody has on a shard of rows."""
        return sum(map(len, self._free[rows]))

    @property
    def sequences(self) -> list[int]:
        """Lists the sequences that are in the cache."""
        return list(self._sequences)

    # Sequences.

    def new(self, rows: int = 0) -> int:
        """Begins an empty sequence on a shard of rows."""
        if not 0 <= rows < self.row_shards:
            raise ValueError(f"rows must be a shard from 0 to {self.row_shards - 1}, got {rows}")
        return self._add(_Sequence(rows))

    def length(self, sequence: int) -> int:
        """Returns the number of tokens of a sequence."""
        return self._get(sequence).length

    def rows_of(self, sequence: int) -> int:
        """Returns the shard of rows that a sequence belongs to."""
        return self._get(sequence).rows

    def missing(self, sequence: int, tokens: int) -> int:
        """Counts the pages that `tokens` more tokens of a sequence need."""
        own = self._get(sequence)
        if self._fits(own, tokens):
            return 0
        copies = int(self._writes_shared_page(own, tokens))
        return math.ceil((own.length + tokens) / PAGE) - len(own.pages) + copies

    def extend(self, sequence: int, tokens: int) -> None:
        """Makes room for `tokens` more tokens, which the next step writes; a shared last page is copied first.

        Raises:
          OutOfPages: if there are too few; nothing is changed.
          ValueError: if the sequence would be longer than the model's positions.
        """
        own = self._get(sequence)
        length = own.length + tokens
        if tokens < 0 or length > self.config.max_position_embeddings:
            raise ValueError(
                f"a sequence holds from 0 to max_position_embeddings = {self.config.max_position_embeddings} tokens, "
                f"got {own.length} + {tokens}"
            )
        if self._fits(own, tokens):
            own.length = length
            return
        first, last = len(own.pages), math.ceil(length / PAGE)
        copied = [first - 1] if self._writes_shared_page(own, tokens) else []
        self._check_free(own, [*copied, *range(first, last)], sequence)
        for place in copied:
            page = self._shard(own, place).take()
            self._copy(own, place, page)
            self._shard(own, place).release(own.pages[place])
            own.pages[place] = page
        own.pages += [self._shard(own, place).take() for place in range(first, last)]
        own.length = length

    def fork(self, sequence: int) -> int:
        """Begins a sequence with all tokens of another, whose pages it shares."""
        own = self._get(sequence)
        for place, page in enumerate(own.pages):
            self._shard(own, place).share(page)
        return self._add(_Sequence(own.rows, list(own.pages), own.length))

    def begin(self, pages: Sequence[int], rows: int = 0) -> int:
        """Begins a sequence of whole pages that others have, and shares them.

        Raises:
          ValueError: if nobody has one of them, or pages are sharded, so that each belongs to a place.
        """
        free = self._free[rows][0]
        if self.page_shards > 1 or not all(0 <= page < self.pages and free.counts[page] for page in pages):
            raise ValueError(f"pages must be taken ones of a cache whose pages are not sharded, got {list(pages)}")
        for page in pages:
            free.share(page)
        return self._add(_Sequence(rows, list(pages), PAGE * len(pages)))

    def pages_of(self, sequence: int) -> list[int]:
        """Lists the pages of a sequence, in the order of its tokens."""
        return list(self._get(sequence).pages)

    def last_page(self, sequence: int) -> tuple[int, int]:
        """Returns how many pages a sequence has, and the last of them, -1 of none."""
        pages = self._get(sequence).pages
        return len(pages), pages[-1] if pages else -1

    def owners(self, page: int, rows: int = 0) -> int:
        """Counts the sequences that have a page, where pages are not sharded."""
        return int(self._free[rows][0].counts[page])

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets the tokens from `length` on."""
        own = self._get(sequence)
        if not 0 <= length <= own.length:
            raise ValueError(f"length must be from 0 to the sequence's {own.length}, got {length}")
        kept = math.ceil(length / PAGE)
        for place in range(kept, len(own.pages)):
            self._shard(own, place).release(own.pages[place])
        own.pages, own.length = own.pages[:kept], length

    def free(self, sequence: int) -> None:
        """Ends a sequence: its pages are free, but for those that others share."""
        self.truncate(sequence, 0)
        del self._sequences[sequence]

    # What a step needs.

    def table(self, sequences: Iterable[int | None], width: int) -> Int32[np.ndarray, "B P"]:
        """Makes the table of a batch: the pages of each sequence, one after the other.

        Args:
          sequences: one for each row; None for a row that is padding.
          width: pages of a row, at least as many as any sequence has; the rest of the row is page 0, unread. Where
            pages are sharded, a multiple of the shards: the pages of the first shard stand first.

        Raises:
          ValueError: if a row is not of the shard that its sequence belongs to.
        """
        sequences = list(sequences)
        self.check_places(sequences)
        return self.packed_table([[sequence] for sequence in sequences], width)

    def check_places(self, sequences: Sequence[int | None]) -> None:
        """Raises ValueError unless every row's sequence belongs to the shard of rows that has this row."""
        rows = len(sequences) / self.row_shards
        if not rows.is_integer():
            raise ValueError(f"the rows must be a multiple of the {self.row_shards} shards, got {len(sequences)}")
        for row, sequence in enumerate(sequences):
            if sequence is not None and self.rows_of(sequence) != row // int(rows):
                raise ValueError(
                    f"row {row} must be a sequence of shard {row // int(rows)}, got one of {self.rows_of(sequence)}"
                )

    def packed_table(self, rows: Sequence[Sequence[int | None]], width: int) -> Int32[np.ndarray, "B P"]:
        """Makes the table of rows that each hold several sequences, one behind the other in whole pages.

        Where pages are sharded, each sequence takes a multiple of the shards' number of pages.
        """
        count = self.page_shards
        table = np.zeros((len(rows), count, width // count), np.int32)
        for row, sequences in zip(table, rows, strict=True):
            turn = 0
            for sequence in sequences:
                if sequence is None:
                    continue
                pages = self._get(sequence).pages
                for shard in range(count):
                    own = pages[shard::count]
                    row[shard, turn : turn + len(own)] = own
                turn += math.ceil(len(pages) / count)
        return table.reshape(len(rows), -1)

    def row_pages(self, sequence: int) -> int:
        """Counts the pages that a sequence takes of a row: all that it has, in whole turns of the shards."""
        return math.ceil(len(self._get(sequence).pages) / self.page_shards) * self.page_shards

    def update(self, latents: Array, index_keys: Array) -> None:
        """Takes the pools that a step gave back."""
        self.latents, self.index_keys = latents, index_keys

    # Files.

    def save(self, sequence: int, path: str | Path) -> None:
        """Writes the pages of a sequence, latents and index keys, to a file that appears when it is whole.

        Raises:
          OSError: if the disk is full or may not be written.
        """
        own = self._get(sequence)
        if self.mesh is not None:
            raise ValueError("a sequence of a cache on a mesh cannot be saved: save on one device")
        pages = np.asarray(own.pages, np.int32)
        arrays = dict(latents=self.latents[:, pages], index_keys=self.index_keys[:, pages])
        arrays = {name: np.asarray(x).view(np.uint8) for name, x in arrays.items()}
        path = Path(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            part = Path(file.name)
        try:
            save_file(arrays, part, metadata=dict(format=self.format, length=str(own.length)))
            os.replace(part, path)
        except SafetensorError as error:
            raise OSError(f"cannot write a sequence of {own.length} tokens to {path}: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    def restore(self, path: str | Path) -> int:
        """Reads a sequence that `save` has written, of the same model and format.

        Raises:
          ValueError: if the file is damaged, or of another model or format, or the cache is on a mesh.
          OutOfPages: if there are too few pages.
        """
        if self.mesh is not None:
            raise ValueError("a sequence cannot be restored into a cache on a mesh: restore on one device")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in ("latents", "index_keys")}
            length = int(metadata["length"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} holds no sequence of a cache: {error}") from None
        if metadata.get("format") != self.format:
            raise ValueError(f"{path} must have the cache's format {self.format!r}, got {metadata.get('format')!r}")
        most = self.config.max_position_embeddings
        if not 0 <= length <= most:
            raise ValueError(f"{path} must hold from 0 to max_position_embeddings = {most} tokens, got {length}")
        pages = math.ceil(length / PAGE)
        for name, pool in (("latents", self.latents), ("index_keys", self.index_keys)):
            wanted = [pool.shape[0], pages, pool.shape[2], pool.shape[3] * pool.dtype.itemsize]
            found = arrays[name]
            if found.dtype != np.uint8 or list(found.shape) != wanted:
                raise ValueError(f"{name} in {path} must be uint8 {wanted}, got {found.dtype} {list(found.shape)}")
        sequence = self.new()
        try:
            self.extend(sequence, length)
        except OutOfPages:
            self.free(sequence)
            raise
        at = np.asarray(self._get(sequence).pages, np.int32)
        parts = [
            arrays[name].view(pool.dtype) for name, pool in zip(arrays, (self.latents, self.index_keys), strict=True)
        ]
        self.update(*_write_pages(self.latents, self.index_keys, at, *parts))
        return sequence

    # Checks.

    def check(self) -> None:
        """Raises AssertionError unless every page is counted once for each sequence that has it, and else free."""
        for rows, row in enumerate(self._free):
            for shard, free in enumerate(row):
                owned = (own.pages[shard :: self.page_shards] for own in self._sequences.values() if own.rows == rows)
                counts = np.bincount(np.fromiter(itertools.chain.from_iterable(owned), int), minlength=self.pages)
                assert np.array_equal(counts, free.counts), (rows, shard, counts, free.counts)
                assert len(free) == np.sum(counts == 0)

    def _add(self, sequence):
        name = next(self._names)
        self._sequences[name] = sequence
        return name

    def _get(self, sequence):
        if sequence not in self._sequences:
            raise ValueError(f"sequence must be one of the {len(self._sequences)} in the cache, got {sequence}")
        return self._sequences[sequence]

    def _shard(self, own, place):
        return self._free[own.rows][place % self.page_shards]

    def _fits(self, own, tokens):
        """Tells whether new tokens go to a page that is the sequence's alone, as most do."""
        room = len(own.pages) * PAGE - own.length
        return 0 <= tokens <= room and (not tokens or self._shard(own, len(own.pages) - 1).counts[own.pages[-1]] == 1)

    def _writes_shared_page(self, own, tokens):
        """Tells whether new tokens go to a last page that others have too."""
        begun = tokens > 0 and own.length % PAGE
        return bool(begun) and self._shard(own, len(own.pages) - 1).counts[own.pages[-1]] > 1

    def _check_free(self, own, places, sequence):
        for shard in range(self.page_shards):
            wanted = sum(place % self.page_shards == shard for place in places)
            free = len(self._free[own.rows][shard])
            if wanted > free:
                raise OutOfPages(f"sequence {sequence} needs {wanted} more pages, got {free} free of {self.pages}")

    def _copy(self, own, place, page):
        at = (own.rows * self.page_shards + place % self.page_shards) * self.pages
        self.update(*_copy_page(self.latents, self.index_keys, at + own.pages[place], at + page))


@partial(jax.jit, donate_argnums=(0, 1))
def _copy_page(latents, index_keys, source, target):
    copy = lambda pool: pool.at[:, target].set(pool[:, source])  # noqa: E731
    return copy(latents), copy(index_keys)


@partial(jax.jit, donate_argnums=(0, 1))
def _write_pages(latents, index_keys, pages, new_latents, new_index_keys):
    return latents.at[:, pages].set(new_latents), index_keys.at[:, pages].set(new_index_keys)


def _free_memory() -> int:
    device: Any = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if device.platform != "cpu":
        raise ValueError("this device does not say how much memory is free: give memory, in bytes")
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # the other half is for whatever else runs


def check_table(table: Int[np.ndarray, "B P"], lengths: Int[np.ndarray, " B"], pages: int) -> None:
    """Raises ValueError, naming the row, unless the pages in use exist and none is written by two rows or twice.

    Args:
      table: the page of each 64 positions of each row.
      lengths: the tokens of each row, those that the next step writes included.
      pages: how many pages the pool has.
    """
    owner: dict[int, int] = {}
    for row, (entries, length) in enumerate(zip(np.asarray(table), np.asarray(lengths), strict=True)):
        used = entries[: math.ceil(int(length) / PAGE)]
        if len(used) * PAGE < length:
            raise ValueError(f"row {row} of the table has {len(used)} pages, got {length} tokens")
        for page in used:
            if not 0 <= page < pages:
                raise ValueError(f"row {row} of the table must name pages from 0 to {pages - 1}, got {page}")
            if int(page) in owner:
                raise ValueError(
                    f"page {page} must stand once in the table, got it in rows {owner[int(page)]} and {row}"
                )
            owner[int(page)] = row
