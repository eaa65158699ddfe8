"""An engine on a mesh: requests come out as on one device, wherever they ran."""

import dataclasses

import numpy as np
import pytest
from engine_cases import CHUNK, compilations, log_probs_of, prompt, run, tokens_of
from model_cases import small_config, small_model
from sharded_cases import mesh_of

from dsa_jax import Engine, NGram, PagedCache, Request, Runner, SamplingParams
from dsa_jax.inference import LLM

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(num_attention_heads=4, moe_intermediate_size=24, max_position_embeddings=256)
SETTINGS = dict(seed=1, top_k=20, n=2), dict(seed=2, repetition_penalty=1.2, frequency_penalty=0.1)


def make(mesh=None, *, rows=4, pages=12, invariant=False, **options) -> Engine:
    cache = PagedCache(CONFIG, pages, format="float32", mesh=None if mesh is None else mesh_of(mesh))
    steps = dict(max_length=256, dense_below=0, batch_invariant=invariant)
    runner = Runner(small_model(CONFIG), cache, prefill_chunk=CHUNK, **steps)
    return Engine(runner, rows=rows, **options)


def same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        for index in {event.index for event in theirs}:
            assert tokens_of(mine, index) == tokens_of(theirs, index)
            np.testing.assert_allclose(log_probs_of(mine, index), log_probs_of(theirs, index), atol=1e-5)


OTHERS = ("data=2,expert=2", 8, False), ("data=2,tensor=4", 4, False), ("data=2", 4, True)
CASES = [("expert=2", 2, False), *(pytest.param(*case, marks=pytest.mark.meshes) for case in OTHERS)]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "rows", "invariant"), CASES)
def test_requests_come_out_as_on_one_device(mesh, rows, invariant):
    """More than there are rows; prefixes are shared, and one is cancelled. With pages for few some are preempted."""
    shapes = [(60, 0, 12), (61, 1, 12), (70, 2, 6), (62, 3, 12), (9, 4, 20), (70, 2, 6), (63, 5, 8)]
    shapes = shapes[2:] if rows == 2 else shapes * 2
    kinds = SETTINGS[:1] if rows == 2 else SETTINGS
    asked = [
        Request(prompt(length, seed), SamplingParams(max_tokens=most, **kinds[place % len(kinds)]))
        for place, (length, seed, most) in enumerate(shapes)
    ]
    engine = make(mesh, rows=rows, pages=3, invariant=invariant)
    found = run(engine, *asked, cancels=[(9, 2)])
    assert found[2][-1].finished == "cancelled"
    assert engine.prefix.hits and engine.stats().pages == 3 * engine.cache.row_shards
    assert engine.scheduler.preemptions or rows == engine.cache.row_shards
    expected = run(make(rows=rows, pages=40, invariant=invariant), *asked)
    same([*found[:2], *found[3:]], [*expected[:2], *expected[3:]])


@pytest.mark.slow
def test_drafts_are_verified_on_a_mesh_and_nothing_is_compiled_after_warming_up():
    asked = [Request((prompt(8, seed) * 5)[:37], SamplingParams(temperature=0.0, max_tokens=40)) for seed in range(3)]
    engine = make("data=2,tensor=2", rows=2, drafter=NGram())
    engine.warm(kinds=["greedy", "truncated"])
    with compilations() as names:
        found = run(engine, *asked)
        run(
            engine,
            *(dataclasses.replace(each, params=SamplingParams(seed=1, top_k=20, max_tokens=9)) for each in asked),
        )
    assert not names
    assert engine.stats().drafts_accepted
    same(found, run(make(), *asked))


@pytest.mark.slow
def test_prompts_are_scored_on_a_mesh():
    params = SamplingParams(max_tokens=0, prompt_logprobs=3)
    asked = [Request(prompt(length, length), params) for length in (70, 5)]
    found, expected = run(make("data=2,tensor=2", rows=2), *asked), run(make(rows=2), *asked)
    for (mine,), (theirs,) in zip(found, expected, strict=True):
        assert [each.token for each in mine.prompt] == [each.token for each in theirs.prompt]
        for one, other in zip(mine.prompt[1:], theirs.prompt[1:], strict=True):
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            np.testing.assert_allclose(one.log_prob, other.log_prob, atol=1e-5)
            np.testing.assert_allclose([x for _, x in one.top], [x for _, x in other.top], atol=1e-5)


def test_meshes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="pages must not be sharded, got data=1,context=2"):
        LLM("no checkpoint is read", pages=4, mesh=mesh_of("context=2"))
    with pytest.raises(ValueError, match="rows must be a multiple of the mesh's 2 shards of rows, got 3"):
        LLM(small_model(CONFIG), pages=4, rows=3, mesh=mesh_of("data=2"))
