"""Other attentions that DSA is compared with, one of which the config's `baseline` puts in place of `SparseMLA`.

Each has the interface of `SparseMLA`, so that training and caches are the same. `blocks.py` selects whole blocks of
keys and `window.py` the last ones, with the parameters of `SparseMLA`; `nsa.py` is Native Sparse Attention, over the
`spans.py` of neighbouring keys, with parameters of its own.
"""

from dsa_jax.baselines.blocks import BlockMLA, select_blocks
from dsa_jax.baselines.nsa import Branches, NativeSparseMLA, compress_keys, native_sparse_attention, select_by_entries
from dsa_jax.baselines.spans import span_attention
from dsa_jax.baselines.window import WindowMLA, window_selection

__all__ = [
    "BlockMLA",
    "Branches",
    "NativeSparseMLA",
    "WindowMLA",
    "compress_keys",
    "native_sparse_attention",
    "select_blocks",
    "select_by_entries",
    "span_attention",
    "window_selection",
]
