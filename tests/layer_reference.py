"""The lightning indexer and MLA in float64 NumPy, written from the paper's steps, on a module's parameters."""

import functools

import numpy as np
import reference


def f64(param):
    return reference.f64(param[...])


def rotate(x, positions, theta, *, interleave):
    """x[B, T, …, R] turned by position · theta^(−2i/R) in each pair: neighbours, or columns i and i + R/2."""
    half = x.shape[-1] // 2
    angles = positions[..., None] * theta ** (-np.arange(half) / half)
    angles = angles.reshape(*positions.shape, *[1] * (x.ndim - 3), half)
    pairs = (slice(0, None, 2), slice(1, None, 2)) if interleave else (slice(0, half), slice(half, None))
    first, second = x[..., pairs[0]], x[..., pairs[1]]
    out = np.empty_like(x)
    out[..., pairs[0]] = first * np.cos(angles) - second * np.sin(angles)
    out[..., pairs[1]] = second * np.cos(angles) + first * np.sin(angles)
    return out


def hadamard_matrix(size):
    """Sylvester's, orthonormal."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * size**-0.5


def reference_indexer(indexer, x, q_latent, positions, config):
    """Steps 1 to 3 and 5 of the corrected indexer, in float64."""
    x, q_latent, rope = reference.f64(x), reference.f64(q_latent), config.qk_rope_head_dim
    q = np.einsum("btq,qje->btje", q_latent, f64(indexer.wq_b))
    k = x @ f64(indexer.wk)
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = k * f64(indexer.k_norm.weight) + f64(indexer.k_norm.bias)
    turn = functools.partial(
        rotate, positions=positions, theta=config.rope_theta, interleave=config.index_rope_interleave
    )
    q, k = (np.concatenate([turn(y[..., :rope]), y[..., rope:]], -1) for y in (q, k))
    if config.index_fp8:
        q, k = q @ hadamard_matrix(config.index_head_dim), k @ hadamard_matrix(config.index_head_dim)
    return q, k, x @ f64(indexer.weights_proj) * config.index_n_heads**-0.5 * config.index_head_dim**-0.5


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * f64(weight)


def reference_attention(layer, x, positions, rows, config):
    """MLA in its multi-head form over each query's `rows` of keys: its output, q, k and lse."""
    x, nope, latent = reference.f64(x), config.qk_nope_head_dim, config.kv_lora_rank
    turn = functools.partial(rotate, positions=positions, theta=config.rope_theta, interleave=True)
    q = np.einsum("btq,qnh->btnh", rms_norm(x @ f64(layer.q_a_proj), layer.q_a_layernorm.weight), f64(layer.q_b_proj))
    q = np.concatenate([q[..., :nope], turn(q[..., nope:])], -1)
    kv = x @ f64(layer.kv_a_proj_with_mqa)
    expanded = np.einsum("bsc,cnh->bsnh", rms_norm(kv[..., :latent], layer.kv_a_layernorm.weight), f64(layer.kv_b_proj))
    k_rope = np.repeat(turn(kv[..., latent:])[:, :, None], config.num_attention_heads, 2)
    k = np.concatenate([expanded[..., :nope], k_rope], -1)
    out, lse = reference.attention(q, k, expanded[..., nope:], rows, config.softmax_scale)
    return np.einsum("btnv,nvd->btd", out, f64(layer.o_proj)), q, k, lse
