"""The manifest of a folder of token files: which shards it has, of which tokenizer and text, and what they weigh."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from train.checks import shown
from train.data.indexed import CODES, file_of
from train.data.shards import Shards
from train.files import read_json_file, replace_text

MANIFEST = "manifest.json"
VERSION = 1
MAX_NAMED = 3  # files that a message names


@dataclasses.dataclass(frozen=True)
class Shard:
    """Describes one pair of files; `name` is theirs without .bin and .idx."""

    name: str
    documents: int
    tokens: int
    size: int  # bytes of the .bin
    bin_sha256: str
    idx_sha256: str
    max_id: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Counts what came of one input: a file, a folder or a glob, as it was given."""

    name: str
    files: int
    size: int  # bytes, as they lie on the disk
    documents: int
    tokens: int
    empty: int  # documents without text, which are left out
    skipped: int  # lines that could not be read
    left_out: int  # files and folders of a folder's that are hidden or `__pycache__`


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Says what a folder of token files holds; see `load_manifest`."""

    folder: Path
    tokenizer_hash: str | None
    """See `hash_tokenizer`; None where bytes are the tokens."""
    vocab_size: int
    """One more than the largest id of the tokenizer."""
    dtype: str
    end_token_id: int | None
    """The token behind every document, None if none was added."""
    shards: tuple[Shard, ...]
    sources: tuple[Source, ...]
    skipped: tuple[str, ...] = ()
    """The first lines of each shard that could not be read: file, line and why."""

    @property
    def documents(self) -> int:
        """Counts the documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Counts the tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def max_id(self) -> int:
        """Gives the largest token id of all shards."""
        return max(shard.max_id for shard in self.shards)

    def open(self) -> Shards:
        """Opens the shards as one."""
        return Shards([self.folder / shard.name for shard in self.shards])

    def check_vocabulary(self, vocab_size: int) -> None:
        """Compares the largest id with the model's vocabulary.

        Raises:
          ValueError: naming the shard with an id beyond it.
        """
        worst = max(self.shards, key=lambda shard: shard.max_id)
        if worst.max_id >= vocab_size:
            raise ValueError(
                f"token ids must fit the model's vocab_size {vocab_size}, got {worst.max_id} in "
                f"{self.folder / worst.name}.bin: take the model's tokenizer, or a model with its vocabulary"
            )

    def check_checksums(self) -> None:
        """Reads all files and compares their checksums.

        Raises:
          ValueError: naming files that changed.
        """
        changed = [name for shard in self.shards for name in changed_files(self.folder, shard)]
        if changed:
            others = f" and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else ""
            raise ValueError(
                f"the files of {self.folder} must have the checksums of its {MANIFEST}, got others of "
                f"{', '.join(changed[:MAX_NAMED])}{others}: make them anew with `tokenize --verify`"
            )

    def save(self) -> None:
        """Writes the manifest into its folder."""
        values = dataclasses.asdict(self)
        del values["folder"]
        replace_text(self.folder / MANIFEST, json.dumps({"version": VERSION, **values}, indent=2) + "\n")

    @classmethod
    def from_json(cls, values: Any, folder: Path) -> Self:
        """Reads the values of the file.

        Raises:
          ValueError: if they are no manifest.
        """
        where = f"{folder / MANIFEST}"
        names = {field.name for field in dataclasses.fields(cls)} - {"folder"} | {"version"}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"{where} must be an object of {', '.join(sorted(names))}, got {shown(values)}")
        if values["version"] != VERSION:
            raise ValueError(f"{where} must be of version {VERSION}, got {shown(values['version'])}: make it anew")
        rest = {name: values[name] for name in ("tokenizer_hash", "vocab_size", "dtype", "end_token_id")}
        _check_fields(rest, cls, where)
        if rest["dtype"] not in {dtype.name for dtype in CODES}:
            raise ValueError(f"dtype must be a type of integers in {where}, got {shown(rest['dtype'])}")
        shards = tuple(_record(Shard, value, where) for value in _list(values, "shards", where))
        if not shards:
            raise ValueError(f"{where} must have shards, got none")
        sources = tuple(_record(Source, value, where) for value in _list(values, "sources", where))
        skipped = tuple(str(line) for line in _list(values, "skipped", where))
        return cls(folder=folder, shards=shards, sources=sources, skipped=skipped, **rest)


def _list(values: dict[str, Any], name: str, where: str) -> list[Any]:
    if not isinstance(values[name], list):
        raise ValueError(f"{name} must be a list in {where}, got {shown(values[name])}")
    return values[name]


def _record[T](kind: type[T], values: Any, where: str) -> T:
    names = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        raise ValueError(f"a {kind.__name__.lower()} of {where} must have {', '.join(names)}, got {shown(values)}")
    _check_fields(values, kind, where)
    return kind(**values)


def _check_fields(values: dict[str, Any], kind: type, where: str) -> None:
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    for name, value in values.items():
        is_right = isinstance(value, types[name]) and not isinstance(value, bool)
        if not is_right or (isinstance(value, int) and value < 0):
            kinds = "a number from 0" if types[name] is int else "text" if types[name] is str else "that or null"
            raise ValueError(f"{name} must be {kinds} in {where}, got {shown(value)}")


def load_manifest(folder: str | Path, *, checksums: bool = False) -> Manifest:
    """Reads the manifest of a folder and compares it with the headers and sizes of all its shards.

    Args:
      folder: that `python -m train tokenize` wrote.
      checksums: also read all files and compare their checksums.

    Raises:
      ValueError: if there is no manifest, it names files outside the folder, or a shard is not what it says.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} must have a {MANIFEST}, got none: let `tokenize` end, by the command it began with")
    manifest = Manifest.from_json(read_json_file(path, "a manifest"), folder)
    for shard in manifest.shards:
        _check_name(folder, shard.name)
    shards = manifest.open()
    for shard, header in zip(manifest.shards, shards.headers, strict=True):
        got = (header.dtype.name, header.documents, header.tokens)
        if got != (manifest.dtype, shard.documents, shard.tokens) or shard.size != shard.tokens * header.dtype.itemsize:
            raise ValueError(
                f"{folder / shard.name} must hold {shard.documents} documents, {shard.tokens} tokens of "
                f"{manifest.dtype} as {MANIFEST} says, got {header.documents}, {header.tokens} of {header.dtype.name}: "
                "it changed since, make it anew with `tokenize`"
            )
    if checksums:
        manifest.check_checksums()
    return manifest


def _check_name(folder: Path, name: str) -> None:
    """Checks that a shard's files lie in the folder itself, and are no links to elsewhere."""
    if name in ("", ".", "..") or os.path.basename(name) != name or "\0" in name or "\\" in name:
        raise ValueError(f"shards of {folder / MANIFEST} must be names in its folder, got {shown(name)}")
    for suffix in (".bin", ".idx"):
        if (path := file_of(folder / name, suffix)).is_symlink():
            raise ValueError(f"shards of {folder / MANIFEST} must be files in its folder, got the link {path}")


def changed_files(folder: Path, shard: Shard) -> list[str]:
    """Names those of a shard's two files that are missing or have another checksum."""
    wanted = {".bin": shard.bin_sha256, ".idx": shard.idx_sha256}
    return [f"{shard.name}{suffix}" for suffix, sha in wanted.items() if _sha256(folder, shard, suffix) != sha]


def _sha256(folder: Path, shard: Shard, suffix: str) -> str | None:
    try:
        with file_of(folder / shard.name, suffix).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def open_shards(path: str | Path) -> Shards:
    """Opens a folder that has a manifest, or one pair of files by the prefix of their names.

    Raises:
      ValueError: if it is neither, or the files are damaged.
    """
    return load_manifest(path).open() if Path(path).is_dir() else Shards([path])


def hash_tokenizer(path: Path | None) -> str | None:
    """Hashes a tokenizer.json by what it says, but for the truncation and padding that training does without.

    Its layout and the order of its keys make no difference. None, for bytes, stays None.

    Raises:
      ValueError: if it is no JSON.
    """
    if path is None:
        return None
    values = read_json_file(path, "a tokenizer")
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Counts the ids of a tokenizer, with those below its largest that are no token."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_dtype(vocab_size: int) -> np.dtype:
    """Chooses the smallest type of a vocabulary's ids that other readers know: uint8, uint16 or int32."""
    return np.dtype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.int32)
