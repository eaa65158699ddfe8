"""Latents without a rotary part: which kernels take them and are lowered for Hopper, and what the others say."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from dsa_jax import sparse_attention, sparse_indexer_kl
from dsa_jax.pallas_kernels import CAPABILITY, assume_gpu

BF16, INT32, FLOAT32 = jnp.bfloat16, jnp.int32, jnp.float32
T, S, K, N, C = 256, 4096, 512, 64, 512


def shaped(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def why_not(kernel, *arguments):
    return importlib.import_module(f"dsa_jax.pallas_kernels.{kernel}").why_not(*arguments)


Q, KV, INDICES = shaped(1, T, N, C), shaped(1, S, C), shaped(1, T, K, dtype=INT32)


def test_the_kernels_of_training_take_them():
    assert why_not("sparse_attention.forward", Q, KV, INDICES, C) is None
    assert why_not("sparse_attention.backward", Q, KV, INDICES, C) is None
    target = shaped(T, N, C), KV, shaped(T, N, dtype=FLOAT32), shaped(T, K, dtype=INT32)
    assert why_not("indexer_loss.attention_target", *target) is None
    heads, reach = shaped(1, T, N, 128), shaped(1, T, dtype=INT32)
    assert why_not("dense_attention.multihead_attention", heads, heads, heads, reach, reach) is None


@pytest.mark.parametrize(("pages", "row"), [(jnp.uint8, 528), (BF16, 512)])
def test_those_of_decoding_say_why_they_do_not(pages, row):
    pool, table = shaped(9, 64, row, dtype=pages), shaped(4, 3, dtype=INT32)
    found = why_not("decode.paged_sparse_attention", shaped(4, 1, N, C), pool, table, shaped(4, 1, K, dtype=INT32), C)
    assert found is not None and "q must have 576 columns" in found
    if pages == jnp.uint8:
        keys = shaped(9, 66, 128, dtype=jnp.float8_e4m3fn)
        slots = shaped(4, dtype=INT32)
        found = why_not("decode.write_entries", pool, keys, shaped(4, C), shaped(4, 128), slots)
        assert found is not None and "latent_pages must be uint8 [9, 64, 656]" in found


def test_training_is_lowered_to_kernels():
    def loss(q, kv, q_index, k_index, weights, indices):
        out, lse = sparse_attention(q, kv, indices, value_dim=C, scale=0.0625)
        kl = sparse_indexer_kl(q_index, k_index, weights, q, kv, lse, indices, scale=0.0625)
        return out.astype(FLOAT32).sum() + kl.sum()

    index = shaped(1, T, 32, 128), shaped(1, S, 128), shaped(1, T, 32, dtype=FLOAT32)
    with assume_gpu(CAPABILITY):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).trace(Q, KV, *index, INDICES)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 4  # attention forward and backward, target, and the loss with its gradients
