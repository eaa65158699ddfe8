"""The arrays that a decode step of the engine takes from the host and leaves for it, one each.

Every array that goes in or out of a call takes the host tens of microseconds, and a step of four layers lasts two
milliseconds. The last token of each slot stays on the device.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from dsa_jax.inference.sampling import Draw, Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotStep:
    """Holds what a decode step of slots leaves.

    Attributes:
      last: int32 [slots], the last token of each slot.
      drawn: of each row.
      packed: int32 [2, B], what is read of every draw: see `read_draw`.
    """

    last: Array
    drawn: Draw
    packed: Array


def pack_rows(
    slots: Int32[np.ndarray, " B"],
    length: Int32[np.ndarray, " B"],
    number: Int32[np.ndarray, " B"],
    live: np.ndarray,
    settings: Settings,
) -> Int32[np.ndarray, "8 B"]:
    """Packs what the host says of each row: its slot, its length, which token it draws, whether it lives, settings."""
    bits = settings.temperature, settings.top_k, settings.top_p, settings.seed
    return np.stack([slots, length, number, live.astype(np.int32), *(np.asarray(x).view(np.int32) for x in bits)])


def padding_rows(rows: int, slot: int, settings: Settings) -> Int32[np.ndarray, "8 B"]:
    """Packs rows that nobody reads."""
    zero = np.zeros(rows, np.int32)
    return pack_rows(zero + np.int32(slot), zero, zero, zero, settings)


def unpack_rows(packed: Int32[Array, "8 B"]) -> tuple[Array, Array, Array, Array, Settings]:
    """Unpacks slots, lengths, numbers, whether rows live, and settings."""
    slots, length, number, live, temperature, top_k, top_p, seed = packed
    as_float = lambda x: jax.lax.bitcast_convert_type(x, jnp.float32)  # noqa: E731
    settings = Settings(as_float(temperature), top_k, as_float(top_p), jax.lax.bitcast_convert_type(seed, jnp.uint32))
    return slots, length, number, live != 0, settings


def pack_draw(drawn: Draw) -> Int32[Array, "2 B"]:
    """Packs the tokens of a draw, and the bits of their log-probabilities."""
    return jnp.stack([drawn.token, jax.lax.bitcast_convert_type(drawn.log_prob, jnp.int32)])


def read_draw(packed: Array) -> tuple[Int32[np.ndarray, " B"], Float32[np.ndarray, " B"]]:
    """Waits for a packed draw; returns its tokens and their log-probabilities."""
    token, log_prob = np.asarray(packed)
    return token, log_prob.view(np.float32)
