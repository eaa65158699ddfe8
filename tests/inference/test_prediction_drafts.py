"""Drafts of prediction layers: by their definition over whole rows, and tokens that are those without drafts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import compilations, prompt, run, tokens_of
from flax import nnx
from model_cases import model_parts, small_config

from dsa_jax import LLM, MTP, Engine, KeyRange, PagedCache, Request, Runner, SamplingParams, generate, save_hf
from dsa_jax.chat.commands import load_llm
from dsa_jax.inference import complete
from dsa_jax.inference.sampling import Settings, draw
from dsa_jax.inference.speculative import Drafted, verify_drafts
from dsa_jax.parallel.sharding import path_names

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(num_nextn_predict_layers=1, first_k_dense_replace=2, max_position_embeddings=256)
SHARED = small_config(
    num_nextn_predict_layers=1, indexer_types=("full", "shared"), first_k_dense_replace=2, max_position_embeddings=256
)
LENGTH = 128  # of the rows of the definition


@functools.cache
def model_of(config=CONFIG):
    """A random model whose blocks say little beside the embeddings, and whose prediction layer hands these on.

    So the layer is often right, as a trained one is, and attends and selects all the same.
    """
    graph, state = model_parts(config)
    dim = config.hidden_size

    def weaken(path, x):
        names = path_names(path)
        if names[-1] == "eh_proj":
            return jnp.concatenate([jnp.eye(dim)[None], 0.3 * x[:, dim:]], axis=1)
        if names[-2:] == ("enorm", "weight") or names[-2:] == ("norm", "weight"):
            return jnp.ones_like(x)
        return 0.4 * x if names[-1] in ("o_proj", "down_proj") else x

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(weaken, state))


def make(drafter=None, *, config=CONFIG, pages=12, rows=2, **options):
    cache = PagedCache(config, pages, format="float32", predicting=drafter is not None)
    runner = Runner(model_of(config), cache, prefill_chunk=32, max_length=256, dense_below=0)
    return Engine(runner, rows=rows, drafter=drafter, **options)


@functools.cache
def lone_engine():
    return make(rows=1, reuse_prefixes=False)


def alone(request):
    return run(lone_engine(), request)[0]


# The definition


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(graph, state, ids):
    return nnx.merge(graph, state)(ids).hidden


@functools.partial(jax.jit, static_argnums=0)
def predict_row(graph, state, hidden, following, count):
    """The prediction layer over the first `count` rows, and the likeliest token behind the last."""
    model = nnx.merge(graph, state)
    keys, positions = KeyRange.lengths(count[None], LENGTH), jnp.arange(LENGTH)[None]
    hidden = model.predict(hidden, following, keys=keys, positions=positions)[0]
    last = hidden[0, count - 1]
    return last, jnp.argmax(model.unembed(last))


def definition(tokens, most, config):
    """Drafts behind known tokens, without any cache: each is one row more, of the layer's own output."""
    parts = nnx.split(model_of(config))
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    hidden = hidden_of(*parts, jnp.asarray(padded))
    following, drafts, count = np.roll(padded, -1, axis=1), [], len(tokens) - 1
    for _ in range(most):
        last, draft = predict_row(*parts, hidden, jnp.asarray(following), jnp.int32(count))
        drafts.append(int(draft))
        hidden, following[0, count] = hidden.at[0, count].set(last), draft
        count += 1
    return drafts


class Watched(MTP):
    """Remembers what was drafted behind which tokens."""

    def __init__(self, most=3):
        super().__init__(most)
        self.seen: list[tuple[list[int], list[int]]] = []

    def learn(self, sequence: Any, drafts):
        self.seen.append(([*sequence.prompt.tolist(), *sequence.tokens], drafts))
        super().learn(sequence, drafts)


@pytest.mark.parametrize("config", [CONFIG, pytest.param(SHARED, marks=pytest.mark.variants)], ids=["full", "shared"])
def test_drafts_are_those_of_the_definition(config):
    """A prompt in chunks, and on into another page, greedy: the tokens are the likeliest of the plain forward pass."""
    drafter = Watched()
    engine = make(drafter, config=config, rows=1)
    [events] = run(engine, Request(prompt(64), SamplingParams(temperature=0.0, max_tokens=30)))
    assert len(drafter.seen) >= 8
    for known, drafts in drafter.seen:
        assert drafts == definition(known, 3, config), len(known)
    stats, tokens = engine.stats(), tokens_of(events)
    assert 0 < stats.drafts_accepted < stats.drafts_proposed
    padded = np.pad([*prompt(64), *tokens], (0, LENGTH - 94))[None]
    hidden = hidden_of(*nnx.split(model_of(config)), jnp.asarray(padded, jnp.int32))
    assert np.argmax(model_of(config).unembed(hidden[0, 63:93]), axis=-1).tolist() == tokens


# The same tokens


@pytest.mark.slow
def test_tokens_are_those_without_drafts():
    """Greedy and sampled rows side by side, and one that takes no drafts; some are right."""
    asked = [
        Request(prompt(30, 1), SamplingParams(temperature=0.0, max_tokens=45)),
        Request(prompt(60, 2), SamplingParams(temperature=0.8, top_k=20, seed=5, max_tokens=45)),
        Request(prompt(9, 3), SamplingParams(temperature=0.5, top_k=20, seed=6, max_tokens=20, frequency_penalty=0.5)),
    ]
    drafter = Watched()
    engine = make(drafter)
    found = run(engine, *asked)
    for request, events in zip(asked, found, strict=True):
        expected = alone(request)
        assert tokens_of(events) == tokens_of(expected)
        log_probs = [[event.log_prob for event in each if event.token is not None] for each in (events, expected)]
        np.testing.assert_allclose(*log_probs, atol=1e-5)
    stats = engine.stats()
    assert stats.drafts_accepted > 20 and stats.drafts_proposed > stats.drafts_accepted


@pytest.mark.slow
def test_few_pages_prefixes_and_cancels_change_no_token():
    """Preempted sequences draft again when their prompts are read again; a prefix keeps its entries."""
    same = prompt(70, 4)
    params = [SamplingParams(temperature=0.6 * (row % 2), seed=row, top_k=20, max_tokens=70) for row in range(5)]
    asked = [Request([*same, *prompt(3, row)], own) for row, own in enumerate(params)]
    engine = make(MTP(most=2), pages=4, rows=3)
    found = run(engine, *asked, cancels=[(9, 4)])
    assert engine.scheduler.preemptions and engine.prefix.hits and engine.stats().drafts_accepted > 20
    for request, events in zip(asked, found, strict=True):
        tokens = tokens_of(events)
        assert tokens == tokens_of(alone(request))[: len(tokens)]
        assert len(tokens) == 70 or events[-1].finished == "cancelled"


def test_generate_drafts_the_same_tokens():
    """Rows that stop early, by a token, and rows that do not; both ends within drafts."""
    prompts = [prompt(20, 1), prompt(33, 2)]
    options: dict[str, Any] = dict(max_new_tokens=18, temperature=[0.0, 0.7], top_k=20, seed=3)
    free = complete(model_of(), prompts, **options)
    stop = int(free.tokens[0, 6])
    for stops in (None, stop):
        expected = complete(model_of(), prompts, stop_token=stops, **options)
        found = complete(model_of(), prompts, stop_token=stops, drafts=3, **options)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
        assert found.finished == expected.finished


def test_drafts_and_tokens_have_their_exact_probabilities():
    """Of 40,000 seeds over five tokens: p whatever is drafted, and both alike as often as shared Gumbel noise has it.

    Both argmax(log p + g) and argmax(log q + g) are j with probability 1 / sum_i max(p_i / p_j, q_i / q_j).
    """
    rows, rng = 40_000, np.random.default_rng(0)
    logits, others = rng.normal(size=(2, 5)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (logits, logits + 0.7 * others))
    seeds, zero = np.arange(rows, dtype=np.uint32), np.zeros(rows, np.int32)
    settings = Settings(np.ones(rows, np.float32), np.full(rows, 5), np.ones(rows, np.float32), seeds)
    number = np.full(rows, 4, np.int32)
    draft = np.asarray(draw(jnp.log(jnp.tile(q, (rows, 1))), settings, jnp.asarray(number), kind="random").token)
    behind = np.broadcast_to(np.log(p).astype(np.float32), (rows, 2, 5))
    drafted = Drafted(np.stack([zero, draft], axis=1), np.full(rows, 2), zero, number)
    out = verify_drafts(jnp.asarray(behind), drafted, settings, kind="random")
    token, taken = np.asarray(out.drawn.token).reshape(rows, 2)[:, 0], np.asarray(out.taken)
    np.testing.assert_array_equal(taken, draft == token)
    both = np.array([1 / np.maximum(p / p[j], q / q[j]).sum() for j in range(5)])
    deviations = lambda found, p: (found / rows - p) / np.sqrt(p * (1 - p) / rows)
    assert np.abs(deviations(np.bincount(token, minlength=5), p)).max() < 4
    assert np.abs(deviations(np.bincount(draft, minlength=5), q)).max() < 4
    assert np.abs(deviations(np.bincount(token[taken > 0], minlength=5), both)).max() < 4
    assert both.sum() > np.minimum(p, q).sum() / 1.2  # near what any rule can reach


# Around it


@pytest.mark.slow
def test_no_program_is_compiled_after_warming_up():
    engine = make(MTP())
    engine.warm(kinds=["greedy"])
    asked = [Request(prompt(30, row), SamplingParams(temperature=0.0, max_tokens=12)) for row in range(3)]
    with compilations() as names:
        run(engine, *asked)
    assert not names and engine.stats().drafts_proposed


def test_a_folders_prediction_layers_are_loaded_to_draft_alone(tmp_path):
    save_hf(model_of(), tmp_path / "hf")
    for drafts, count in (("mtp", 1), ("ngram", 0), (None, 0)):
        llm = load_llm(tmp_path / "hf", None, drafts=drafts, pages=2, rows=1)  # pyright: ignore[reportArgumentType]
        cache = llm.engine.cache
        assert cache.config.num_nextn_predict_layers == count and cache.latents.shape[0] == 2 + count


def test_what_cannot_draft_is_refused():
    plain = small_config()
    with pytest.raises(ValueError, match="need a model that has some, on one device, got num_nextn_predict_layers = 0"):
        PagedCache(plain, 1, format="float32", predicting=True)
    cache = PagedCache(CONFIG, 1, format="float32")
    with pytest.raises(ValueError, match=r"drafter MTP needs a Runner over PagedCache\(…, predicting=True\)"):
        Engine(Runner(model_of(), cache, max_length=64), drafter=MTP())
    with pytest.raises(ValueError, match="most must be from 1 to 3, got 4"):
        MTP(most=4)
    with pytest.raises(ValueError, match="drafts must be 0 with batch_invariant and with return_…, got 2"):
        generate(model_of(), [[1]], max_new_tokens=2, temperature=0.0, drafts=2, batch_invariant=True)
    with pytest.raises(ValueError, match="need a model that has some"):
        LLM(nnx.merge(*model_parts(plain)), pages=1, rows=1, drafter=MTP())
