"""The bytes of kernels, of which the keys of the persistent compilation cache are made: of the function alone."""

from pathlib import Path

import jax
import jax.numpy as jnp

import dsa_jax
from dsa_jax import KeyRange, index_scores, select_keys, sparse_attention
from dsa_jax.pallas_kernels import CAPABILITY, assume_gpu


def scores(*arrays):
    return index_scores(*arrays, KeyRange.causal(1, 512))


def keys(*arrays):
    return select_keys(*arrays, KeyRange.causal(1, 512), k=256)


def attention(q, kv, indices):
    return sparse_attention(q, kv, indices, value_dim=512, scale=0.1)


def shapes(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


INDEX = shapes(1, 512, 64, 128), shapes(1, 512, 128), shapes(1, 512, 64, dtype=jnp.float32)
ROWS = shapes(1, 512, 16, 576), shapes(1, 512, 576), shapes(1, 512, 2048, dtype=jnp.int32)


def lower(function):
    with assume_gpu(CAPABILITY):
        traced = jax.jit(function).trace(*(INDEX if function in (scores, keys) else ROWS))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def texts(*functions):
    jax.clear_caches()  # what is traced once for many kernels has not been traced
    return {function.__name__: lower(function) for function in functions}


def test_a_kernel_is_the_same_bytes_whatever_was_traced_before():
    forward = texts(scores, attention, keys)
    backward = texts(keys, attention, scores)
    assert [name for name in forward if forward[name] != backward[name]] == []
    alone = (lambda: texts(attention))()  # called from another line, too
    assert alone["attention"] == forward["attention"]
    for text in forward.values():
        assert "@mosaic_gpu" in text and str(Path(dsa_jax.__file__).parents[1]) not in text
