"""Rotary position embeddings: YaRN's frequencies and the two layouts in which columns are paired.

MLA pairs neighbouring columns (interleaved), the indexer pairs column i with i + R/2 (half-split), both at the same
frequencies. A wrong layout goes unnoticed while every key is selected and ruins retrieval after.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from dsa_jax.config import Config, YaRN


def inv_frequencies(config: Config) -> np.ndarray:
    """Computes the radians a position of each of the R/2 rotary pairs, float32: theta^(-2i/R), stretched by YaRN.

    YaRN leaves pairs that turn more than `beta_fast` times over the original length as they are, divides those that
    turn less than `beta_slow` times by `factor`, and blends linearly between, the bounds rounded outwards to pairs.

    References:
      arXiv:2104.09864 (rotary embeddings), arXiv:2309.00071 (YaRN).
    """
    dim, yarn = config.qk_rope_head_dim, config.rope_scaling
    frequencies = config.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if yarn is not None:
        low, high = _blended_pairs(config, yarn)
        stretched = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (1.0 - stretched) + frequencies / yarn.factor * stretched
    return frequencies.astype(np.float32)


def _blended_pairs(config: Config, yarn: YaRN) -> tuple[float, float]:
    """Returns the last pair that keeps its frequency and the first that is fully stretched."""
    dim = config.qk_rope_head_dim

    def pair_turning(times: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (2 * math.pi * times)
        return dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    # The upper bound is dim - 1 rather than the last pair, as in every published implementation.
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    return low, high if high != low else high + 1e-3


def rotation(
    positions: Int[Array, "B T"], config: Config
) -> tuple[Float32[Array, "B T half"], Float32[Array, "B T half"]]:
    """Computes the cosine and sine of every position's angle in each rotary pair, times YaRN's magnitude ratio.

    Returns:
      both in float32, for `rotate_interleaved` and `rotate_half_split`.
    """
    angles = jnp.asarray(positions)[..., None].astype(jnp.float32) * inv_frequencies(config)
    magnitude = _magnitude(config.rope_scaling)
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def _magnitude(yarn: YaRN | None) -> float:
    if yarn is None:
        return 1.0
    if not (yarn.mscale and yarn.mscale_all_dim):  # a checkpoint that names neither sharpens by the factor alone
        return yarn.magnitude(1.0)
    return yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim)


def rotate_interleaved(
    x: Float[Array, "B T *H R"], cos: Float32[Array, "B T half"], sin: Float32[Array, "B T half"]
) -> Float[Array, "B T *H R"]:
    """Rotates the column pairs (0, 1), (2, 3), … (MLA's layout), in float32, returned in the dtype of `x`."""
    cos, sin = _over_heads(x, cos, sin)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape).astype(x.dtype)


def rotate_half_split(
    x: Float[Array, "B T *H R"], cos: Float32[Array, "B T half"], sin: Float32[Array, "B T half"]
) -> Float[Array, "B T *H R"]:
    """Rotates the column pairs (i, i + R/2) (the indexer's layout), in float32, returned in the dtype of `x`."""
    cos, sin = _over_heads(x, cos, sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def _over_heads(x: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Checks the shapes and gives `cos` and `sin` an axis of heads where `x` has one."""
    if x.ndim not in (3, 4):
        raise ValueError(f"x must be [B, T, R] or [B, T, heads, R], got shape {x.shape}")
    expected = (*x.shape[:2], x.shape[-1] // 2)
    if x.shape[-1] % 2 or cos.shape != expected or sin.shape != expected:
        raise ValueError(f"x {x.shape} needs cos and sin of shape {expected}, got {cos.shape} and {sin.shape}")
    return (cos, sin) if x.ndim == 3 else (cos[:, :, None], sin[:, :, None])
