"""Token files of the indexed format that Megatron-LM, NeMo and GPT-NeoX read and write: read in place, and written.

`PREFIX.bin` holds the tokens of all documents, end to end. `PREFIX.idx` says where each begins, in little-endian order:

    bytes     what
    9         the magic "MMIDIDX", 0, 0
    8         the version, 1
    1         the type of the tokens, see `DTYPES`
    8         n, how many sequences there are
    8         m, how many documents there are, and one
    n x 4     the tokens of each sequence
    n x 8     the byte of the .bin at which each sequence begins
    m x 8     0, and for each document the number of the sequence behind its last

References: `megatron/core/datasets/indexed_dataset.py` of Megatron-LM.
"""

import array
import dataclasses
import functools
import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from jaxtyping import Integer
from numpy.typing import DTypeLike

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(f"<{name}") for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = (6, 7)  # float64 and float32; which is which differs between GPT-NeoX and Megatron-LM
MAX_LENGTH = 2**31 - 1  # tokens of a sequence, and here of a document


def file_of(prefix: str | Path, suffix: str) -> Path:
    """Names one of the two files, whose prefix may have dots."""
    return Path(f"{prefix}{suffix}")


@dataclasses.dataclass(frozen=True)
class Header:
    """Holds what the first bytes and the sizes of the two files say."""

    dtype: np.dtype
    sequences: int
    documents: int
    tokens: int

    @classmethod
    def read(cls, prefix: str | Path) -> Self:
        """Reads a few bytes of the .idx, and compares the sizes of both files with what they say.

        Raises:
          ValueError: naming the file that is missing, cut short, empty, or of another format, version or type.
        """
        idx, data = file_of(prefix, ".idx"), file_of(prefix, ".bin")
        try:
            size = data.stat().st_size
            with idx.open("rb") as file:
                dtype, sequences, indices = _read_header(idx, file)
                _check_index_size(idx, file, sequences, indices)
                last = _last_numbers(file, sequences, indices)
        except OSError as error:
            what = f"{error.filename}: {error.strerror}"
            raise ValueError(f"token files must be a readable .bin and .idx, got {what}") from error
        header = cls(dtype, sequences, indices - 1, size // dtype.itemsize)
        header._check(idx, data, size, *last)
        return header

    def _check(self, idx: Path, data: Path, size: int, length: int, pointer: int, first: int, end: int) -> None:
        wanted = pointer + length * self.dtype.itemsize
        if length < 0 or pointer < 0 or first != 0 or end != self.sequences:
            raise ValueError(
                f"{idx} must begin with document index 0 and end with {self.sequences}, the number of its sequences, "
                f"got {first} and {end}, and a last sequence of {length} tokens at byte {pointer}: write it anew"
            )
        if size != wanted:
            raise ValueError(
                f"{data} must have the {wanted} bytes that its .idx says, {self.sequences} sequences of "
                f"{self.dtype.name}, got {size}: it was cut short or is another shard's, copy or make it anew"
            )
        if not size or self.documents < 1:
            raise ValueError(f"{data} must have tokens, got {self.documents} documents of 0 tokens: leave it out")


def _read_header(idx: Path, file: BinaryIO) -> tuple[np.dtype, int, int]:
    head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(
            f"{idx} must begin with {MAGIC!r} and be {HEADER.size} bytes or longer, got {len(head)} bytes that begin "
            f"with {head[:9]!r}: it is no index of token files"
        )
    _, version, code, sequences, indices = HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(f"{idx} must be of version {VERSION}, got version {version}: write it as that version")
    if code not in DTYPES:
        kind = "floating-point numbers" if code in FLOATS else "an unknown type"
        raise ValueError(f"{idx} must hold integers, of a type in {sorted(DTYPES)}, got {code}, {kind}")
    return DTYPES[code], sequences, indices


def _check_index_size(idx: Path, file: BinaryIO, sequences: int, indices: int) -> None:
    size, wanted = os.fstat(file.fileno()).st_size, HEADER.size + 12 * sequences + 8 * indices
    if size != wanted:
        hint = "it has modes of images" if size == wanted + sequences > wanted else "copy or make it anew"
        raise ValueError(
            f"{idx} must have the {wanted} bytes of {sequences} sequences and {indices} document indices, got {size}: "
            f"{hint}"
        )
    if indices < 1:
        raise ValueError(f"{idx} must have document indices, got none: write them, from 0 to the number of sequences")


def _last_numbers(file: BinaryIO, sequences: int, indices: int) -> tuple[int, int, int, int]:
    """Reads the last length and pointer, 0 where there are none, and the first and the last document index."""

    def number(at: int, kind: str) -> int:
        file.seek(at)
        return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]

    pointers, documents = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
    length = number(pointers - 4, "<i") if sequences else 0
    pointer = number(documents - 8, "<q") if sequences else 0
    return length, pointer, number(documents, "<q"), number(documents + 8 * (indices - 1), "<q")


class IndexedDataset:
    """Reads the documents of one pair of files in place; only headers are read until a document is asked for.

    A document of several sequences is read as one, their tokens end to end.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        self.header = Header.read(prefix)
        self.bytes_read = 0
        """Bytes of tokens that were asked for."""

    def __len__(self) -> int:
        return self.header.documents

    @property
    def tokens(self) -> int:
        """Counts the tokens of all documents."""
        return self.header.tokens

    @property
    def dtype(self) -> np.dtype:
        """Gives the type of the tokens."""
        return self.header.dtype

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Maps the lengths and pointers of the sequences, and the sequences of the documents.

        Raises:
          ValueError: if the sequences do not follow one another, or the documents are not in their order.
        """
        idx, n = file_of(self.prefix, ".idx"), self.header.sequences
        raw = np.memmap(idx, np.uint8, mode="r").view(np.ndarray)[HEADER.size :]
        lengths, pointers = raw[: 4 * n].view("<i4"), raw[4 * n : 12 * n].view("<i8")
        documents = raw[12 * n :].view("<i8")
        if documents[0] != 0 or documents[-1] != n or np.any(documents[1:] < documents[:-1]):
            raise ValueError(f"{idx} must have document indices that rise from 0 to {n}: it is damaged, make it anew")
        behind = pointers + lengths.astype(np.int64) * self.dtype.itemsize
        if pointers[0] != 0 or np.any(behind[:-1] != pointers[1:]) or np.any(lengths < 0):
            raise ValueError(f"{idx} must have sequences that follow one another: it is damaged, make it anew")
        return lengths, pointers, documents

    @functools.cached_property
    def lengths(self) -> Integer[np.ndarray, " documents"]:
        """Gives the tokens of each document, as int32.

        Raises:
          ValueError: if a document has more tokens than that counts.
        """
        lengths, _, documents = self._index
        if np.array_equal(documents, np.arange(len(lengths) + 1)):
            return lengths
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        of_documents = np.diff(ends[documents])
        if (longest := int(of_documents.max())) > MAX_LENGTH:
            raise ValueError(
                f"a document must have at most {MAX_LENGTH} tokens, got {longest} in {self.prefix}: cut it"
            )
        return of_documents.astype(np.int32)

    def _begin(self, document: int) -> int:
        """Gives the place of a document's first token in the .bin; behind the last document, the end."""
        _, pointers, documents = self._index
        sequence = int(documents[document])
        return int(pointers[sequence]) // self.dtype.itemsize if sequence < len(pointers) else self.tokens

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        return np.memmap(file_of(self.prefix, ".bin"), self.dtype, mode="r").view(np.ndarray)

    def read(self, document: int, begin: int = 0, end: int | None = None) -> Integer[np.ndarray, " T"]:
        """Gives the tokens from `begin` to before `end` of a document, without a copy of them.

        Raises:
          ValueError: if there is no such document, or it has no such tokens.
        """
        if not 0 <= document < len(self):
            raise ValueError(f"document must be from 0 to {len(self) - 1} in {self.prefix}, got {document}")
        first, behind = self._begin(document), self._begin(document + 1)
        end = behind - first if end is None else end
        if not 0 <= begin <= end <= behind - first:
            raise ValueError(
                f"tokens of document {document} must be from 0 to {behind - first} in {self.prefix}, got {begin} to "
                f"{end}"
            )
        found = self._tokens[first + begin : first + end]
        self.bytes_read += found.nbytes
        return found


@dataclasses.dataclass(frozen=True)
class Written:
    """Says what a pair of files holds that was written."""

    documents: int
    tokens: int
    size: int
    bin_sha256: str
    idx_sha256: str
    max_id: int


class IndexedWriter:
    """Writes a pair of files beside their names, and gives them these when they are whole and on the disk.

    Examples:
      >>> writer = IndexedWriter("shard-00000", np.uint16)
      >>> writer.add(np.array([1, 2, 3], np.uint16))
      >>> writer.close().tokens, IndexedDataset("shard-00000").read(0, begin=1).tolist()
      (3, [2, 3])
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.tokens = 0
        self.max_id = -1
        self._lengths = array.array("i")
        self._open_tokens = 0
        self._is_open = False
        self._hash = hashlib.sha256()
        self._file = file_of(prefix, ".bin.tmp").open("wb")

    @property
    def is_open(self) -> bool:
        """Tells whether a document is begun and not ended."""
        return self._is_open

    def add(self, tokens: Integer[np.ndarray, " T"], *, ends: bool = True) -> None:
        """Writes the tokens of a document, or its next ones; `ends` says that they are the last.

        Raises:
          ValueError: if the type of the file does not hold them.
        """
        if len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            limits = np.iinfo(self.dtype.name)
            if low < limits.min or high > limits.max:
                raise ValueError(f"tokens must fit {self.dtype.name} of {self.prefix}, got {low} to {high}")
            self.max_id = max(self.max_id, high)
        raw = np.ascontiguousarray(tokens, self.dtype).tobytes()
        self._file.write(raw)
        self._hash.update(raw)
        self.tokens += len(tokens)
        self._open_tokens, self._is_open = self._open_tokens + len(tokens), True
        if ends:
            self.end_document()

    def end_document(self) -> None:
        """Ends the document that was begun.

        Raises:
          ValueError: if it is longer than a document can be.
        """
        if self._open_tokens > MAX_LENGTH:
            raise ValueError(f"a document must have at most {MAX_LENGTH} tokens, got {self._open_tokens}: cut it")
        self._lengths.append(self._open_tokens)
        self._open_tokens, self._is_open = 0, False

    def discard(self) -> None:
        """Removes what was written beside the names."""
        self._file.close()
        for suffix in (".bin.tmp", ".idx.tmp"):
            file_of(self.prefix, suffix).unlink(missing_ok=True)

    def close(self) -> Written:
        """Ends the last document and brings both files to their names."""
        if self._is_open:
            self.end_document()
        sync(self._file)
        self._file.close()
        idx_hash = self._write_index()
        for suffix in (".bin", ".idx"):
            file_of(self.prefix, f"{suffix}.tmp").replace(file_of(self.prefix, suffix))
        sync_folder(self.prefix.parent)
        size = self.tokens * self.dtype.itemsize
        return Written(len(self._lengths), self.tokens, size, self._hash.hexdigest(), idx_hash, self.max_id)

    def _write_index(self) -> str:
        lengths = np.array(self._lengths, np.int32)
        n = len(lengths)
        pointers = np.zeros(n + 1, np.int64)
        np.cumsum(lengths, out=pointers[1:])
        pointers *= self.dtype.itemsize
        with file_of(self.prefix, ".idx.tmp").open("w+b") as file:
            file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], n, n + 1))
            file.write(lengths.astype("<i4").tobytes())
            file.write(pointers[:n].astype("<i8").tobytes())
            file.write(np.arange(n + 1, dtype="<i8").tobytes())
            sync(file)
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()


def sync(file: BinaryIO) -> None:
    """Brings a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
