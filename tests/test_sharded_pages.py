"""Pages of a row that are dealt out to shards: positions there and back, and the best keys of all shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, keys_of, normal, same_bits, topk_of
from sharded_cases import mesh_of, whole

from dsa_jax import KeyRange
from dsa_jax.cache import LayerPages, _best_of_all, _own_below, _own_positions, _row_positions
from dsa_jax.paged import PAGE
from dsa_jax.parallel.sharding import spec
from dsa_jax.selection import select_topk

pytestmark = pytest.mark.usefixtures("in_a_hurry")

SHARDS, TURNS = 4, 3
SIZE = PAGE * SHARDS * TURNS
MESH = f"context={SHARDS}"
# Of each shard, its positions of the row side by side: pages i, i + 4, i + 8.
OWN = np.arange(SIZE).reshape(TURNS, SHARDS, PAGE).swapaxes(0, 1).reshape(SHARDS, -1)


def of_shards(function, *arguments):
    """Runs a function on every shard, which all get the same, and stacks the results."""

    def stacked(*arguments):
        return jax.tree.map(lambda x: x[None], function(*arguments))

    local = jax.shard_map(stacked, mesh=mesh_of(MESH), in_specs=spec(), out_specs=spec("pages"), check_vma=False)
    return np.asarray(jax.jit(local)(*arguments))


def test_positions_below():
    """Every position, the end of the row, and what is negative: empty ranges may begin anywhere."""
    positions = np.concatenate([np.arange(SIZE + 1), [-1, -SIZE]]).astype(np.int32)
    expected = (OWN[:, None] < positions[:, None]).sum(-1)
    np.testing.assert_array_equal(of_shards(_own_below, positions), expected)


def test_positions_of_the_row_and_back():
    own = np.arange(-1, OWN.shape[1], dtype=np.int32)
    found = of_shards(_row_positions, own)
    np.testing.assert_array_equal(found, np.pad(OWN, ((0, 0), (1, 0)), constant_values=-1))
    positions = np.arange(-2, SIZE, dtype=np.int32)
    expected = np.full((SHARDS, len(positions)), -1)
    for row, mine in zip(expected, OWN, strict=True):
        row[mine + 2] = np.arange(len(mine))
    np.testing.assert_array_equal(of_shards(_own_positions, positions), expected)


def select_of_shards(scores, k):
    """Selects as the shards of a row do: of each its best, of these the best."""

    def select(scores):
        best = select_topk(scores, min(k, scores.shape[-1]))
        scores = jnp.take_along_axis(scores, jnp.maximum(best, 0), axis=-1)
        return _best_of_all(jnp.where(best < 0, -jnp.inf, scores), _row_positions(best), k)

    dealt = spec(None, None, "pages")
    local = jax.shard_map(select, mesh=mesh_of(MESH), in_specs=dealt, out_specs=spec(), check_vma=False)
    return whole(jax.jit(local)(scores[..., OWN.reshape(-1)]))


@pytest.mark.parametrize("k", [1, 40, SIZE // SHARDS + 8])
def test_the_lowest_position_wins_a_tie_across_shards(k):
    """Three scores for 768 keys, so that the last that are taken are equal on every shard."""
    scores = np.random.default_rng(k).integers(0, 3, (2, 5, SIZE)).astype(np.float32)
    scores[0, 1] = 1.0  # all equal: the first k
    scores[0, 2, PAGE:] = -np.inf  # three shards have nothing
    scores[0, 3, 20:] = -np.inf  # fewer than k in all
    scores[0, 4] = -np.inf  # nothing at all
    scores[1, 0, ::2] = np.where(np.arange(SIZE // 2) % 2, -0.0, 0.0)  # equal
    scores[1, 1, 3::7], scores[1, 2, 5::11] = np.nan, np.inf
    same_bits(select_of_shards(scores, k), topk_of(scores, k))
    assert select_of_shards(scores, k)[0, 1].tolist() == list(range(k))


def test_pages_of_shards_select_and_attend_as_pages_of_one():
    """Ranges that begin and end in any page, of which shards may have none; ties, for keys are small integers."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(-1, 2, shape).astype(np.float32)
    q_index, weights, k_index = draw(2, 6, 2, 8), draw(2, 6, 2), draw(2, SIZE, 8)
    q, kv = normal(1, 2, 6, 3, 12), np.asarray(normal(2, 2, SIZE, 12))
    start = np.array([[0, 0, 64, 100, 300, 9], [0, 0, 0, 0, 128, 700]], np.int32)
    stop = np.array([[1, 65, 128, 230, 768, 9], [768, 700, 66, 7, 300, 701]], np.int32)
    keys = KeyRange(array(start), array(stop))
    want = keys_of(q_index, k_index, weights, keys, 40)

    def pages(x):  # each shard's pages of both rows, and shards one after the other
        return x[:, OWN].swapaxes(0, 1).reshape(SHARDS * 2 * TURNS, PAGE, -1)

    table = np.tile(np.arange(2 * TURNS, dtype=np.int32).reshape(2, TURNS), (1, SHARDS))

    def run(latents, index_keys, table, q_index, weights, keys, q):
        layer = LayerPages(latents, index_keys, table, 8)
        assert layer.size == SIZE
        selected = layer.select(q_index, weights, keys, k=40)
        return selected, layer.attend(q, selected, value_dim=8, scale=0.5)

    specs = spec("pages"), spec("pages"), spec(None, "pages"), *[spec()] * 4
    local = jax.shard_map(run, mesh=mesh_of(MESH), in_specs=specs, out_specs=spec(), check_vma=False)
    selected, (out, lse) = jax.jit(local)(pages(kv), pages(k_index), table, q_index, weights, keys, q)
    same_bits(whole(selected), want)
    alone = LayerPages(
        array(kv.reshape(-1, PAGE, 12)),
        array(k_index.reshape(-1, PAGE, 8)),
        jnp.arange(2 * SIZE // PAGE, dtype=jnp.int32).reshape(2, -1),
        8,
    )
    expected = alone.attend(q, want, value_dim=8, scale=0.5)
    np.testing.assert_allclose(whole(out), expected[0], atol=1e-6)
    np.testing.assert_allclose(whole(lse), expected[1], atol=1e-6)
    assert np.all(lse[0, 5] == -np.inf) and not out[0, 5].any()
