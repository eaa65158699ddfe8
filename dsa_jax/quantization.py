"""FP8: the indexer's e4m3 rows with one power-of-two scale each, and weights with one float32 scale a block.

The Hadamard transform precedes the rounding of rows. Blocks of weights are 128 × 128, as FP8 checkpoints have them.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from dsa_jax.pallas_kernels import Implementation, choose_implementation
from dsa_jax.pallas_kernels import quantization as kernels

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
WEIGHT_BLOCK = 128  # rows and columns of one scale in FP8 checkpoints


def quantize(
    x: Float[Array, "*rows E"], *, implementation: Implementation | None = None
) -> tuple[Float[Array, "*rows E"], Float32[Array, "*rows"]]:
    """Rounds each row to e4m3 and returns its scale s = 2^ceil(log2(max(amax, 1e-4) / 448)), so that x ≈ values · s.

    Rounding the scale up means that nothing saturates; a power of two means that scaling itself is exact. The results
    are constants: gradients flow through `straight_through_quantize`.

    Args:
      x: rows, float32 or bfloat16.
      implementation: None, "xla" or "pallas".

    Returns:
      e4m3 values of the shape of `x`, and a float32 scale for each row.

    Raises:
      ValueError: if `x` is not of floats.

    Examples:
      >>> values, scale = quantize(jnp.array([[448.0, -1.0], [900.0, 3.0]]))
      >>> scale.tolist(), dequantize(values, scale).tolist()
      ([1.0, 4.0], [[448.0, -1.0], [896.0, 3.0]])
    """
    x = jax.lax.stop_gradient(_floats("quantize", x))
    round_rows = choose_implementation(
        "quantize", implementation, kernels.why_not(x), xla=_round_rows, pallas=kernels.quantize
    )
    return round_rows(x)


def _floats(name: str, x) -> Array:
    """Returns an array of floats, and refuses any other."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} takes floats, got {x.dtype}")
    return x


def _round_rows(x):
    x = x.astype(jnp.float32)
    scale = _power_of_two_scale(jnp.max(jnp.abs(x), axis=-1))
    return (x / scale[..., None]).astype(E4M3), scale


def _power_of_two_scale(amax: Array) -> Array:
    """Computes 2^ceil(log2(amax / 448)) from the bits of `amax`: XLA's log2 and exp2 are not exact at integers.

    448 = 1.75 · 2^8, so the exponent is that of `amax` less 8, plus one where the mantissa exceeds 1.75; adding what
    lies between 1.75 and 2 carries into the exponent in exactly that case.
    """
    bits = jax.lax.bitcast_convert_type(jnp.maximum(amax, kernels.SMALLEST_AMAX), jnp.int32)
    above_mantissa = (1 << 21) - 1
    exponent = ((bits + above_mantissa) >> 23) - 8
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def dequantize(
    values: Float[Array, "*rows E"], scale: Float32[Array, "*rows"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*rows E"]:
    """Computes values · scale; exact in float32 and in bfloat16, for the scale is a power of two.

    Raises:
      ValueError: unless there is one scale a row.
    """
    if values.shape[:-1] != scale.shape:
        raise ValueError(f"values {values.shape} need a scale of shape {values.shape[:-1]}, got {scale.shape}")
    return (values.astype(jnp.float32) * scale[..., None]).astype(dtype)


@jax.custom_jvp
def straight_through_dequantize(
    x: Float[Array, "*rows E"], values: Float[Array, "*rows E"], scale: Float32[Array, "*rows"]
) -> Float[Array, "*rows E"]:
    """Computes values · scale, which `quantize` made of `x`, in its dtype; the gradient is `x`'s own, unrounded."""
    return dequantize(values, scale, dtype=x.dtype)


@straight_through_dequantize.defjvp
def _straight_through_dequantize_jvp(primals, tangents):
    return straight_through_dequantize(*primals), tangents[0]


def straight_through_quantize(x: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
    """Rounds each row to e4m3 with a scale of its own, in the dtype of `x`; the gradient is that of the identity."""
    return straight_through_dequantize(x, *quantize(x))


def hadamard(x: Float[Array, "*rows E"], *, implementation: Implementation | None = None) -> Float[Array, "*rows E"]:
    """Computes the orthonormal Walsh-Hadamard transform of each row (natural order), in float32.

    It is its own inverse and leaves dot products as they are, and spreads outliers over all columns before FP8 rounds
    them. A butterfly of sums, so that the bits of a row do not depend on how many rows are transformed with it.

    Args:
      x: rows whose length is a power of two.
      implementation: None, "xla" or "pallas".

    Returns:
      the transform in the dtype of `x`.

    Raises:
      ValueError: if `x` is not of floats or the length is no power of two, or "pallas" has no kernel for `x`.
    """
    x = _floats("hadamard", x)
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"hadamard needs a last dimension that is a power of two, got shape {x.shape}")
    transform = choose_implementation(
        "hadamard", implementation, kernels.why_not(x), xla=_butterfly, pallas=kernels.hadamard
    )
    return transform(x) if transform is _butterfly else _symmetric(transform, x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _symmetric(transform, x):
    """Applies a transform that is its own transpose: its gradient is the transform of the cotangent."""
    return transform(x)


_symmetric.defvjp(lambda transform, x: (transform(x), None), lambda transform, _, d_out: (transform(d_out),))


def _butterfly(x):
    size = x.shape[-1]
    out, half = x.astype(jnp.float32), 1
    while half < size:
        pairs = out.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        out, half = jnp.stack([first + second, first - second], -2), 2 * half
    return (out.reshape(x.shape) * size**-0.5).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """Holds matrices in FP8: weight = value · scale of its block of 128 × 128; blocks at the edges may be smaller.

    Attributes:
      values: e4m3 [..., rows, columns].
      scale: float32 [..., ceil(rows / 128), ceil(columns / 128)].
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape of the matrices, that of their values."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Gives the dtype of their values, e4m3."""
        return self.values.dtype


def block_counts(rows: int, columns: int) -> tuple[int, int]:
    """Counts the blocks of a matrix, down and across.

    Examples:
      >>> block_counts(256, 130)
      (2, 2)
    """
    return -(-rows // WEIGHT_BLOCK), -(-columns // WEIGHT_BLOCK)


@jax.jit
def quantize_blocks(weight: Float[Array, "*stack rows columns"]) -> BlockScaled:
    """Rounds matrices to FP8, to the nearest e4m3: scale = max |weight| / 448 of each block, 1 for a block of zeros.

    NaN stays NaN, and infinities become it: callers that want numbers check before.
    """
    *stack, rows, columns = weight.shape
    wide = weight.astype(jnp.float32)
    down, across = block_counts(rows, columns)
    missing = (0, down * WEIGHT_BLOCK - rows), (0, across * WEIGHT_BLOCK - columns)
    blocks = jnp.pad(wide, [(0, 0)] * len(stack) + [*missing])
    amax = jnp.abs(blocks.reshape(*stack, down, WEIGHT_BLOCK, across, WEIGHT_BLOCK)).max((-3, -1))
    # Of a division by a constant XLA makes a product with its inverse, which rounds otherwise: this is none.
    quotient = amax / jnp.where(jnp.isnan(amax), amax, E4M3_MAX)
    # Division by a scale below the normal numbers, which XLA may take for 0, would give infinities.
    scale = jnp.where(amax == 0, 1.0, jnp.maximum(quotient, jnp.finfo(jnp.float32).tiny))
    return BlockScaled((wide / _over_blocks(scale, rows, columns)).astype(E4M3), scale)


@jax.jit
def dequantize_blocks(
    weight: Float[Array, "*stack rows columns"], scale_inv: Float[Array, "*stack A B"]
) -> Float32[Array, "*stack rows columns"]:
    """Computes the float32 weights of an FP8 checkpoint, whose `scale_inv` multiplies each block of 128 × 128 values.

    Raises:
      ValueError: unless the weights are matrices with one scale a block.
    """
    if weight.ndim < 2:
        raise ValueError(f"an FP8 weight must have two dimensions, got shape {weight.shape}")
    rows, columns = weight.shape[-2:]
    expected = (*weight.shape[:-2], *block_counts(rows, columns))
    if scale_inv.shape != expected:
        raise ValueError(f"an FP8 weight {weight.shape} needs scales of shape {expected}, got {scale_inv.shape}")
    return weight.astype(jnp.float32) * _over_blocks(scale_inv.astype(jnp.float32), rows, columns)


def _over_blocks(scale: Array, rows: int, columns: int) -> Array:
    """Repeats each scale over its block."""
    scale = jnp.repeat(scale, WEIGHT_BLOCK, axis=-2)[..., :rows, :]
    return jnp.repeat(scale, WEIGHT_BLOCK, axis=-1)[..., :columns]


def cast_weight(weight: Float[Array, "..."] | BlockScaled, dtype: DTypeLike) -> Float[Array, "..."]:
    """Gives a weight in the dtype of the product that it enters: a plain one cast, one in FP8 multiplied out.

    FP8 is multiplied out in float32 and rounded to bfloat16, whatever `dtype`: so it is when a checkpoint is loaded
    into bfloat16, and both have the same bits.
    """
    if not isinstance(weight, BlockScaled):
        return weight.astype(dtype)
    return round_to_bfloat16(dequantize_blocks(weight.values, weight.scale)).astype(dtype)


def round_to_bfloat16(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Rounds to what bfloat16 can hold, in float32; XLA may leave out a mere cast where float32 is wanted in the end.

    Examples:
      >>> round_to_bfloat16(jnp.float32(1.001)).item()
      1.0
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
