"""Files that are replaced as a whole, so that a killed process leaves the old or the new one; JSON read strictly."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train.checks import shown


class WriteError(ValueError):
    """Says that a file could not be written: a full disk, a quota, a mount that is gone or read-only."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file or folder in what goes wrong while it is written.

    Raises:
      WriteError: for an `OSError`, which need not know the path.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} must be writable: {error.strerror or error}") from error


def replace_text(path: Path, text: str) -> None:
    """Replaces a file as a whole, on the disk itself, so that even a machine that fails leaves the old or the new one.

    Raises:
      WriteError: if it cannot be written; the old one stays.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Replaces a file as `replace_text` does."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def replace_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Replaces a compressed .npz file as `replace_text` does."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # pyright: ignore[reportArgumentType]
    replace_bytes(path, content.getvalue())


def read_json_file(path: Path, what: str) -> Any:
    """Reads JSON as it is defined: no key twice in an object, no NaN and no infinities.

    Args:
      path: the file.
      what: what it must be, for the message.

    Raises:
      ValueError: if it cannot be read as that.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"{what} must be JSON, got {path}, which nests too deep") from error
    except OSError as error:
        raise ValueError(f"{what} must be a readable JSON file, got {path}: {error.strerror}") from error
    except ValueError as error:  # of the path, of the encoding, of the JSON, of a number with thousands of digits
        raise ValueError(f"{what} must be a readable JSON file, got {shown(str(path))}: {str(error)[:300]}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in an object")
    return values


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
