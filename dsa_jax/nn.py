"""The small parts that every layer is made of: new weights, projections and normalisations."""

import inspect

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsa_jax.config import Config

LEAST_ROWS = 8  # of a product in a decode step


def show_arguments[M: type](module: M) -> M:
    """Gives a module's class the signature of its `__init__`, which nnx hides behind its own."""
    first, *others = inspect.signature(module.__init__).parameters.values()
    module.__signature__ = inspect.Signature(others)  # pyright: ignore[reportAttributeAccessIssue]
    return module


def new_weight(config: Config, rngs: nnx.Rngs, *shape: int) -> nnx.Param[Array]:
    """Draws a parameter from a normal distribution of standard deviation `initializer_range`, in `param_dtype`."""
    return nnx.Param(jax.nn.initializers.normal(config.initializer_range)(rngs.params(), shape, config.param_dtype))


def project(dims: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiplies activations by a parameter: `einsum` in and out in the dtype of `x`, float32 in full precision.

    Examples:
      >>> project("btd,df->btf", jnp.ones((1, 2, 3), jnp.bfloat16), jnp.ones((3, 4))).dtype
      dtype(bfloat16)
    """
    multiply = lambda x: jnp.einsum(dims, x, weight.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    single = x.ndim > 2 and x.shape[:2] == (1, 1)
    return multiply(pad_rows(x, axis=1))[:, :1] if single else multiply(x)


def pad_rows(x: Float[Array, "..."], *, axis: int) -> Float[Array, "..."]:
    """Pads an axis with zeros to `LEAST_ROWS`.

    Of a product with a single row XLA makes a reduction, which reads weights at a third of the memory's bandwidth.
    """
    short = max(LEAST_ROWS - x.shape[axis], 0)
    return jnp.pad(x, [(0, short if each == axis else 0) for each in range(x.ndim)])


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, x / rms(x) · weight, computed in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, dtype: str):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(dim, dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normal * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with weight and bias, computed in float32 (arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float, dtype: str):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(dim, dtype))
        self.bias = nnx.Param(jnp.zeros(dim, dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        centred = x.astype(jnp.float32) - jnp.mean(x, axis=-1, keepdims=True, dtype=jnp.float32)
        normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (normal * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
