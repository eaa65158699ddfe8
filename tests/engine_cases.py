"""Small engines, requests that run to their ends on them, and what came of each."""

import contextlib
import functools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model_cases import forward, small_config, small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsa_jax import PagedCache, Runner
from dsa_jax.inference.engine import Engine
from dsa_jax.inference.params import SamplingParams

CONFIG = small_config(first_k_dense_replace=2, max_position_embeddings=256)
PAGES, CHUNK = 12, 32
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def make(model=None, *, rows=4, pages=PAGES, invariant=False, traced=False, **options) -> Engine:
    model = small_model(CONFIG) if model is None else model
    cache = PagedCache(model.config, pages, format="float32")
    runner = Runner(
        model, cache, prefill_chunk=CHUNK, max_length=256, dense_below=0,
        batch_invariant=invariant, return_selected=traced, return_routed=traced,
    )  # fmt: skip
    return Engine(runner, rows=rows, **options)


def prompt(length, seed=0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


def run(engine, *requests, cancels=()):
    """Runs requests to their ends; returns of each its events, by the numbers that `add` gave."""
    names = [engine.add(request) for request in requests]
    found = {name: [] for name in names}
    steps = 0
    while engine.busy:
        for at, place in cancels:
            if at == steps:
                engine.cancel(names[place])
        for token in engine.step():
            found[token.request].append(token)
        for own in engine.scheduler.running:
            assert engine.cache.length(own.cached) == own.filled, "what was not taken is forgotten"
        steps += 1
        assert steps < 3000, "nothing goes on"
    engine.check()
    assert engine.cache.free_pages + len(engine.prefix) == engine.cache.total_pages
    return [found[name] for name in names]


def tokens_of(events, index=0):
    """The tokens of one continuation, which must have one end, the last."""
    own = [event for event in events if event.index == index]
    assert [event.finished is not None for event in own] == [False] * (len(own) - 1) + [True]
    return [event.token for event in own if event.token is not None]


def log_probs_of(events, index=0):
    return np.float32([event.log_prob for event in events if event.index == index and event.token is not None])


@functools.cache
def lone_engine(invariant=False) -> Engine:
    return make(rows=1, invariant=invariant, reuse_prefixes=False, tokenizer=character_tokenizer())


def alone(request, invariant=False):
    return run(lone_engine(invariant), request)[0]


def log_probs_by_model(tokens, model=None) -> np.ndarray:
    """The model's log-probabilities behind each token, float64 [T, vocab], of up to 112 tokens."""
    padded = np.zeros((1, 112), np.int32)
    padded[0, : len(tokens)] = tokens
    state = None if model is None else nnx.split(model)[1]
    logits = np.asarray(forward(CONFIG, jnp.asarray(padded), state=state)[1][0, : len(tokens)], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


CHARACTERS = '{}[]":,abcdefghijklmnopqrstuvwxyz0123456789 -.'
END = len(CHARACTERS)


@functools.cache
def character_tokenizer() -> Tokenizer:
    """A token for each of a few characters, and one that ends a text."""
    names = {"\u0120" if character == " " else character: place for place, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.BPE(names | {"<end>": END}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


@contextlib.contextmanager
def compilations():
    """Lists the names of the programs that are compiled within, the smallest included."""
    names = []

    def listen(event, seconds, *, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
