"""Drafts of prediction layers: by their definition over whole rows, and tokens that are those without drafts."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import compilations, prompt, run, tokens_of
from flax import nnx
from model_cases import model_parts, small_config
from sharded_cases import mesh_of

from dsa_jax import LLM, MTP, Engine, KeyRange, PagedCache, Request, Runner, SamplingParams, generate, save_hf
from dsa_jax.chat.commands import load_llm
from dsa_jax.inference import complete
from dsa_jax.inference.sampling import Settings, draw
from dsa_jax.inference.speculative import Drafted, verify_drafts
from dsa_jax.parallel.sharding import path_names, shards

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(num_nextn_predict_layers=1, first_k_dense_replace=2, max_position_embeddings=256)
SHARED = small_config(
    num_nextn_predict_layers=1, indexer_types=("full", "shared"), first_k_dense_replace=2, max_position_embeddings=256
)
TWO, THREE = (dataclasses.replace(CONFIG, num_nextn_predict_layers=count) for count in (2, 3))
# That meshes split: the first sooner compiled, the others with experts.
HEADS = dataclasses.replace(TWO, num_attention_heads=4)
EXPERTS = small_config(num_nextn_predict_layers=1, num_attention_heads=4, max_position_embeddings=256)
EXPERTS_TWO = dataclasses.replace(EXPERTS, num_nextn_predict_layers=2)
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
            return jnp.concatenate([jnp.broadcast_to(jnp.eye(dim), x[:, dim:].shape), 0.3 * x[:, dim:]], axis=1)
        if names[-2:] == ("enorm", "weight") or names[-2:] == ("norm", "weight"):
            return jnp.ones_like(x)
        return 0.4 * x if names[-1] in ("o_proj", "down_proj") else x

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(weaken, state))


def make(drafter=None, *, config=CONFIG, pages=12, rows=2, mesh=None, **options):
    mesh = None if mesh is None else mesh_of(mesh)
    cache = PagedCache(config, pages, format="float32", mesh=mesh, predicting=drafter is not None)
    runner = Runner(model_of(config), cache, prefill_chunk=32, max_length=256, dense_below=0)
    return Engine(runner, rows=rows, drafter=drafter, **options)


@functools.cache
def lone_engine(config):
    return make(config=config, rows=1, reuse_prefixes=False)


def alone(request, config=CONFIG):
    return run(lone_engine(config), request)[0]


# The definition


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(graph, state, ids, count):
    """The hidden states of every depth in training, [1 + n, 1, T, D], over the first `count` tokens."""
    keys, positions = KeyRange.lengths(count[None], LENGTH), jnp.arange(LENGTH)[None]
    out: Any = nnx.merge(graph, state)(ids, keys=keys, positions=positions, return_predicted=True)
    return jnp.concatenate([out.hidden[None], out.predicted.hidden])


@functools.partial(jax.jit, static_argnums=0)
def predict_row(graph, state, hidden, following, count):
    """The last prediction layer over the first `count` rows, behind the last of them."""
    model = nnx.merge(graph, state)
    keys, positions = KeyRange.lengths(count[None], LENGTH), jnp.arange(LENGTH)[None]
    depth = model.config.num_nextn_predict_layers
    return model.predict(hidden, following, keys=keys, positions=positions, depth=depth)[0][0, count - 1]


def definition(tokens, most, config):
    """Drafts behind known tokens, without any cache.

    Layer k's is that of training, over the tokens and the drafts before. Behind the last layer, each is one row more of
    this one, of its own output.
    """
    model, depths = model_of(config), config.num_nextn_predict_layers
    parts, drafts, row = nnx.split(model), [], len(tokens) - 2
    states = last = None
    for draft in range(1, most + 1):
        ids = [*tokens, *drafts]
        padded = jnp.asarray(np.pad(ids, (0, LENGTH - len(ids)))[None], jnp.int32)
        if draft <= depths:
            states = hidden_of(*parts, padded, jnp.int32(len(ids)))
            last = states[draft, 0, row]
        else:
            row += 1
            states = states.at[depths - 1, 0, row].set(last)
            last = predict_row(*parts, states[depths - 1], jnp.roll(padded, -depths, axis=1), jnp.int32(row + 1))
        drafts.append(int(jnp.argmax(model.unembed(last))))
    return drafts


class Watched(MTP):
    """Remembers what was drafted behind which tokens."""

    def __init__(self, most=3):
        super().__init__(most)
        self.seen: list[tuple[list[int], list[int]]] = []

    def learn(self, sequence: Any, drafts):
        self.seen.append(([*sequence.prompt.tolist(), *sequence.tokens], drafts))
        super().learn(sequence, drafts)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, marks=pytest.mark.variants),
        TWO,
        pytest.param(THREE, marks=pytest.mark.slow),
        pytest.param(SHARED, marks=pytest.mark.variants),
    ],
    ids=["one", "two", "three", "shared"],
)
def test_drafts_are_those_of_the_definition(config):
    """A prompt of a token more than a chunk, and on into another page, greedy.

    The tokens are the likeliest of the plain forward pass.
    """
    drafter = Watched()
    engine = make(drafter, config=config, rows=1)
    [events] = run(engine, Request(prompt(33), SamplingParams(temperature=0.0, max_tokens=36)))
    assert len(drafter.seen) >= 8
    for known, drafts in drafter.seen:
        assert drafts == definition(known, 3, config), len(known)
    stats, tokens = engine.stats(), tokens_of(events)
    assert 0 < stats.drafts_accepted < stats.drafts_proposed
    padded = np.pad([*prompt(33), *tokens], (0, LENGTH - 69))[None]
    hidden = hidden_of(*nnx.split(model_of(config)), jnp.asarray(padded, jnp.int32), jnp.int32(69))[0]
    assert np.argmax(model_of(config).unembed(hidden[0, 32:68]), axis=-1).tolist() == tokens


# The same tokens


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(CONFIG, marks=pytest.mark.variants), THREE], ids=["one", "three"])
def test_tokens_are_those_without_drafts(config):
    """Greedy and sampled rows side by side, and one that takes no drafts; some are right."""
    asked = [
        Request(prompt(30, 1), SamplingParams(temperature=0.0, max_tokens=45)),
        Request(prompt(60, 2), SamplingParams(temperature=0.8, top_k=20, seed=5, max_tokens=45)),
        Request(prompt(9, 3), SamplingParams(temperature=0.5, top_k=20, seed=6, max_tokens=20, frequency_penalty=0.5)),
    ]
    drafter = Watched()
    engine = make(drafter, config=config)
    found = run(engine, *asked)
    for request, events in zip(asked, found, strict=True):
        expected = alone(request, config)
        assert tokens_of(events) == tokens_of(expected)
        log_probs = [[event.log_prob for event in each if event.token is not None] for each in (events, expected)]
        np.testing.assert_allclose(*log_probs, atol=1e-5)
    stats = engine.stats()
    assert stats.drafts_accepted > 20 and stats.drafts_proposed > stats.drafts_accepted
    greedy = [(known, drafts) for known, drafts in drafter.seen if known[:30] == prompt(30, 1)]
    assert len(greedy) > 5
    for known, drafts in greedy:  # whatever rows are beside it
        assert drafts == definition(known, 3, config), len(known)


FEW_PAGES = [
    pytest.param(None, CONFIG, marks=pytest.mark.variants, id="one"),
    pytest.param(None, TWO, id="two"),
    pytest.param("data=2", TWO, marks=pytest.mark.meshes, id="mesh"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "config"), FEW_PAGES)
def test_few_pages_prefixes_and_cancels_change_no_token(mesh, config):
    """Preempted sequences draft again when their prompts are read again; a prefix keeps its entries."""
    same = prompt(70, 4)
    params = [SamplingParams(temperature=0.6 * (row % 2), seed=row, top_k=20, max_tokens=70) for row in range(5)]
    asked = [Request([*same, *prompt(3, row)], own) for row, own in enumerate(params)]
    engine = make(MTP(most=2), config=config, pages=4, rows=3 if mesh is None else 4, mesh=mesh)
    found = run(engine, *asked, cancels=[(9, 4)])
    assert engine.scheduler.preemptions and engine.prefix.hits and engine.stats().drafts_accepted > 20
    for request, events in zip(asked, found, strict=True):
        tokens = tokens_of(events)
        assert tokens == tokens_of(alone(request, config))[: len(tokens)]
        assert len(tokens) == 70 or events[-1].finished == "cancelled"


@pytest.mark.slow
def test_shared_selections_over_pages_in_fp8():
    """Greedy tokens, with drafts and without, are those over float32 pages up to the first that FP8 could turn."""
    config = dataclasses.replace(SHARED, index_fp8=True)
    prompts, new = [prompt(30 + row, row) for row in range(8)], 20

    def continued(cache_format, drafter=None):
        options: dict[str, Any] = dict(pages=2, rows=1, max_length=128, prefill_chunk=64)
        llm = LLM(model_of(config), cache_format=cache_format, drafter=drafter, **options)
        results = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=new))
        return [result.outputs[0] for result in results], llm.engine

    wide, _ = continued("float32")
    (narrow, _), (drafted, engine) = continued("fp8"), continued("fp8", MTP())
    assert engine.cache.latents.dtype == jnp.uint8 and engine.stats().drafts_accepted > 20
    assert engine.cache.latents.shape[0] == 3 and engine.cache.index_keys.shape[0] == 2  # the prediction layer's too
    compared, rounded = 0, 0.0
    for text, *outputs in zip(prompts, wide, narrow, drafted, strict=True):
        ids = [*text, *outputs[0].tokens]
        padded = jnp.asarray(np.pad(ids, (0, LENGTH - len(ids)))[None], jnp.int32)
        hidden = hidden_of(*nnx.split(model_of(config)), padded, jnp.int32(len(ids)))[0, 0]
        first, second = np.sort(model_of(config).unembed(hidden[len(text) - 1 : len(ids) - 1]), axis=-1)[:, :-3:-1].T
        clear = next((at for at, gap in enumerate(first - second) if gap < 0.1), new)
        compared += clear
        for found in outputs[1:]:
            assert found.tokens[:clear] == outputs[0].tokens[:clear]
            difference = np.abs(np.subtract(found.log_probs, outputs[0].log_probs))[:clear].max(initial=0)
            assert difference < 0.05
            rounded = max(rounded, difference)
    assert compared > 20 and rounded > 1e-4, "FP8 rounds"


ROWS = [prompt(20, 1), prompt(30, 2)]
DRAWN: dict[str, Any] = dict(max_new_tokens=18, temperature=[0.0, 0.7], top_k=20, seed=3)


@pytest.mark.slow
def test_generate_drafts_the_same_tokens():
    """Rows that stop early, by a token, and rows that do not; both ends within drafts."""
    model = model_of(HEADS)
    free = complete(model, ROWS, **DRAWN)
    stop = int(free.tokens[0, 6])
    for stops in (None, stop):
        expected = complete(model, ROWS, stop_token=stops, **DRAWN)
        found = complete(model, ROWS, stop_token=stops, drafts=3, **DRAWN)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.lengths, expected.lengths)
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
        assert found.finished == expected.finished


def served(mesh, config, counts):
    """Has an engine draft the same rows, by the programs of `generate`; returns tokens, all drafts and their counts."""
    mesh = None if mesh is None else mesh_of(mesh)
    row_shards = shards(mesh, "rows")
    cache = PagedCache(config, max(1, 2 // row_shards), format="float32", mesh=mesh, predicting=True)
    drafter = Watched()
    engine = Engine(Runner(model_of(config), cache, max_length=64), rows=max(2, row_shards), drafter=drafter)
    settings = zip(ROWS, DRAWN["temperature"], counts, strict=True)
    asked = [
        Request(text, SamplingParams(temperature=temperature, top_k=20, seed=3 + row, max_tokens=count))
        for row, (text, temperature, count) in enumerate(settings)
    ]
    tokens = [tokens_of(events) for events in run(engine, *asked)]
    return tokens, sorted(drafter.seen), (engine.stats().drafts_proposed, engine.stats().drafts_accepted)


MESHES = {
    "data-one": ("data=2", EXPERTS),
    "data-two": ("data=2", EXPERTS_TWO),
    "expert-one": ("expert=2", EXPERTS),
    "expert-two": ("expert=2", EXPERTS_TWO),
    "tensor-one": ("data=2,tensor=2", EXPERTS),
    "tensor-two": ("data=2,tensor=2", EXPERTS_TWO),
    "all-two": ("data=2,expert=2,tensor=2", EXPERTS_TWO),
}
MARKED = [pytest.param(*case, marks=pytest.mark.meshes, id=name) for name, case in MESHES.items()]


@pytest.mark.parametrize(("mesh", "config"), [pytest.param("data=2,tensor=2", HEADS, id="heads-two"), *MARKED])
def test_a_mesh_drafts_as_one_device(mesh, config):
    """A greedy row on one shard and a sampled one on another: the same tokens, and the same drafts behind each."""
    expected = complete(model_of(config), ROWS, drafts=3, **DRAWN)
    found = complete(model_of(config), ROWS, drafts=3, mesh=mesh_of(mesh), **DRAWN)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
    counts = 12, 16
    alone, meshed = (served(each, config, counts) for each in (None, mesh))
    assert alone == meshed
    tokens, _, (proposed, accepted) = meshed
    assert tokens == [row[:count].tolist() for row, count in zip(expected.tokens, counts, strict=True)]
    assert 0 < accepted < proposed


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
@pytest.mark.parametrize(("mesh", "config"), [(None, TWO), ("data=2,tensor=2", HEADS)], ids=["alone", "mesh"])
def test_no_program_is_compiled_after_warming_up(mesh, config):
    engine = make(MTP(), config=config, mesh=mesh)
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
    with pytest.raises(ValueError, match="need a model that has some, got num_nextn_predict_layers = 0"):
        PagedCache(plain, 1, format="float32", predicting=True)
    split: dict[str, Any] = dict(mesh=mesh_of("context=2"))
    with pytest.raises(ValueError, match="prediction layers need whole sequences on a shard, got data=1,context=2"):
        generate(model_of(), [[1]], max_new_tokens=2, temperature=0.0, drafts=2, **split)
    cache = PagedCache(CONFIG, 1, format="float32")
    with pytest.raises(ValueError, match=r"drafter MTP needs a Runner over PagedCache\(…, predicting=True\)"):
        Engine(Runner(model_of(), cache, max_length=64), drafter=MTP())
    with pytest.raises(ValueError, match="most must be from 1 to 3, got 4"):
        MTP(most=4)
    with pytest.raises(ValueError, match="drafts must be 0 with batch_invariant and with return_…, got 2"):
        generate(model_of(), [[1]], max_new_tokens=2, temperature=0.0, drafts=2, batch_invariant=True)
    with pytest.raises(ValueError, match="need a model that has some"):
        LLM(nnx.merge(*model_parts(plain)), pages=1, rows=1, drafter=MTP())
