"""Stores the moments of an optax optimizer in fewer bits, rounded at random so that none is lost on average.

A moment in bfloat16 keeps 8 significant bits. Rounded to the nearest, one that should move by less than half of its
last bit a step stays where it is, however many steps there are. Rounded up with the probability of what is cut off, it
moves as it should on average. Optax rounds the first moment alone (`mu_dtype`), and to the nearest.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, PRNGKeyArray

MOMENTS = ("mu", "nu")  # what optax calls them in the states of AdamW and Muon
CUT_BITS = 16  # of a float32, which has as many exponent bits as a bfloat16
EXPONENT = 0x7F800000  # the bits of a float32's exponent, all set in infinities and NaN

type Rounding = Callable[[Array, PRNGKeyArray], Array]


def round_stochastically(x: Float32[Array, "*n"], key: PRNGKeyArray) -> BFloat16[Array, "*n"]:
    """Rounds to one of the two nearest bfloat16 numbers: away from zero with P = (x - lower) / (upper - lower) of |x|.

    The mean of many roundings is x: 16 random bits are added to the 16 that are cut off, and carry over to those that
    stay. An element's random bits depend on the key and on its place in the array, not on how that is sharded. What a
    bfloat16 can hold comes out as it is, infinities and zeros of both signs too, and NaN is NaN. A finite number beyond
    the largest bfloat16 becomes that one: no moment becomes infinite by its rounding.

    Args:
      x: what to round; it stays float32 no longer than it takes to round an element.
      key: of the random bits.

    Examples:
      >>> x = jnp.full(8, 1 + 2.0**-9)  # a quarter of the way from 1 to the next bfloat16
      >>> sorted(set(round_stochastically(x, jax.random.key(0)).tolist()))
      [1.0, 1.0078125]
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    raised = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    is_finite = (raised & EXPONENT) != EXPONENT  # NaN and infinities alike are not, whatever was added
    kept = jnp.where(jnp.isfinite(x) & is_finite, raised, bits)
    rounded = jax.lax.bitcast_convert_type((kept >> CUT_BITS).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(x), jnp.asarray(jnp.nan, jnp.bfloat16), rounded)


def store_rounded(
    inner: optax.GradientTransformation, rounding: Rounding = round_stochastically
) -> optax.GradientTransformationExtraArgs:
    """Has an optimizer keep its moments in bfloat16: it computes in float32, and they are rounded when they are stored.

    The state is the optimizer's own but for the dtype of its moments. Widening and rounding are elementwise, so that
    XLA makes them part of the loops that update a parameter: no float32 moment is written to memory. On a CPU alone the
    random bits are, for there JAX draws them in loops.

    Args:
      inner: the optimizer, whose state calls its moments `mu` and `nu`.
      rounding: makes a moment in bfloat16 from one in float32 and a key.

    Returns:
      the optimizer, whose `update` also takes `random`, the key data of a run, and `step`, the number of the update.
      Together with a moment's own path they decide its random bits, so that what is repeated is the same. Without them
      it raises ValueError.
    """

    def init(params: Any) -> Any:
        return _map_moments(lambda _, moment: moment.astype(jnp.bfloat16), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **given: Any) -> Any:
        if missing := [name for name in ("random", "step") if name not in given]:
            raise ValueError(f"an optimizer with rounded moments must be given random and step, got no {missing[0]}")
        random, step = given["random"], given["step"]
        key = jax.random.fold_in(jax.random.wrap_key_data(random, impl="threefry2x32"), step)
        wide = _map_moments(lambda _, moment: moment.astype(jnp.float32), state)
        updates, state = inner.update(updates, wide, params)
        return updates, _map_moments(lambda path, moment: rounding(moment, _moment_key(key, path)), state)

    return optax.GradientTransformationExtraArgs(init, update)


def _moment_key(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _map_moments(function: Callable[[str, Array], Array], state: Any) -> Any:
    """Maps a function of path and array over the moments of an optimizer's state; the path begins with their name."""

    def on_leaf(path: tuple[Any, ...], leaf: Array) -> Array:
        names = [getattr(key, "name", None) for key in path]
        begin = next((place for place, name in enumerate(names) if name in MOMENTS), None)
        if begin is None:
            return leaf
        return function(jax.tree_util.keystr(path[begin:], simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(on_leaf, state)
