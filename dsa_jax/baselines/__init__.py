"""Other attentions that DSA is compared with, one of which the config's `baseline` puts in place of `SparseMLA`.

Each has the interface and the parameters of `SparseMLA`, so that weights, training and caches are the same. `blocks.py`
selects whole blocks of keys.
"""

from dsa_jax.baselines.blocks import BlockMLA, select_blocks

__all__ = ["BlockMLA", "select_blocks"]
