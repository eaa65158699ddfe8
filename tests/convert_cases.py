"""Small checkpoints for the tests of conversion."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsa_jax import Config
from dsa_jax.hf.convert import load_hf
from dsa_jax.hf.table import leaves

BFLOAT16 = np.dtype(jnp.bfloat16)
E4M3 = np.dtype(jnp.float8_e4m3fn)
SMALL = Config.tiny(
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
    """Reads all tensors of a folder, by the safetensors library itself."""
    return {name: x for file in sorted(Path(folder).glob("*.safetensors")) for name, x in load_file(file).items()}


def write(folder, tensors, config=SMALL, *, keys=None):
    """Writes a checkpoint in one file; `keys` come on top of its `config.json`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | (keys or {})))
    save_file(tensors, folder / "model.safetensors")
    return folder


def random_tensors(config: Config = SMALL, dtype: Any = BFLOAT16):
    """Draws every tensor of a checkpoint, in transformers' dtypes."""
    rng, tensors = np.random.default_rng(0), {}
    for leaf in leaves(config):
        for _, name in leaf.tensors():
            x = rng.normal(size=leaf.entry.file_shape(config)).astype(np.float32)
            tensors[name] = x if name.endswith(FLOAT32_IN_HF) else x.astype(dtype)
    return tensors


def same(actual, expected):
    """Asserts the same names, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        assert actual[name].tobytes() == x.tobytes(), name


def refused(folder):
    """Gives the message of the error that `load_hf` must raise."""
    with pytest.raises(ValueError) as caught:
        load_hf(folder)
    message = str(caught.value)
    assert len(message) < 1000 and "\n" not in message
    return message


def to_fp8(tensors, scale_dtype):
    """Rounds the matrices among tensors to e4m3 blocks; gives these with their scales, and their bfloat16 values."""
    stored, dequantized = {}, {}
    for name, x in tensors.items():
        matrix = name.endswith("_proj.weight") or "indexer.w" in name
        if not matrix or name.endswith(FLOAT32_IN_HF):
            stored[name] = dequantized[name] = x
            continue
        rows, columns = (-(-size // 128) for size in x.shape)
        values, scales = np.zeros(x.shape, E4M3), np.zeros((rows, columns), np.float32)
        wide = np.zeros(x.shape, np.float32)
        for i in range(rows):
            for j in range(columns):
                block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scale = np.abs(x[block].astype(np.float32)).max() / 448
                scales[i, j] = 2.0 ** np.ceil(np.log2(scale)) if scale_dtype != np.float32 else scale
                values[block] = (x[block].astype(np.float32) / scales[i, j]).astype(E4M3)
                wide[block] = values[block].astype(np.float32) * scales[i, j]
        stored |= {name: values, name + "_scale_inv": scales.astype(scale_dtype)}
        dequantized[name] = wide.astype(BFLOAT16)
    return stored, dequantized


FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
