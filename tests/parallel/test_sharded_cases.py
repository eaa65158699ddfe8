"""The helpers of tests on meshes: they find forbidden exchanges, and forgive choices at a boundary alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array
from jax.sharding import NamedSharding
from sharded_cases import (
    LAYERS,
    LENGTH,
    NEAR,
    ROWS,
    OneDevice,
    collectives_of,
    compile_on,
    count_flips,
    gathered_layers,
    gathered_scores,
    mesh_config,
    mesh_of,
    near_boundary,
    near_routing,
    place_tokens,
    random_batch,
)

from dsa_jax import select_topk
from dsa_jax.moe import _choose
from dsa_jax.parallel.sharding import RULES, spec
from train.phases import SPARSE


def gathered_by(function, name="context=8"):
    """Lists the exchanges of a function of a shard's tokens [B, t, …] and of stacked parameters."""
    mesh = mesh_of(name)
    tokens, stack = jnp.zeros((2, LENGTH, 4)), jnp.zeros((LAYERS, 16, 8))
    arguments = place_tokens(tokens, mesh), jax.device_put(stack, NamedSharding(mesh, spec(None, "fsdp")))
    return collectives_of(compile_on(mesh, function, *arguments, out=spec()).as_text())


def test_exchanges_that_must_not_be_are_found():
    def scores_of_all(x, _):
        keys = jax.lax.all_gather(x, RULES["sequence"], axis=1, tiled=True)
        scores = jnp.einsum("btd,bsd->bts", x, keys)
        return jax.lax.all_gather(scores, RULES["sequence"], axis=1, tiled=True)

    def layers(x, stack, early):
        gather = lambda w, axis: jax.lax.all_gather(w, RULES["fsdp"], axis=axis, tiled=True)
        stack = gather(stack, 1) if early else stack
        step = lambda x, w: (x + jnp.sum(jnp.sin(w if early else gather(w, 0)) @ jnp.ones(8)), None)
        return jax.lax.psum(jax.lax.scan(step, x, stack)[0], RULES["tokens"])

    found = gathered_by(scores_of_all)
    assert [e.shapes for e in gathered_scores(found, LENGTH // 8)] == [[("f32", (2, LENGTH, LENGTH))]]
    assert len(found) == 2 and not gathered_layers(found)
    early, late = (gathered_by(functools.partial(layers, early=early), "data=2") for early in (True, False))
    assert [(e.kind, e.in_loop, e.shapes) for e in gathered_layers(early)] == [
        ("all-gather", False, [("f32", (LAYERS, 16, 8))])
    ]
    assert not gathered_layers(late)
    assert [(e.in_loop, e.shapes) for e in late if e.kind == "all-gather"] == [(True, [("f32", (16, 8))])]


def test_choices_are_forgiven_at_the_boundary_alone():
    scores = np.array([5.0, 4.0, 3.0, 3.0 - 5e-7, 1.0, -np.inf])
    theirs = np.array([0, 1, 2])
    allowed = {(0, 1, 2): True, (0, 1, 3): True, (0, 2, 3): False, (0, 1, 4): False, (0, 1, -1): True, (0, 1, 5): False}
    for mine, good in allowed.items():
        assert near_boundary(scores, 3, np.array(mine), theirs) == good, mine
    few = np.array([1.0, -np.inf, -np.inf])
    assert near_boundary(few, 2, np.array([0, -1]), np.array([0, -1])), "fewer than k in reach"
    assert not near_boundary(few, 2, np.array([0, 1]), np.array([0, -1]))

    config = mesh_config()  # two of eight experts, out of one of two groups
    router = np.array([0.9, 0.8, 0.1, 0.1, 0.6, 0.5, 0.1, 0.1])
    theirs = np.array([0, 1])
    assert not near_routing(router, config, np.array([4, 5]), theirs)
    assert not near_routing(router, config, np.array([0, 2]), theirs)
    router[4:6] = 0.9, 0.8 + NEAR / 2
    assert near_routing(router, config, np.array([4, 5]), theirs)
    router[:6] = 0.9, 0.8, 0.8 + NEAR / 2, 0.1, 0.6, 0.5
    assert near_routing(router, config, np.array([0, 2]), theirs)
    assert not near_routing(router, config, np.array([1, 2]), theirs)


@pytest.mark.meshes
def test_the_scores_that_are_looked_up_are_those_that_chose():
    one = OneDevice(mesh_config())
    params, batch = one.params, one.batches[0]
    theirs = one.forward(SPARSE, params, batch)[1]
    scores = one.scores(SPARSE, params, batch, {})
    selected = np.stack([select_topk(index, one.config.index_topk, keys=batch.keys) for index, _, _ in scores])
    assert sum(count_flips(one.config, batch, theirs | {"selected": selected}, theirs, lambda: scores)) < 20
    routed = np.stack([_choose(array(router), one.config) for _, router, _ in scores])
    assert sum(count_flips(one.config, batch, theirs | {"routed": routed}, theirs, lambda: scores)) < 20


def test_choices_that_differ_are_counted_once_and_those_that_follow_apart():
    """Off the boundary none may differ, but for what other tokens of the document led to."""
    config, batch = mesh_config(), random_batch(0)
    rng = np.random.default_rng(0)
    index = np.where(batch.keys.mask(LENGTH), rng.normal(size=(ROWS, LENGTH, LENGTH)), -np.inf).astype(np.float32)
    router = rng.uniform(size=(ROWS, LENGTH, 8)).astype(np.float32)
    tied = np.where(np.isfinite(index), 0, index), router, 1.0
    layers = [(index, router, 1.0)] * LAYERS
    theirs = {
        "selected": np.stack([select_topk(index, config.index_topk)] * LAYERS),
        "routed": np.stack([_choose(array(router), config)] * LAYERS),
    }
    assert count_flips(config, batch, theirs, theirs, lambda: None) == (0, 0)
    mine = {kind: chosen.copy() for kind, chosen in theirs.items()}
    row, query = 1, LENGTH // 3 + 20  # late in the second document
    mine["selected"][1, row, query, 0] = np.setdiff1d(np.arange(LENGTH // 3, query), mine["selected"][1, row, query])[0]
    with pytest.raises(AssertionError, match=rf"selected of layer 1 differ off the boundary at \[\[ *{row} +{query}\]"):
        count_flips(config, batch, mine, theirs, lambda: layers)
    layers = [layers[0], tied, layers[2]]
    assert count_flips(config, batch, mine, theirs, lambda: layers) == (1, 0)
    mine["routed"][2, row, query + 1] = (mine["routed"][2, row, query + 1] + 1) % 8
    assert count_flips(config, batch, mine, theirs, lambda: layers) == (1, 1)
    mine["routed"][2, row, 3] = (mine["routed"][2, row, 3] + 1) % 8  # another document
    with pytest.raises(AssertionError, match="routed of layer 2 differ off the boundary"):
        count_flips(config, batch, mine, theirs, lambda: layers)
