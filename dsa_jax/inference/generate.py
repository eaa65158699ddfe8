"""Generation: the prompt in chunks through the model (prefill), then a token at a time (decode)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dsa_jax.cache import Cache
from dsa_jax.inference.sampling import check_sampling, sample
from dsa_jax.key_range import KeyRange
from dsa_jax.layers import Attention
from dsa_jax.model import Transformer

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
    stop_token: int | None = None,
    attention: Attention = "sparse",
    prefill_chunk: int = PREFILL_CHUNK,
) -> Int[Array, "B max_new_tokens"]:
    """Continues each prompt by `max_new_tokens` tokens.

    Args:
      model: the transformer.
      tokens: prompts, padded on the right to one length.
      max_new_tokens: how many tokens to add to each.
      key: random key, needed unless `temperature` is 0.
      lengths: the real length of each prompt; all of T if None.
      temperature: 0 takes the likeliest token.
      top_k: sample among the k likeliest tokens only.
      top_p: sample among the likeliest tokens that together have this probability.
      stop_token: after this token a row repeats it.
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
    _check(model.config, prompts, real, max_new_tokens, prefill_chunk, stop_token)
    check_sampling(key, temperature, top_k, top_p)
    graph, state = nnx.split(model)
    cache = Cache.empty(model.config, prompts.shape[0], prompts.shape[1] + max_new_tokens)

    last = jnp.zeros((prompts.shape[0], model.config.vocab_size), jnp.float32)
    for begin in range(0, prompts.shape[1], prefill_chunk):
        chunk = jnp.asarray(prompts[:, begin : begin + prefill_chunk], jnp.int32)
        count = jnp.asarray(np.clip(real - begin, 0, chunk.shape[1]), jnp.int32)
        logits, cache = _extend(graph, state, chunk, count, cache, attention=attention)
        last = jnp.where((count > 0)[:, None], logits, last)

    key = jax.random.key(0) if key is None else key
    options = dict(count=max_new_tokens, stop_token=stop_token, attention=attention)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    return _decode(graph, state, last, cache, key, **options, **sampling)


@partial(jax.jit, static_argnums=0, static_argnames="attention", donate_argnums=4)
def _extend(graph, state, tokens, real, cache, *, attention):
    """Appends tokens to the cache; returns the logits after each row's last real token, and the cache."""
    model = nnx.merge(graph, state)
    column = jnp.arange(tokens.shape[1])
    stop = jnp.where(column < real[:, None], cache.lengths[:, None] + column + 1, 0)
    out = model(tokens, keys=KeyRange(jnp.zeros_like(stop), stop), attention=attention, cache=cache)
    last = jnp.take_along_axis(out.hidden, jnp.maximum(real - 1, 0)[:, None, None], axis=1)[:, 0]
    return model.unembed(last), out.cache


@partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("count", "stop_token", "attention", "temperature", "top_k", "top_p"),
)
def _decode(graph, state, logits, cache, key, *, count, stop_token, attention, temperature, top_k, top_p):
    model = nnx.merge(graph, state)

    def step(carry, key):
        logits, cache, done = carry
        token = sample(logits, key, temperature=temperature, top_k=top_k, top_p=top_p)
        if stop_token is not None:
            token = jnp.where(done, stop_token, token)
            done |= token == stop_token
        out = model(token[:, None], attention=attention, cache=cache)
        return (model.unembed(out.hidden[:, 0]), out.cache, done), token

    done = jnp.zeros(logits.shape[0], bool)
    return jax.lax.scan(step, (logits, cache, done), jax.random.split(key, count))[1].T


def _check(config, tokens, lengths, max_new_tokens, prefill_chunk, stop_token):
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
    if stop_token is not None and not 0 <= stop_token < config.vocab_size:
        raise ValueError(f"stop_token must lie in [0, {config.vocab_size}), got {stop_token}")
