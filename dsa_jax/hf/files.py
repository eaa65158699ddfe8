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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dsa_jax.strict_json import parse_object, read_object, shorten, shown, shown_name, shown_path

# The index of a checkpoint in several files, and the name of a single file.
INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"

# Files that travel with the weights.
COMPANION_FILES = (
    "tokenizer*",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
CODE_SUFFIXES = (".py", ".pyc", ".so")  # never among them

# NumPy's dtypes by their names in safetensors' headers.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
}
FP8, BFLOAT16, FLOAT32 = DTYPES["F8_E4M3"], DTYPES["BF16"], DTYPES["F32"]

# Bytes of a value, by the names of all dtypes of whole bytes.
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it


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


class Headers(NamedTuple):
    """Holds what the headers of a folder's files say."""

    stored: dict[str, StoredTensor]  # all tensors of the files that were read, by name
    unread: set[str]  # names that damaged or missing files should have held
    skipped: set[str]  # names that files hold of which nothing is needed, and which were not opened
    damaged: list[str]  # what is wrong with files
    misplaced: list[tuple[str, str]]  # names of tensors, and what is wrong with their place


def read_headers(directory: Path, is_needed: Callable[[str], bool]) -> Headers:
    """Reads the headers of a folder's files, but for those of which nothing is needed.

    Raises:
      ValueError: if there are no such files, the only one cannot be read, or the index names files elsewhere.
    """
    placed = _placement(directory)
    result = Headers({}, set(), set(), [], [])
    files: dict[str, set[str]] = {} if placed else {SINGLE_NAME: set()}
    for name, file in placed.items():
        files.setdefault(file, set()).add(name)
    for file, names in sorted(files.items()):
        if placed and not any(map(is_needed, names)):
            result.skipped.update(names)
            continue
        try:
            header = _read_header(own_file(directory, file))
        except (OSError, ValueError, SafetensorError) as error:
            missing = isinstance(error, FileNotFoundError)
            what = "is missing" if missing else f"is truncated or damaged ({shorten(str(error), 300)})"
            problem = f"{shown_name(file)} {what}"
            if not placed:
                raise ValueError(f"{shown_path(directory)}: {problem}") from None
            result.damaged.append(f"{problem}, and with it {len(names):,} tensors")
            result.unread.update(names)
            continue
        for name in header.keys() & result.stored.keys():
            files_of_it = f"{shown_name(file)} and {shown_name(result.stored[name].file.name)}"
            result.misplaced.append((name, f"is in two files, {files_of_it}"))
        for name in header.keys() - names if placed else ():
            result.misplaced.append((name, f"is in {shown_name(file)}, where the index does not place it"))
        result.stored.update(header)
    return result


def own_file(directory: Path, name: str) -> Path:
    """Finds a file of a folder that stays in it; links of a Hugging Face cache may lead to its blobs.

    Raises:
      ValueError: if the file is none, or is a link to somewhere else.
      FileNotFoundError: if it is not there.
    """
    path, home = directory / name, directory.resolve()
    try:
        real = path.resolve(strict=True)
    except RuntimeError as error:  # links in a circle, in Python 3.12
        raise ValueError(str(error)) from None
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(each) for each in homes):
        raise ValueError(f"it is a link that leaves the folder, to {shown_path(real)}: put the file itself there")
    if not real.is_file():
        raise ValueError("it is no regular file")
    return path


def _placement(directory: Path) -> dict[str, str]:
    """Reads which file holds each name, by the index of a sharded checkpoint; empty for a single file."""
    if (directory / SINGLE_NAME).exists():
        return {}
    index = directory / INDEX_NAME
    if not index.exists():
        raise ValueError(f"expected {SINGLE_NAME} or {INDEX_NAME} in {shown_path(directory)}, found neither")
    try:
        placed = read_object(own_file(directory, INDEX_NAME)).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{shown_path(index)} is not the index of a sharded checkpoint: {error}") from None
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{shown_path(index)} is not the index of a sharded checkpoint: it has no weight_map")
    for name, file in placed.items():
        if not isinstance(file, str) or file in ("", "..") or "\0" in file or Path(file).name != file:
            raise ValueError(
                f"{shown_path(index)} must name files of its own folder, got {shown(file)} for {shown_name(name)}"
            )
    return placed


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Reads the tensors' places off a file's header, which must account for each of its bytes once."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        beginning = stream.read(8)
        length = int.from_bytes(beginning, "little")
        if len(beginning) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"it has {size:,} bytes, and its header should have {length:,}")
        try:
            header = parse_object(stream.read(length))
        except ValueError as error:
            raise ValueError(f"its header {error}") from None
    header.pop("__metadata__", None)
    begin = 8 + length
    stored = {name: _place_of(file, name, tensor, begin) for name, tensor in header.items()}
    reached, last = begin, ""
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != reached:
            what = f"overlaps {shown_name(last)}" if tensor.offset < reached else "begins after a gap"
            raise ValueError(f"{shown_name(name)} {what}, at byte {tensor.offset - begin:,}")
        reached, last = reached + tensor.nbytes, name
    if reached != size:
        raise ValueError(f"its tensors end at byte {reached:,}, the file at {size:,}")
    with safe_open(file, "np"):  # what else the library asks of a header
        pass
    return stored


def _place_of(file: Path, name: str, tensor: Any, begin: int) -> StoredTensor:
    """Checks what a header says of one tensor."""
    tensor = tensor if isinstance(tensor, dict) else {}
    dtype, shape, offsets = (tensor.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown_name(name)} must have dtype, shape and two data_offsets, got {shown(tensor)}")
    start, stop = offsets
    needed = math.prod(shape) * ITEM_SIZES.get(dtype, 0)
    if stop < start or (dtype in ITEM_SIZES and stop - start != needed):
        what = f"{dtype} {shown(shape)}" + (f" of {shown(needed)} bytes" if dtype in ITEM_SIZES else "")
        raise ValueError(f"{shown_name(name)} is {shorten(what, 120)}, but its data_offsets are {shown(offsets)}")
    return StoredTensor(file, dtype, tuple(shape), begin + start, stop - start)


def _are_counts(values: Any) -> bool:
    """Tells whether this is a list of integers from 0 to what a file's offsets can be."""
    whole = isinstance(values, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in values)
    return whole and all(0 <= x < 2**63 for x in values)


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


def copy_companions(source: Path, target: Path) -> None:
    """Copies a checkpoint's files of `COMPANION_FILES`, without code and without naming any.

    Raises:
      ValueError: if one is a link that leaves the folder, or a settings file that is no JSON object.
      OSError: if one cannot be read or written.
    """
    files = {file for pattern in COMPANION_FILES for file in source.glob(pattern) if file.suffix not in CODE_SUFFIXES}
    for file in sorted(files):
        if file.is_dir():
            continue
        try:
            own = own_file(source, file.name)
        except ValueError as error:
            raise ValueError(f"{shown_path(file)}: {error}") from None
        if file.name.endswith("_config.json"):
            data = read_object(own)
            write_json(target / file.name, {key: value for key, value in data.items() if key != "auto_map"})
        else:
            shutil.copyfile(own, target / file.name)


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
