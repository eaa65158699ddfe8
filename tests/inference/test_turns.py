"""Turns drawn on the device: what `complete` draws, over several turns in one cache, with what led to each token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import same_bits
from flax import nnx
from model_cases import forward, small_config, small_model
from sharded_cases import mesh_of, place_params

from dsa_jax import OutOfPages, PagedCache, Runner, complete
from dsa_jax.inference.turns import Turns, greedy_settings, row_settings

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(num_attention_heads=4, moe_intermediate_size=24, max_position_embeddings=128)  # K = 8
VOCAB, ROWS, MOST = 64, 4, 6
PROMPTS = [np.random.default_rng(n).integers(64, size=n).astype(np.int32) for n in (5, 21, 12)]
ANSWERS = [np.random.default_rng(n).integers(64, size=n).astype(np.int32) for n in (3, 1, 18)]
SEEDS = np.array([7, 8, 9, 0], np.uint32)


def make(*, pages=12, mesh=None, model=None, stops=(), traced=True, most=MOST) -> Turns:
    model = small_model(CONFIG) if model is None else model
    cache = PagedCache(CONFIG, pages, format="float32", mesh=mesh)
    options = dict(return_selected=traced, return_routed=traced)
    return Turns(Runner(model, cache, max_length=128, **options), most=most, stops=stops)


def settings(top_k=5, temperature=0.8):
    return row_settings(ROWS, VOCAB, temperature=temperature, seeds=SEEDS, top_k=top_k)


def begin(turns, shards=1):
    """The prompts in rows, of which one is padding in the middle."""
    rows = [turns.cache.new(place * shards // ROWS) for place in range(ROWS)]
    turns.cache.free(rows[2])
    rows = [rows[0], rows[1], None, rows[3]]
    return rows, *turns.read(rows, [PROMPTS[0], PROMPTS[1], np.zeros(0), PROMPTS[2]])


@functools.cache
def by_complete(stop=None):
    options = dict(temperature=0.8, top_k=5, seed=SEEDS[[0, 1, 3]], stop_token=stop, dense_below=0)
    wanted = dict(return_selected=True, return_routed=True, return_kept=True)
    return complete(small_model(CONFIG), [x.tolist() for x in PROMPTS], max_new_tokens=MOST, **options, **wanted)


def test_a_turn_is_what_complete_draws():
    turns = make()
    rows, logits, taken = begin(turns)
    drawn = turns.draw(rows, logits, settings(), limit=[MOST] * ROWS, kept=5)
    want = by_complete()
    assert drawn[2] is None and len(set(want.tokens.reshape(-1).tolist())) > 5
    for place, row in enumerate((0, 1, 3)):
        own = drawn[row]
        same_bits(own.tokens, want.tokens[place])
        np.testing.assert_allclose(own.log_probs, want.log_probs[place], atol=1e-5)
        assert [ids.tolist() for ids in own.kept] == [ids.tolist() for ids in want.kept[place]]
        for name in ("selected", "routed"):
            whole = np.concatenate([getattr(taken[row], name), getattr(own.taken, name)], axis=1)
            same_bits(whole.astype(np.int32), getattr(want, name)[place])
        assert turns.cache.length(rows[row]) == len(PROMPTS[place]) + MOST - 1
    turns.cache.check()


def test_rows_stop_and_have_limits_of_their_own():
    free = by_complete().tokens
    stop = int(free[1, 2])
    want = by_complete(stop)
    turns = make(stops=(stop,), traced=False)
    rows, logits, taken = begin(turns)
    assert taken[0].selected is None and taken[0].routed is None
    limit = np.array([2, MOST, 1, 1])
    drawn = turns.draw(rows, logits, settings(), limit=limit)
    for place, row in enumerate((0, 1, 3)):
        n = min(int(want.lengths[place]), int(limit[row]))
        same_bits(drawn[row].tokens, want.tokens[place, :n])
        assert drawn[row].kept is None and drawn[row].taken.selected is None
    assert drawn[1].tokens[-1] == stop and len(drawn[1].tokens) < MOST and len(drawn[3].tokens) == 1


def play(turns, shards=1):
    """Two turns with answers between them; returns of each row its tokens, log-probabilities and what was chosen."""
    rows, logits, taken = begin(turns, shards)
    first = turns.draw(rows, logits, settings(), limit=[3, MOST, 1, 4], kept=5)
    answers = [None if own is None else np.append(own.tokens[-1:], each) for own, each in zip(
        first, [*ANSWERS[:2], None, ANSWERS[2]], strict=True)]  # fmt: skip
    logits, read = turns.read(rows, answers)
    number = [0 if own is None else len(own.tokens) for own in first]
    second = turns.draw(rows, logits, settings(), limit=[MOST] * ROWS, number=number, kept=5)
    found = []
    for row, prompt in ((0, PROMPTS[0]), (1, PROMPTS[1]), (3, PROMPTS[2])):
        parts = taken[row], first[row].taken, read[row], second[row].taken
        chosen = [np.concatenate([getattr(each, name) for each in parts], axis=1) for name in ("selected", "routed")]
        ids = np.concatenate([prompt, first[row].tokens[:-1], answers[row], second[row].tokens])
        begins = len(prompt), len(prompt) + len(first[row].tokens) - 1 + len(answers[row])
        found.append((ids, begins, (first[row], second[row]), chosen))
    return found


def test_turns_are_those_of_the_forward_pass():
    """Log-probabilities, selections, routes and kept sets of two turns in one cache, against the model without one."""
    apart = []
    for ids, begins, turns, (selected, routed) in play(make()):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(ids)] = ids
        out, logits = forward(CONFIG, jnp.asarray(padded))
        n = len(ids) - 1
        same_bits(selected.astype(np.int32), np.asarray(out.selected)[:, 0, :n])
        assert routed.shape == (2, n, 2)
        for begin, turn in zip(begins, turns, strict=True):
            scaled = np.asarray(logits[0, begin - 1 : begin - 1 + len(turn.tokens)], np.float64) / 0.8
            for z, token, log_prob, kept in zip(scaled, turn.tokens, turn.log_probs, turn.kept, strict=True):
                assert token in kept and kept.tolist() == np.sort(np.argsort(-z)[:5]).tolist()
                apart.append(abs(z[token] - np.log(np.exp(z[kept]).sum()) - log_prob))
    assert max(apart) < 1e-5 and np.mean(apart) < 2e-6 and len(apart) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data=2,tensor=2", pytest.param("context=2,expert=2", marks=pytest.mark.meshes)])
def test_turns_on_a_mesh(name):
    mesh = mesh_of(name)
    graph, state = nnx.split(small_model(CONFIG))
    turns = make(mesh=mesh, model=nnx.merge(graph, place_params(state, mesh)))
    for own, alone in zip(play(turns, turns.cache.row_shards), play(make()), strict=True):
        same_bits(own[0], alone[0])
        for mine, theirs in zip(own[2], alone[2], strict=True):
            np.testing.assert_allclose(mine.log_probs, theirs.log_probs, atol=1e-5)
        for mine, theirs in zip(own[3], alone[3], strict=True):
            same_bits(mine, theirs)


def test_one_program_draws_turns_of_any_length():
    from engine_cases import compilations

    turns = make()
    rows, logits, _ = begin(turns)
    turns.draw(rows, logits, settings(), limit=[MOST] * ROWS, kept=5)
    with compilations() as names:
        rows, logits, _ = begin(turns)
        turns.draw([rows[0], None, None, None], logits, settings(top_k=3), limit=[2, 1, 1, 1], kept=5)
    assert not {"turn", "prefill"} & set(names), names


def test_too_few_pages_change_nothing():
    turns = make(pages=3, most=64)
    rows, logits, _ = begin(turns)
    before = [turns.cache.length(row) for row in rows if row is not None]
    with pytest.raises(OutOfPages):
        turns.draw(rows, logits, settings(), limit=[64, 64, 1, 64])
    assert [turns.cache.length(row) for row in rows if row is not None] == before
    turns.cache.check()


def test_nan_ends_a_row():
    graph, state = nnx.split(small_model(CONFIG))
    state["lm_head"] = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), state["lm_head"])
    turns = make(model=nnx.merge(graph, state), traced=False)
    rows, logits, _ = begin(turns)
    drawn = turns.draw(rows, logits, greedy_settings(ROWS, VOCAB), limit=[MOST] * ROWS, kind="greedy")
    assert len(drawn[0].tokens) == 1 and np.isnan(drawn[0].log_probs[0])


def test_what_cannot_be_is_refused():
    cache = PagedCache(CONFIG, 2, format="float32")
    with pytest.raises(ValueError, match="give the Runner max_length"):
        Turns(Runner(small_model(CONFIG), cache), most=4, stops=())
    turns = make()
    rows, logits, _ = begin(turns)
    with pytest.raises(ValueError, match="limit must be from 1 to 6 tokens, got 1 to 7"):
        turns.draw(rows, logits, settings(), limit=[7, 1, 1, 1])
    with pytest.raises(ValueError, match="at least one token to read, got none in row 1"):
        turns.read(rows, [PROMPTS[0], PROMPTS[1][:0], None, PROMPTS[2]])
