"""Generation: the prompt in chunks through the model (prefill), then a token at a time (decode)."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dsa_jax.cache import Cache
from dsa_jax.inference.sampling import check_sampling, sample_traced
from dsa_jax.key_range import KeyRange
from dsa_jax.layers import Attention
from dsa_jax.model import Transformer

MIN_BUCKET, MIN_CACHE = 16, 64  # tokens: the least sizes that those of prompts and caches are rounded up to
PREFILL_CHUNK = 4096  # tokens of a prompt at a time: bounds the memory of activations


def generate(
    model: Transformer,
    tokens: Int[Array, "B T"],
    *,
    max_new_tokens: int,
    key: Array | None = None,
    lengths: Int[Array, " B"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_token: int | Sequence[int] | None = None,
    attention: Attention = "sparse",
    prefill_chunk: int = PREFILL_CHUNK,
) -> Int[Array, "B max_new_tokens"]:
    """Continues each prompt by `max_new_tokens` tokens.

    Sizes are rounded up to powers of two before anything is compiled, and settings of the sampling are no part of what
    is compiled: prompts of other lengths, other temperatures or stop tokens take the same program.

    Args:
      model: the transformer.
      tokens: prompts, padded on the right to one length.
      max_new_tokens: how many tokens to add to each.
      key: random key, needed unless `temperature` is 0.
      lengths: the real length of each prompt; all of T if None.
      temperature: 0 takes the likeliest token.
      top_k: sample among the k likeliest tokens only.
      top_p: sample among the likeliest tokens that together have this probability.
      stop_token: after this token, or any of these, a row repeats it.
      attention: "sparse" or "dense".
      prefill_chunk: tokens of the prompt that go through the model at a time.

    Returns:
      the new tokens, without the prompts.

    Examples:
      >>> generate(model, jnp.array([[1, 2, 3]]), max_new_tokens=4, temperature=0.0).shape
      (1, 4)

    Raises:
      ValueError: for ids outside the vocabulary, lengths outside [1, T], or a total longer than the model's positions.
    """
    prompts = np.asarray(tokens)
    real = np.full(prompts.shape[:1], prompts.shape[-1]) if lengths is None else np.asarray(lengths)
    stops = [] if stop_token is None else list(np.atleast_1d(stop_token))
    _check(model.config, prompts, real, max_new_tokens, prefill_chunk, stops)
    check_sampling(key, temperature, top_k, top_p)
    graph, state = nnx.split(model)
    size = min(_bucket(prompts.shape[1] + max_new_tokens, MIN_CACHE), model.config.max_position_embeddings)
    cache = Cache.empty(model.config, prompts.shape[0], size)

    last = jnp.zeros((prompts.shape[0], model.config.vocab_size), jnp.float32)
    for begin in range(0, prompts.shape[1], prefill_chunk):
        chunk = prompts[:, begin : begin + prefill_chunk]
        width = min(_bucket(chunk.shape[1]), prefill_chunk, size)
        count = jnp.asarray(np.clip(real - begin, 0, chunk.shape[1]), jnp.int32)
        padded = jnp.asarray(np.pad(chunk, ((0, 0), (0, width - chunk.shape[1]))), jnp.int32)
        logits, cache = _extend(graph, state, padded, count, cache, attention=attention)
        last = jnp.where((count > 0)[:, None], logits, last)

    keys = jax.random.split(jax.random.key(0) if key is None else key, _bucket(max_new_tokens))
    sampling = dict(temperature=float(temperature), top_k=top_k or model.config.vocab_size, top_p=float(top_p))
    stops = jnp.asarray(np.pad(stops, (0, _bucket(len(stops), 1) - len(stops)), constant_values=-1), jnp.int32)
    out, _ = _decode(graph, state, last, cache, keys, max_new_tokens, stops, sampling, attention=attention)
    return out[:, :max_new_tokens]


def _bucket(size: int, least: int = MIN_BUCKET) -> int:
    """Rounds a size up to a power of two, `least` or more, so that few sizes are compiled."""
    return max(least, 1 << max(size - 1, 0).bit_length())


@partial(jax.jit, static_argnums=0, static_argnames="attention", donate_argnums=4)
def _extend(graph, state, tokens, real, cache, *, attention):
    """Appends tokens to the cache; returns the logits after each row's last real token, and the cache."""
    model = nnx.merge(graph, state)
    column = jnp.arange(tokens.shape[1])
    stop = jnp.where(column < real[:, None], cache.lengths[:, None] + column + 1, 0)
    out = model(
        tokens, keys=KeyRange(jnp.zeros_like(stop), stop), attention=attention, cache=cache, return_indexer_kl=False
    )
    last = jnp.take_along_axis(out.hidden, jnp.maximum(real - 1, 0)[:, None, None], axis=1)[:, 0]
    return model.unembed(last), out.cache


@partial(jax.jit, static_argnums=0, static_argnames="attention", donate_argnums=3)
def _decode(graph, state, logits, cache, keys, count, stops, sampling, *, attention):
    """Draws `count` tokens a row, fewer if all rows have stopped, into a buffer as wide as there are keys."""
    model = nnx.merge(graph, state)

    def goes_on(carry):
        step, *_, stopped, _ = carry
        return (step < count) & ~jnp.all(stopped)

    def draw(carry):
        step, logits, cache, token, stopped, out = carry
        token = jnp.where(stopped, token, sample_traced(logits, keys[step], **sampling))
        out = jnp.where(jnp.arange(out.shape[1]) >= step, token[:, None], out)  # later tokens overwrite it, if any come
        stopped |= jnp.any(token[:, None] == stops, axis=-1)
        result = model(token[:, None], attention=attention, cache=cache, return_indexer_kl=False)
        return step + 1, model.unembed(result.hidden[:, 0]), result.cache, token, stopped, out

    rows = logits.shape[0]
    none = jnp.zeros(rows, jnp.int32)
    carry = jnp.int32(0), logits, cache, none, jnp.zeros(rows, bool), jnp.zeros((rows, len(keys)), jnp.int32)
    _, _, cache, *_, out = jax.lax.while_loop(goes_on, draw, carry)
    return out, cache  # which takes the place of the one that was given


def _check(config, tokens, lengths, max_new_tokens, prefill_chunk, stops):
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or 0 in tokens.shape:
        raise ValueError(f"tokens must be integers [B, T] with at least one token, got {tokens.dtype} {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(f"tokens must lie in [0, {config.vocab_size}), got {tokens.min()} … {tokens.max()}")
    whole = np.issubdtype(lengths.dtype, np.integer)
    if not whole or lengths.shape != tokens.shape[:1] or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths must be [{tokens.shape[0]}] integers from 1 to {tokens.shape[1]}, got {lengths}")
    if max_new_tokens < 1 or prefill_chunk < 1:
        raise ValueError(f"max_new_tokens and prefill_chunk must be at least 1, got {max_new_tokens}, {prefill_chunk}")
    total = tokens.shape[1] + max_new_tokens
    if total > config.max_position_embeddings:
        raise ValueError(
            f"prompt and continuation must fit max_position_embeddings = {config.max_position_embeddings}, "
            f"got {tokens.shape[1]} + {max_new_tokens} = {total}"
        )
    for stop in stops:
        if not isinstance(stop, int | np.integer) or not 0 <= stop < config.vocab_size:
            raise ValueError(f"stop_token must be ids in [0, {config.vocab_size}), got {stop!r}")
