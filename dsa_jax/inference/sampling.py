"""Sampling: a token a row from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(
    logits: Float[Array, "B vocab"],
    key: Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Array, " B"]:
    """Draws a token a row from softmax(logits / temperature), of the `top_k` likeliest that hold `top_p` of it.

    Args:
      logits: float32 logits of the next token.
      key: a random key, unused if `temperature` is 0.
      temperature: 0 takes the likeliest token.
      top_k: the number of likeliest tokens to draw among; all if None.
      top_p: the probability that the tokens to draw among have together, at least; the likeliest always stays.

    Examples:
      >>> sample(jnp.array([[0.0, 3.0, 1.0]]), jax.random.key(0), temperature=0.0).tolist()
      [1]
    """
    number = float(temperature)
    return sample_traced(logits, key, temperature=number, top_k=top_k or logits.shape[-1], top_p=float(top_p))


def sample_traced(
    logits: Float[Array, "B vocab"],
    key: Array,
    *,
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Int[Array, " B"]:
    """Draws like `sample`, whose settings may be traced here: one program serves all of them."""

    def draw(logits):
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
        probabilities = jax.nn.softmax(ranked)
        keep = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p  # the likeliest always stays
        keep &= jnp.arange(logits.shape[-1]) < top_k
        rank = jax.random.categorical(key, jnp.where(keep, ranked, -jnp.inf))
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(temperature == 0, lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32), draw, logits)


def check_sampling(key: Array | None, temperature: float, top_k: int | None, top_p: float) -> None:
    """Raises ValueError unless these are settings of `sample`."""
    if not temperature >= 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"temperature must be at least 0, top_p in (0, 1], top_k at least 1, got {temperature}, {top_p}, {top_k}"
        )
    if key is None and temperature > 0:
        raise ValueError("sampling needs a random key: pass key=jax.random.key(…), or temperature=0")
