"""Text as batches of packed documents, in random access."""

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
