"""Shards of tokens for tests, written with their manifest."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.indexed import IndexedWriter
from train.data.manifest import Manifest, Shard


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[Sequence[int]]],
    *,
    tokenizer_hash: str | None = None,
    vocab_size: int = 256,
    manifest: bool = True,
) -> Path:
    """Writes shards of documents, given by their tokens, with a manifest or without."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, documents in enumerate(shards):
        writer = IndexedWriter(folder / f"shard-{number:05d}", np.uint16)
        for document in documents:
            writer.add(np.asarray(document, np.uint16))
        records.append(Shard(f"shard-{number:05d}", **dataclasses.asdict(writer.close())))
    if manifest:
        Manifest(folder, tokenizer_hash, vocab_size, "uint16", None, tuple(records), ()).save()
    return folder


def random_documents(count: int, *, seed: int, low: int = 5, high: int = 60, vocab: int = 256) -> list[list[int]]:
    """Draws documents of `low` to `high` tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(vocab, size=size).tolist() for size in rng.integers(low, high, size=count)]
