"""The forward pass on a mesh gives what one device gives, in the order in which it was asked."""

import chex
import jax
import numpy as np
import pytest
from model_cases import forward, small_config, small_model, tokens
from sharded_cases import mesh_of

from dsa_jax import KeyRange, forward_on_mesh
from dsa_jax.parallel.sharding import spec

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(num_attention_heads=4, first_k_dense_replace=1, index_n_heads=16)


def documents(batch, length):
    """Two packed documents a row, and padding at the end of the last."""
    segments = np.arange(length) // (length * 2 // 3) + np.zeros((batch, 1), int)
    segments[-1, -3:] = -1
    return KeyRange.packed(segments)


@pytest.fixture(scope="module")
def alone():
    inputs, keys = tokens(2, 32), documents(2, 32)
    return inputs, keys, forward(CONFIG, inputs, keys=keys)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,context=2,tensor=2",
        *(pytest.param(mesh, marks=pytest.mark.meshes) for mesh in ("context=4", "tensor=4")),
    ],
)
def test_it_is_one_devices(alone, mesh):
    inputs, keys, (want, logits) = alone
    mesh = mesh_of(mesh)
    wanted: dict = dict(return_selected=True, return_routed=True, return_indexer_kl=True)
    out = forward_on_mesh(small_model(CONFIG), mesh, inputs, keys=keys, **wanted)
    np.testing.assert_array_equal(out.selected, want.selected)
    valid = np.asarray(keys.nonempty())
    np.testing.assert_allclose(np.asarray(out.hidden)[valid], np.asarray(want.hidden)[valid], rtol=2e-4, atol=2e-5)
    chex.assert_trees_all_close(out.indexer_kl, want.indexer_kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(out.expert_load, want.expert_load)
    chex.assert_shape(out.routed, (1, 2, 32, 2))
    replayed = forward_on_mesh(
        small_model(CONFIG), mesh, inputs, keys=keys, selected=want.selected[..., ::-1], routed=out.routed[..., ::-1]
    )
    np.testing.assert_allclose(replayed.hidden, out.hidden, rtol=1e-4, atol=1e-5)
    assert replayed.indexer_kl is None


@pytest.mark.meshes
def test_dense_and_causal_if_nothing_is_said(alone):
    inputs = alone[0]
    want, _ = forward(CONFIG, inputs, attention="dense")
    out = forward_on_mesh(small_model(CONFIG), mesh_of("context=2,tensor=2"), inputs, attention="dense")
    np.testing.assert_allclose(out.hidden, want.hidden, rtol=2e-4, atol=2e-5)
    assert out.selected is None and out.routed is None and out.cache is None


def test_bad_input(alone):
    inputs, model = alone[0], small_model(CONFIG)
    with pytest.raises(ValueError, match="data=4 must divide the batch size 2; nearest that does: 2"):
        forward_on_mesh(model, mesh_of("data=4"), inputs)
    with pytest.raises(ValueError, match="a multiple of 8 \\(two chunks for each of the .*\\), got 30; nearest: 32"):
        forward_on_mesh(model, mesh_of("context=4"), inputs[:, :30])
    with pytest.raises(ValueError, match="tensor=8 must divide num_attention_heads 4; nearest that does: 4"):
        forward_on_mesh(model, mesh_of("tensor=8"), inputs)
    inside = jax.shard_map(model, mesh=mesh_of("tensor=4"), in_specs=spec(), out_specs=spec(), check_vma=False)
    with pytest.raises(ValueError, match="a shard's tokens must be a multiple of the 4 shards .* got 30"):
        inside(inputs[:, :30])
    with pytest.raises(ValueError, match="must have the axes"):
        forward_on_mesh(model, jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), inputs)
