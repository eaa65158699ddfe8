"""Small checkpoints for the tests of conversion."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsa_jax import Config
from dsa_jax.convert import load_hf
from dsa_jax.hf_table import leaves

BFLOAT16 = np.dtype(jnp.bfloat16)
SMALL = dataclasses.replace(
    Config.tiny(),
    vocab_size=32,
    hidden_size=160,
    num_hidden_layers=2,
    intermediate_size=144,
    moe_intermediate_size=24,
    n_routed_experts=4,
    n_group=2,
    index_topk=4,
)
FLOAT32_IN_HF = ("e_score_correction_bias", "indexer.weights_proj.weight")  # transformers keeps these in float32


def read(folder):
    """All tensors of a folder, by the safetensors library itself."""
    return {name: x for file in sorted(Path(folder).glob("*.safetensors")) for name, x in load_file(file).items()}


def write(folder, tensors, config=SMALL, *, keys=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | (keys or {})))
    save_file(tensors, folder / "model.safetensors")
    return folder


def random_tensors(config: Config = SMALL, dtype: Any = BFLOAT16):
    """Every tensor of a checkpoint, in transformers' dtypes."""
    rng, tensors = np.random.default_rng(0), {}
    for leaf in leaves(config):
        for _, name in leaf.tensors():
            x = rng.normal(size=leaf.entry.file_shape(config)).astype(np.float32)
            tensors[name] = x if name.endswith(FLOAT32_IN_HF) else x.astype(dtype)
    return tensors


def same(actual, expected):
    """Same names, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        assert actual[name].tobytes() == x.tobytes(), name


def refused(folder):
    """The message of the one error."""
    with pytest.raises(ValueError) as caught:
        load_hf(folder)
    return str(caught.value)
