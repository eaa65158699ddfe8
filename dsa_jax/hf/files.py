"""Reads and writes the files of a Hugging Face checkpoint.

Safetensors are read one tensor at a time, or a part of one; a new folder is written whole or not at all.
"""

import contextlib
import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

# The index of a checkpoint in several files, and the name of a single file.
INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"

# NumPy's dtypes by their names in safetensors' headers.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
}
FP8, BFLOAT16, FLOAT32 = DTYPES["F8_E4M3"], DTYPES["BF16"], DTYPES["F32"]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Locates a tensor in a file."""

    file: Path
    dtype: str  # a name of `DTYPES`, or one that we cannot read
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file
    nbytes: int

    def read(self, shape: tuple[int, ...] | None = None, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads the tensor, or a part of it, into memory of its own.

        Args:
          shape: the shape in which to see the tensor's values, its own if None.
          part: slices of that shape; dimensions without one are whole.
        """
        shape, dtype, count = shape or self.shape, DTYPES[self.dtype], math.prod(self.shape)
        if all(index.indices(size) == (0, size, 1) for index, size in zip(part, shape, strict=False)):
            return np.fromfile(self.file, dtype, count, offset=self.offset).reshape(shape)
        return np.array(np.memmap(self.file, dtype, "r", self.offset, shape)[part])


def read_headers(directory: Path) -> tuple[dict[str, StoredTensor], set[str], list[str]]:
    """Reads the headers of a folder's files.

    Returns:
      All tensors by name, the names that unreadable files should have held, and the problems.

    Raises:
      ValueError: if there are no such files, or the only one cannot be read.
    """
    placed = _placement(directory)
    stored: dict[str, StoredTensor] = {}
    unread, problems = set(), []
    files: dict[str, set[str]] = {} if placed else {SINGLE_NAME: set()}
    for name, file in placed.items():
        files.setdefault(file, set()).add(name)
    for file, names in sorted(files.items()):
        try:
            header = _read_header(directory / file)
        except (OSError, ValueError, SafetensorError) as error:
            missing = isinstance(error, FileNotFoundError)
            problem = f"{file} is missing" if missing else f"{file} is truncated or damaged ({error})"
            if not placed:
                raise ValueError(f"{directory}: {problem}") from None
            problems.append(f"{problem}, and with it {len(names)} tensors")
            unread |= names
            continue
        problems += [f"{name} is in two files, {file} and {stored[name].file.name}" for name in header.keys() & stored]
        if placed:
            problems += [f"{name} is in {file}, where the index does not place it" for name in header.keys() - names]
        stored |= header
    return stored, unread, problems


def _placement(directory: Path) -> dict[str, str]:
    """Reads which file holds each name, by the index of a sharded checkpoint; empty for a single file."""
    if (directory / SINGLE_NAME).exists():
        return {}
    index = directory / INDEX_NAME
    if not index.exists():
        raise ValueError(f"expected {SINGLE_NAME} or {INDEX_NAME} in {directory}, found neither")
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        strange = [file for file in placed.values() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not the index of a sharded checkpoint: {error!r}") from None
    if strange:
        raise ValueError(f"{index} must name files of its own folder, got {sorted(set(strange))}")
    return placed


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Reads the tensors' places off a file's header."""
    with safe_open(file, "np"):  # checks that the header is sound and that the file is as long as it says
        pass
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    stored = {}
    for name, tensor in header.items():
        start, stop = tensor["data_offsets"]
        stored[name] = StoredTensor(file, tensor["dtype"], tuple(tensor["shape"]), 8 + length + start, stop - start)
    return stored


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Makes a folder beside `target` that takes its name at the end, or vanishes with everything in it.

    Raises:
      ValueError: if there is something at `target` other than an empty folder.
      OSError: if the folder cannot be made.
    """
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} must be an empty folder or not exist, found files in it")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} must be an empty folder or not exist, found a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        for path in folder.iterdir():
            path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
            _flush(path)
        _flush(folder)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int) -> None:
    """Writes tensors in the order they come, a file whenever the next would not fit, then the index.

    Raises:
      ValueError: if `max_shard_bytes` is below 1.
      OSError: if a file cannot be written.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    shards: list[list[str]] = []
    batch: dict[str, np.ndarray] = {}
    total = size = 0
    for name, x in tensors:
        if batch and size + x.nbytes > max_shard_bytes:
            shards.append(_write_shard(folder, len(shards), batch))
            batch, size = {}, 0
        batch[name] = np.ascontiguousarray(x)
        size, total = size + x.nbytes, total + x.nbytes
    shards.append(_write_shard(folder, len(shards), batch))
    if len(shards) == 1:
        _shard(folder, 0).rename(folder / SINGLE_NAME)
        return
    placed = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _shard(folder, number).rename(folder / file)
        placed |= dict.fromkeys(names, file)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": placed})


def _write_shard(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> list[str]:
    """Writes one file, and returns the names in it."""
    try:
        # transformers reads a file only if its metadata says that it is PyTorch's.
        save_file(tensors, _shard(folder, number), metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write a shard of {len(tensors)} tensors: {error}") from error
    return list(tensors)


def _shard(folder: Path, number: int) -> Path:
    """Names a shard's file until it is known how many there are."""
    return folder / f"shard-{number}.safetensors"
