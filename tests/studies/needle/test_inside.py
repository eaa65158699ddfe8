"""Mass by distance and overlap of selections are those of the attention maps of every layer."""

import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import small_config
from train_cases import small_params

from dsa_jax.rope import rotation
from studies.needle.inside import distance_ends, far_queries, look_inside
from train.data import Batch
from train.phases import merge_groups
from train.state import abstract_params

pytestmark = pytest.mark.usefixtures("in_a_hurry")
LENGTH, K = 600, 8


@pytest.mark.slow
def test_it_is_what_the_maps_say():
    config = small_config(index_topk=K, max_position_embeddings=LENGTH)
    model = merge_groups(abstract_params(config)[0], small_params(config))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, size=(2, LENGTH + 1)).astype(np.int32)
    batches = [Batch.from_tokens(row[None, :-1]) for row in tokens]
    places = far_queries(LENGTH, 4 * K, 12)
    found = look_inside(model, [(batch, places) for batch in batches])
    ends = distance_ends(LENGTH)
    assert found.distances == ends == (150, 300, 600) and found.queries == 2 * len(places)
    layers = list(model.layers())
    mass = {name: np.zeros((len(layers), 3)) for name in ("all", "indexer", "window", "oracle")}
    overlap = np.zeros((len(layers), len(layers)))
    for batch in batches:
        x, angles = model.embed(jnp.asarray(batch.tokens)), rotation(jnp.asarray(batch.positions), config)
        chosen = []
        for number, layer in enumerate(layers):
            maps = layer.self_attn.attention_maps(layer.input_layernorm(x), angles, batch.keys, attention="dense")
            p = np.asarray(maps.weights, np.float64)[0].mean(0)
            chosen.append([set(np.asarray(maps.selected)[0, place].tolist()) - {-1} for place in places])
            for place, own in zip(places, chosen[-1], strict=True):
                sets = {"all": range(place + 1), "indexer": own, "window": range(place + 1 - K, place + 1)}
                sets["oracle"] = np.argsort(-p[place, : place + 1], kind="stable")[:K].tolist()
                for name, keys in sets.items():
                    for key in keys:
                        at = next(i for i, end in enumerate(ends) if place - key < end)
                        mass[name][number, at] += p[place, key] / len(places) / 2
            x = layer(x, angles, batch.keys, attention="dense").x
        for a, b in np.ndindex(overlap.shape):
            shares = [len(one & two) / K for one, two in zip(chosen[a], chosen[b], strict=True)]
            overlap[a, b] += np.mean(shares) / 2
    for name, expected in mass.items():
        np.testing.assert_allclose(np.asarray(found.mass[name]), expected, rtol=2e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(found.overlap, overlap, atol=1e-6)
    assert overlap[0, 1] < 1 and mass["indexer"].sum() < mass["oracle"].sum() < mass["all"].sum()


def test_queries_lie_where_there_is_something_to_choose():
    assert far_queries(1000, 400, 3).tolist() == [399, 699, 999]
    assert far_queries(100, 400, 3).tolist() == [50, 74, 99]
    assert len(far_queries(4, 2, 64)) == 3
