"""Files of text: found, read, and split into those to train on and those held out."""

import dataclasses
import glob
import hashlib
import logging
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from train.checks import shown

NO_TEXT = {  # what names of files say that are no plain text, and what their first bytes say
    "compressed": (".gz", ".bgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tgz"),
    "a table": (".parquet", ".arrow", ".feather", ".avro", ".orc"),
    "JSON lines": (".jsonl", ".ndjson"),
}
NO_TEXT_BYTES = (
    b"\x1f\x8b\x08",
    b"PAR1\x15",
    b"\x28\xb5\x2f\xfd",
    b"BZh9",
    b"\xfd7zXZ\x00",
    b"PK\x03\x04",
    b"ARROW1\x00\x00",
)
NEAR = 0.25  # by how much of `held_out` the bytes may differ that the hashes alone hold out


@dataclasses.dataclass(frozen=True)
class TextFile:
    """Holds a file's bytes and the hash that decides its split."""

    path: Path
    text: bytes
    digest: bytes


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Holds the different files that were read, in the order of their hashes, and counts those left out."""

    read: tuple[TextFile, ...]
    left_out: int = 0  # files that `max_bytes` had no room for
    left_out_bytes: int = 0


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Lists the files that the globs name, without any the standard library's modules.

    Raises:
      ValueError: naming a glob that matches no file, or files that are no plain text by their names.
    """
    if not patterns:
        return _standard_library()
    paths = set()
    for pattern in patterns:
        found = [Path(path) for path in glob.glob(os.path.expanduser(pattern), recursive=True)]
        files = [path for path in found if path.is_file()]
        if not files:
            hint = "; it names a folder, add '/**/*.txt' or the like" if found else ""
            raise ValueError(f"data must name text files, got {shown(pattern)}, which matches none{hint}")
        paths.update(files)
    for what, suffixes in NO_TEXT.items():
        _refuse([path for path in sorted(paths) if path.name.lower().endswith(suffixes)], what)
    return sorted(paths)


def _refuse(paths: Sequence[Path], what: str) -> None:
    if paths:
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise ValueError(f"data must be plain text, got {paths[0]}{others}, {what}: write it as text files first")


def _standard_library() -> list[Path]:
    """Lists its modules without its tests, which some distributions leave out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = sorted(path for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts))
    if not paths:
        raise ValueError(f"the standard library must come as .py files, got none under {root}; give text by --data")
    return paths


def read_files(paths: Sequence[Path], max_bytes: int) -> TextFiles:
    """Reads the different non-empty contents, until `max_bytes`; past it, which files stay is a fair draw.

    What is left out is logged as a warning.

    Raises:
      ValueError: naming a file that cannot be read, or that is no plain text by its first bytes.
    """
    files, total, left_out, left_out_bytes = {}, 0, 0, 0
    for path in sorted(paths, key=lambda path: hashlib.blake2b(os.fsencode(path), digest_size=8).digest()):
        try:
            size = path.stat().st_size
            if total + size > max_bytes:
                left_out, left_out_bytes = left_out + 1, left_out_bytes + size
                continue
            text = path.read_bytes()
        except OSError as error:
            raise ValueError(f"data must be readable files, got {path}: {error.strerror}") from error
        if text.startswith(NO_TEXT_BYTES):
            _refuse([path], f"which begins with {text[:6]!r}")
        digest = hashlib.blake2b(text, digest_size=16).digest()
        if text and digest not in files:
            files[digest] = TextFile(path, text, digest)
            total += len(text)
    if left_out:
        logging.getLogger(__name__).warning(
            "%d of %d files, %s of %s bytes, are left out: max_bytes is %s",
            *(left_out, len(paths), f"{left_out_bytes:,}", f"{total + left_out_bytes:,}", f"{max_bytes:,}"),
        )
    return TextFiles(tuple(files[digest] for digest in sorted(files)), left_out, left_out_bytes)


def choose_held_out(files: Sequence[TextFile], share: float) -> list[bool]:
    """Marks the files to hold out, about `share` of the bytes; at least one file is marked, and one is not.

    The hash of each file says by itself whether it is held out, so that more text moves no file. Where that holds out
    a quarter more or less than `share` of the bytes, as it may with few files or with a large one, files are taken in
    the order of their hashes instead, each if it brings the held-out bytes nearer to the share; if none does, the
    smallest file.

    Args:
      files: at least two, in the order of their hashes.
      share: of the bytes, between 0 and 1.
    """
    sizes = [len(file.text) for file in files]
    wanted = share * sum(sizes)
    # Digests are uniform, so their order is a shuffle, and a prefix of that order is a fair share of the files.
    by_hash = [int.from_bytes(file.digest[:8]) / 2**64 < share for file in files]
    if abs(sum(size for size, is_held in zip(sizes, by_hash, strict=True) if is_held) - wanted) <= NEAR * wanted:
        return by_hash if not all(by_hash) else [*by_hash[:-1], False]
    total, marks = 0, []
    for size in sizes:
        marks.append(abs(total + size - wanted) < abs(total - wanted))
        total += size * marks[-1]
    if len(set(marks)) == 1:  # all or none: the smallest file is the other split's
        marks[sizes.index(min(sizes))] = not marks[0]
    return marks
