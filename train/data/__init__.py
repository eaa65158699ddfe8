"""Text as batches of packed documents, in random access, and the token files that they may come from.

What this room gives is imported when it is named: the processes that tokenise do without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data.batch import Batch, window_row
    from train.data.corpus import (
        BatchIterator,
        BatchSource,
        BatchStream,
        Corpus,
        DataConfig,
        SplitName,
        load,
        stream_name,
        text_row,
    )

__all__ = [
    "Batch",
    "BatchIterator",
    "BatchSource",
    "BatchStream",
    "Corpus",
    "DataConfig",
    "SplitName",
    "load",
    "stream_name",
    "text_row",
    "window_row",
]
_BATCH = ("Batch", "window_row")


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = importlib.import_module("train.data.batch" if name in _BATCH else "train.data.corpus")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
