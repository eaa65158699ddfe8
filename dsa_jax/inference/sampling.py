"""Sampling: a token a row from logits, each row by settings and a seed of its own."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Kind = Literal["greedy", "random", "truncated"]  # what a batch needs: argmax, a draw, or a draw of some tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds the settings of a batch of rows, one of each a row.

    Attributes:
      temperature: float32 [B]; 0 takes the likeliest token.
      top_k: int32 [B], how many of the likeliest tokens to draw among; the vocabulary for all.
      top_p: float32 [B], the probability that the tokens to draw among have together, at least.
      seed: uint32 [B]; with the number of the draw it says what is drawn, whatever the other rows are.
    """

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    seed: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Holds what was drawn.

    Attributes:
      token: int32 [B].
      log_prob: float32 [B], of the token under the distribution that it was drawn from, temperature and truncation
        included; where the temperature is 0, under the model's own.
      kept: bool [B, vocab], the tokens that could be drawn.
    """

    token: Array
    log_prob: Array
    kept: Array


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
    rows, vocab = logits.shape
    seeds = jax.random.bits(key, (rows,), jnp.uint32)
    full = lambda value, dtype: jnp.full(rows, value, dtype)  # noqa: E731
    settings = Settings(
        full(temperature, jnp.float32), full(top_k or vocab, jnp.int32), full(top_p, jnp.float32), seeds
    )
    kind = kind_of(np.asarray(temperature), np.asarray(top_k or vocab), np.asarray(top_p), vocab)
    return draw(logits, settings, jnp.zeros(rows, jnp.int32), kind=kind).token


def kind_of(temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, vocab: int) -> Kind:
    """Says what the rows of a batch need, of all of them together."""
    if not np.any(temperature > 0):
        return "greedy"
    return "truncated" if np.any((temperature > 0) & ((top_k < vocab) | (top_p < 1))) else "random"


def draw(
    logits: Float[Array, "B vocab"], settings: Settings, number: Int[Array, " B"], *, kind: Kind = "truncated"
) -> Draw:
    """Draws the `number`-th token of each row.

    What a row draws depends on its own logits, settings, seed and number alone. Settings are traced; what the batch
    needs at most, `kind`, is not: on a GPU a choice within the program has the host wait for the device at every step.
    """
    greedy = settings.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, settings.temperature)[:, None]
    kept = jnp.ones(logits.shape, bool)
    if kind == "truncated":
        truncated = ~greedy & ((settings.top_k < logits.shape[1]) | (settings.top_p < 1))
        kept = _kept(scaled, settings) | ~truncated[:, None]
    allowed = jnp.where(kept, scaled, -jnp.inf)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if kind != "greedy":
        keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(settings.seed, number)
        token = jnp.where(greedy, token, jax.vmap(jax.random.categorical)(keys, allowed).astype(jnp.int32))
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(allowed), token[:, None], axis=-1)[:, 0]
    return Draw(token, log_prob, kept)


def _kept(scaled, settings):
    """Marks the tokens of each row that may be drawn: of equal logits the lowest ids first."""
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = (before < settings.top_p[:, None]).at[:, 0].set(True)  # the likeliest always stays
    keep &= jnp.arange(scaled.shape[1]) < settings.top_k[:, None]
    rows = jnp.arange(scaled.shape[0])[:, None]
    return jnp.zeros(scaled.shape, bool).at[rows, order].set(keep)


def check_sampling(temperature, top_k, top_p, rows: int, vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the settings as one of each a row.

    Raises:
      ValueError: unless these are settings of `sample`, numbers or one for each of `rows` rows.
    """
    values = {"temperature": temperature, "top_k": vocab if top_k is None else top_k, "top_p": top_p}
    dtypes = {"temperature": np.float32, "top_k": np.int64, "top_p": np.float32}
    arrays = {}
    for name, value in values.items():
        array = np.asarray(value)
        if array.shape not in ((), (rows,)) or not np.issubdtype(array.dtype, np.number):
            raise ValueError(f"{name} must be a number, or one for each of the {rows} rows, got {value!r}")
        if name == "top_k" and not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"top_k must be an integer, got {value!r}")
        arrays[name] = np.broadcast_to(array.astype(dtypes[name]), (rows,))
    temperatures, ks, ps = arrays["temperature"], arrays["top_k"], arrays["top_p"]
    for row in range(rows):
        if not 0 <= temperatures[row] < np.inf or not 0 < ps[row] <= 1 or ks[row] < 1:
            raise ValueError(
                "temperature must be at least 0 and finite, top_p in (0, 1], top_k at least 1, "
                f"got {temperatures[row]}, {ps[row]}, {ks[row]} in row {row}"
            )
    return temperatures, np.minimum(ks, vocab).astype(np.int32), ps


def row_seeds(key: Array | None, seed, rows: int) -> np.ndarray:
    """Returns a uint32 seed a row: those that are given, or others for every row from a key.

    Raises:
      ValueError: unless `seed` is an integer or one for each row, or if both are given.
    """
    if seed is not None:
        array = np.asarray(seed)
        if key is not None or array.shape not in ((), (rows,)) or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"give key, or seed as an integer or one for each of the {rows} rows, got {seed!r}")
        if array.shape == ():
            return (int(array) + np.arange(rows, dtype=np.uint64)).astype(np.uint32)
        return array.astype(np.uint64).astype(np.uint32)
    return np.asarray(jax.random.bits(jax.random.key(0) if key is None else key, (rows,), jnp.uint32))
