"""The text of this machine: sources and documentation of the installed packages, whole packages held out.

What is installed differs from machine to machine, so what was read is recorded: every package with its version, its
bytes and a hash of them.
"""

import collections
import dataclasses
import functools
import glob
import hashlib
import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from train.checks import check_number

SUFFIXES = (".py", ".pyi", ".pyx", ".md", ".rst", ".txt", ".c", ".h", ".cpp", ".hpp", ".html", ".js", ".ipynb")
OURS = ("dsa_jax", "dsa-jax")  # what is being worked on is no stable text
MAX_FILE_BYTES = 2**20  # larger ones are generated, or lists of numbers
MAX_DOCUMENT_BYTES = 8 * 2**20  # of one package in one document
LINE_CHARACTERS = 24  # shorter lines say nothing of where a file comes from
DUPLICATE = 0.5  # a file is a near-duplicate if so many of its lines stand in the held-out text


@dataclasses.dataclass(frozen=True)
class Package:
    """Names a package and its text files."""

    name: str
    version: str
    files: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """Holds what was read of a package.

    Attributes:
      name: of the package.
      version: its version.
      files: the contents of its files.
    """

    name: str
    version: str
    files: tuple[str, ...]

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(len(file.encode()) for file in self.files)

    @property
    def sha256(self) -> str:
        """The hash of the contents in their order."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(hashlib.sha256(file.encode()).digest())
        return digest.hexdigest()

    def documents(self, seed: int) -> Iterator[str]:
        """Joins the files in a random order to documents of at most 8 MiB, or of one file that is larger."""
        order = np.random.default_rng((seed, *self.name.encode())).permutation(len(self.files))
        parts: list[str] = []
        size = 0
        for number in order:
            length = len(self.files[number].encode())
            if parts and size + length > MAX_DOCUMENT_BYTES:
                yield "\n\n".join(parts)
                parts, size = [], 0
            parts.append(self.files[number])
            size += length
        if parts:
            yield "\n\n".join(parts)


@dataclasses.dataclass(frozen=True)
class Split:
    """Holds the texts of both splits, and what was left out.

    Attributes:
      train: texts to train on, without what is nearly held out.
      held_out: whole packages.
      identical: files that stand in several places, which are read once; and their bytes.
      near: training files most of whose lines are held out too; and their bytes.
    """

    train: tuple[Text, ...]
    held_out: tuple[Text, ...]
    identical: tuple[int, int]
    near: tuple[int, int]


def installed_packages() -> list[Package]:
    """Lists the packages of the running Python and its standard library, in the order of their names."""
    found = [Package("python", sys.version.split()[0], tuple(_library_files()))]
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name not in OURS:
            paths = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
            found.append(Package(name, distribution.version, tuple(sorted(filter(_is_text, paths)))))
    unique = {package.name.lower(): package for package in reversed(found)}  # the first one is what is imported
    return sorted((package for package in unique.values() if package.files), key=lambda each: each.name.lower())


def packages_of(patterns: Sequence[str]) -> list[Package]:
    """Lists files of one's own as packages: those of a folder are one.

    Raises:
      ValueError: if a pattern matches no file.
    """
    folders: dict[Path, list[Path]] = collections.defaultdict(list)
    for pattern in patterns:
        paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
        if not paths:
            raise ValueError(f"data must name files, got {pattern}, which matches none")
        for path in paths:
            folders[path.parent.resolve()].append(path)
    return [Package(str(folder), "", tuple(paths)) for folder, paths in sorted(folders.items())]


def some_of(packages: Sequence[Package], max_bytes: int) -> list[Package]:
    """Takes packages in the order of a hash of their names, each that still fits; gives them in their own order.

    Args:
      packages: to choose of.
      max_bytes: of all their files together.
    """
    chosen, left = set(), max_bytes
    for package in sorted(packages, key=lambda package: _hash(package.name)):
        size = sum(path.stat().st_size for path in package.files)
        if size <= left:
            chosen.add(package.name)
            left -= size
    return [package for package in packages if package.name in chosen]


def read_split(packages: Iterable[Package], held_out: float) -> Split:
    """Reads the files, each content once, and holds whole packages out.

    Packages are held out in the order of a hash of their names, so that another one changes the split of none but
    itself, until about `held_out` of the bytes are; none that has more than that alone.

    Args:
      packages: what is read.
      held_out: about the share of the bytes.

    Raises:
      ValueError: if the share cannot be, or a split has no text.
    """
    check_number("held_out", held_out, above=0, below=1)
    texts, identical = _read(packages)
    total = sum(text.bytes for text in texts)
    held, size = [], 0
    for text in sorted(texts, key=lambda text: _hash(text.name)):
        if size < held_out * total and text.bytes <= held_out * total:
            held.append(text)
            size += text.bytes
    train, near = _without_near_duplicates([text for text in texts if text not in held], held)
    if not train or not held:
        raise ValueError(
            f"the text must have packages, or folders, for both splits, got {len(texts)} with text, of which "
            f"{len(held)} are held out"
        )
    return Split(tuple(train), tuple(held), identical, near)


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.lower().encode()).digest()


def _library_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*")):
        if "site-packages" not in path.parts and _is_text(path):
            yield path


def _is_text(path: Path) -> bool:
    """Tells files of text by their names and sizes; metadata of installers is none."""
    if path.suffix not in SUFFIXES or any(part.endswith((".dist-info", ".egg-info")) for part in path.parts):
        return False
    return path.is_file() and 0 < path.stat().st_size <= MAX_FILE_BYTES


def _read(packages: Iterable[Package]) -> tuple[list[Text], tuple[int, int]]:
    """Reads files that are UTF-8, each content once; counts those that are left out for it, and their bytes."""
    seen, left_out, texts = set(), [], []
    for package in packages:
        files = []
        for path in package.files:
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen:
                left_out.append(len(text.encode()))
            elif text.strip():
                seen.add(digest)
                files.append(text)
        if files:
            texts.append(Text(package.name, package.version, tuple(files)))
    return texts, (len(left_out), sum(left_out))


def _without_near_duplicates(train: Sequence[Text], held_out: Sequence[Text]) -> tuple[list[Text], tuple[int, int]]:
    """Leaves out training files most of whose lines are held out; counts them and their bytes."""
    lines = {line for text in held_out for file in text.files for line in _lines(file)}
    kept, left_out = [], []
    for text in train:
        files = []
        for file in text.files:
            mine = _lines(file)
            if mine and len(mine & lines) >= DUPLICATE * len(mine):
                left_out.append(len(file.encode()))
            else:
                files.append(file)
        if files:
            kept.append(dataclasses.replace(text, files=tuple(files)))
    return kept, (len(left_out), sum(left_out))


def _lines(file: str) -> set[int]:
    """Hashes the lines of a file that are long enough to tell where it comes from."""
    stripped = (line.strip() for line in file.splitlines())
    digests = (hashlib.blake2b(line.encode(), digest_size=8) for line in stripped if len(line) >= LINE_CHARACTERS)
    return {int.from_bytes(digest.digest()) for digest in digests}
