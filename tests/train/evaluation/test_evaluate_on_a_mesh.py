"""A mesh measures the same as one device, however the rows are dealt out."""

import jax
import numpy as np
import pytest
from sharded_cases import mesh_of
from train_cases import small_batch, small_config, small_params

from dsa_jax.parallel.sharding import parameter_shardings
from train.evaluation.evaluate import held_out_losses, measure_selections
from train.evaluation.held_out import HeldOut, position_masks
from train.phases import window_selection
from train.state import abstract_params

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(num_attention_heads=4, index_topk=2, num_hidden_layers=1, first_k_dense_replace=0)
GRAPH = abstract_params(CONFIG)[0]


def measure(mesh, held_out):
    """Measures everything: the loss through a window, kept mass and losses of every selection."""
    params = small_params(CONFIG)
    params = jax.device_put(params, None if mesh is None else parameter_shardings(params, mesh))
    other = jax.tree.map(lambda x: x[..., ::-1], params["indexer"])
    window = held_out_losses(GRAPH, params, held_out, attention="sparse", selection=window_selection, mesh=mesh)
    kept, losses = measure_selections(GRAPH, params, held_out, indexers={"other": other}, mesh=mesh)
    return kept, {"window loss": window, **losses}


@pytest.fixture(scope="module")
def held_out():
    """Five rows a batch where a mesh takes two at a time, of packed documents and padding."""
    batches, one = tuple(small_batch(5, 32, seed=seed) for seed in (0, 1)), (small_batch(5, 32, seed=2),)
    return HeldOut({"text": batches, "one": one}, {"text": position_masks(batches)}, {"text": 0.5, "one": 0.5})


@pytest.fixture(scope="module")
def alone(held_out):
    return measure(None, held_out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,context=2,tensor=2",
        *(pytest.param(mesh, marks=pytest.mark.meshes) for mesh in ("data=2,expert=2,tensor=2", "data=8", "context=4")),
    ],
)
def test_it_is_one_devices(alone, held_out, mesh):
    (kept, losses), (want, wanted) = measure(mesh_of(mesh), held_out), alone
    assert kept.k == 2 and kept.queries == want.queries and sum(kept.queries.values()) > 100
    assert list(kept.mass) == list(want.mass) and {"all", "text", "one"} < kept.mass.keys()
    for part, mass in want.mass.items():
        assert list(kept.mass[part]) == list(mass)
        for name, layers in mass.items():
            np.testing.assert_allclose(kept.mass[part][name], layers, rtol=2e-5, err_msg=f"{part}, {name}")
    for name, parts in wanted.items():
        assert losses[name] == pytest.approx(parts, rel=2e-5), name
    assert len({round(parts["all"], 5) for parts in wanted.values()}) == 5  # the window is measured twice


def test_rows_are_dealt_out_whole_and_keep_their_numbers(held_out):
    (first, second), filled = list(held_out.batches())[:2], list(held_out.batches(4))
    assert [len(each.batch.tokens) for each in filled] == [8, 8, 8] and first.rows.tolist() == [0, 1, 2, 3, 4]
    assert [each.rows.tolist() for each in filled] == [[*range(8)], [8, 9, *[0] * 6], [*range(10, 15), 0, 0, 0]]
    np.testing.assert_array_equal(filled[0].batch.tokens[5:], second.batch.tokens[:3])
    for name, mask in second.masks.items():
        np.testing.assert_array_equal(filled[0].masks[name][5:], mask[:3])
    last = filled[1]
    assert not last.batch.valid[2:].any() and not (last.batch.stop > last.batch.start)[2:].any()
    assert not any(mask[2:].any() for mask in last.masks.values())


def test_positions_are_cut_into_ranges_that_double():
    masks = position_masks([small_batch(2, 32)])
    names = ["0 to 0", "1 to 1", "2 to 3", "4 to 7", "8 to 15", "16 to 31"]
    assert list(masks) == [f"positions {name}" for name in names]
    assert (sum(mask.astype(int) for (mask,) in masks.values()) == 1).all()
    assert len(position_masks([small_batch(1, 2048)])) == 8


def test_batches_of_one_part_have_one_shape():
    with pytest.raises(ValueError, match=r"the batches of text must be of one shape, got \[\(2, 16\), \(2, 32\)\]"):
        HeldOut({"text": (small_batch(2, 16), small_batch(2, 32))})
