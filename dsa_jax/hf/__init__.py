"""Reads and writes Hugging Face checkpoints.

`convert` has what users call: `load_hf` makes a model from a folder, `save_hf` a folder from a model, `convert_hf` goes
from folder to folder (FP8 to bfloat16, another dtype, other shards), and `to_hf` names the tensors of any part of a
state. `checkpoint` has `Checkpoint`, a folder whose files are checked before any tensor is read, and `complaints` says
in one line what is wrong with it. `table` says which tensor is which parameter, `stacked` fills parameters in place and
on a mesh, and `files` knows safetensors, their index, and how a folder appears whole or not at all.
"""

from dsa_jax.hf.checkpoint import Checkpoint, layer_of
from dsa_jax.hf.convert import MAX_SHARD_BYTES, convert_hf, load_hf, save_hf, to_hf
from dsa_jax.hf.table import SCALE_SUFFIX, TABLE, leaves

__all__ = [
    "MAX_SHARD_BYTES",
    "SCALE_SUFFIX",
    "TABLE",
    "Checkpoint",
    "convert_hf",
    "layer_of",
    "leaves",
    "load_hf",
    "save_hf",
    "to_hf",
]
