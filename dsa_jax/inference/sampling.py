"""Sampling: a token a row from logits, each row by settings and a seed of its own."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsa_jax.inference.params import MAX_LOGPROBS

# What a batch needs: argmax, a draw, a draw of some tokens, or what `Controls` hold as well.
Kind = Literal["greedy", "random", "truncated", "full"]


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
class Rules:
    """Holds how logits are changed, one of each a slot.

    Attributes:
      min_p: float32 [S]; 0 keeps all.
      repetition: float32 [S]; 1 changes nothing.
      presence: float32 [S]; 0 changes nothing.
      frequency: float32 [S]; 0 changes nothing.
      ids: int32 [S, M], tokens whose logits are raised; the vocabulary's size for none.
      values: float32 [S, M], by how much; -inf forbids a token.
      until: int32 [S, M], the number of the first draw that is left alone again.
    """

    min_p: Array | np.ndarray
    repetition: Array | np.ndarray
    presence: Array | np.ndarray
    frequency: Array | np.ndarray
    ids: Array | np.ndarray
    values: Array | np.ndarray
    until: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """Holds which tokens a sequence has, one row a slot.

    Attributes:
      prompt: bool [S, vocab], whether it is in the prompt.
      output: int32 [S, vocab], how often it was drawn.
    """

    prompt: Array | np.ndarray
    output: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """Holds what a draw of kind "full" takes beside `Settings`.

    Attributes:
      rules: of S slots.
      counts: of S slots.
      slots: int32 [B], each row's own.
      mask: uint32 [B, ceil(vocab / 32)], a bit for each token that may be drawn, the lowest bit for the lowest id.
    """

    rules: Rules
    counts: Counts
    slots: Array | np.ndarray
    mask: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Likeliest:
    """Holds log-probabilities under the model's own distribution.

    Attributes:
      log_prob: float32 [B], of the token that was drawn, or that a prompt has.
      ids: int32 [B, L], the likeliest tokens, the likeliest first.
      log_probs: float32 [B, L], theirs.
    """

    log_prob: Array
    ids: Array
    log_probs: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Holds what was drawn.

    Attributes:
      token: int32 [B].
      log_prob: float32 [B], of the token under the distribution that it was drawn from, temperature and truncation
        included; where the temperature is 0, at temperature 1. NaN of logits that are not finite; -inf where no token
        may be drawn.
      kept: bool [B, vocab], the tokens that could be drawn.
      likeliest: for kind "full", else None.
    """

    token: Array
    log_prob: Array
    kept: Array
    likeliest: Likeliest | None = None


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
    logits: Float[Array, "B vocab"],
    settings: Settings,
    number: Int[Array, " B"],
    *,
    kind: Kind = "truncated",
    controls: Controls | None = None,
) -> Draw:
    """Draws the `number`-th token of each row.

    What a row draws depends on its own logits, settings, controls, seed and number alone. Settings are traced; what the
    batch needs at most, `kind`, is not: on a GPU a choice within the program has the host wait for the device at every
    step.
    """
    changed = logits if controls is None else _change(logits, controls, number)
    greedy = settings.temperature == 0
    scaled = changed / jnp.where(greedy, 1.0, settings.temperature)[:, None]
    kept = jnp.ones(logits.shape, bool)
    if kind in ("truncated", "full"):
        truncated = ~greedy & ((settings.top_k < logits.shape[1]) | (settings.top_p < 1))
        kept = _kept(scaled, settings) | ~truncated[:, None]
    if controls is not None:
        kept &= (scaled >= _least(scaled, controls)[:, None]) | greedy[:, None]
        kept &= changed > -jnp.inf
    allowed = jnp.where(kept, scaled, -jnp.inf)
    token = jnp.argmax(changed, axis=-1).astype(jnp.int32)
    if kind != "greedy":
        keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(settings.seed, number)
        token = jnp.where(greedy, token, jax.vmap(jax.random.categorical)(keys, allowed).astype(jnp.int32))
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(allowed), token[:, None], axis=-1)[:, 0]
    if controls is not None:
        log_prob = jnp.where(jnp.any(kept, axis=-1), log_prob, -jnp.inf)
    if kind in ("truncated", "full"):  # where tokens are left out, so might be the ones whose logits are NaN
        log_prob = jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), log_prob, jnp.nan)
    return Draw(token, log_prob, kept, None if controls is None else likeliest(logits, token))


def likeliest(logits: Float[Array, "B vocab"], token: Int[Array, " B"]) -> Likeliest:
    """Tells of a token a row, and of the likeliest ones, how likely they are."""
    log_probs = jax.nn.log_softmax(logits)
    top, ids = jax.lax.top_k(log_probs, min(MAX_LOGPROBS, logits.shape[1]))
    return Likeliest(jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0], ids, top)


def _kept(scaled, settings):
    """Marks the tokens of each row that `top_k` and `top_p` keep: of equal logits the lowest ids first."""
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = (before < settings.top_p[:, None]).at[:, 0].set(True)  # the likeliest always stays
    keep &= jnp.arange(scaled.shape[1]) < settings.top_k[:, None]
    rows = jnp.arange(scaled.shape[0])[:, None]
    return jnp.zeros(scaled.shape, bool).at[rows, order].set(keep)


def _least(scaled, controls):
    """Returns the least logit of each row that `min_p` keeps."""
    return jnp.max(scaled, axis=-1) + jnp.log(controls.rules.min_p[controls.slots])


def _change(logits, controls, number):
    """Applies penalties and biases, and forbids what the mask leaves out."""
    own: Rules = jax.tree.map(lambda x: x[controls.slots], controls.rules)
    prompt, output = controls.counts.prompt[controls.slots], controls.counts.output[controls.slots]
    repetition = jnp.where(prompt | (output > 0), own.repetition[:, None], 1.0)
    changed = jnp.where(logits > 0, logits / repetition, logits * repetition)
    changed -= own.frequency[:, None] * output + own.presence[:, None] * (output > 0)
    rows = jnp.arange(logits.shape[0])[:, None]
    changed = changed.at[rows, own.ids].add(jnp.where(number[:, None] < own.until, own.values, 0.0), mode="drop")
    bits = (controls.mask[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(len(logits), -1)[:, : logits.shape[1]].astype(bool)
    return jnp.where(allowed, changed, -jnp.inf)


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
