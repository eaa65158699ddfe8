"""Documents as batches of rows, in random access, and the token files that they may come from.

What this room gives is imported when it is named: the processes that tokenise do without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data.batch import TOKEN_FIELDS, Batch, Replay, window_row
    from train.data.config import DataConfig
    from train.data.corpus import Corpus, load, load_whole, stream_name
    from train.data.documents import Documents, MemoryDocuments
    from train.data.packing import Waste, text_row
    from train.data.parts import BatchParts
    from train.data.rows import Progress, Source
    from train.data.sources import TEXT
    from train.data.streams import BatchIterator, BatchSource, BatchStream, FollowingStream, PartSource, SplitName

__all__ = [
    "TEXT",
    "TOKEN_FIELDS",
    "Batch",
    "BatchIterator",
    "BatchParts",
    "BatchSource",
    "BatchStream",
    "Corpus",
    "DataConfig",
    "Documents",
    "FollowingStream",
    "MemoryDocuments",
    "PartSource",
    "Progress",
    "Replay",
    "Source",
    "SplitName",
    "Waste",
    "load",
    "load_whole",
    "stream_name",
    "text_row",
    "window_row",
]
_MODULES = {
    "batch": ("TOKEN_FIELDS", "Batch", "Replay", "window_row"),
    "config": ("DataConfig",),
    "corpus": ("Corpus", "load", "load_whole", "stream_name"),
    "documents": ("Documents", "MemoryDocuments"),
    "packing": ("Waste", "text_row"),
    "parts": ("BatchParts",),
    "rows": ("Progress", "Source"),
    "sources": ("TEXT",),
    "streams": ("BatchIterator", "BatchSource", "BatchStream", "FollowingStream", "PartSource", "SplitName"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"train.data.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
