"""Block selection: exact against the definition, whatever the layout; in layers, over caches, on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import (
    FP8,
    array,
    as_numpy,
    causal_range,
    index_inputs,
    integers,
    keys_of,
    poison,
    random_range,
    same_bits,
    scores_of,
    the_first,
    unchecked,
)
from flax import nnx
from model_cases import forward, model_parts, small_config, small_model, tokens
from sharded_cases import mesh_of

from dsa_jax import (
    BlockMLA,
    Cache,
    KeyRange,
    PagedCache,
    Runner,
    SparseMLA,
    forward_on_mesh,
    save_hf,
    select_blocks,
)
from dsa_jax.baselines import blocks as module
from dsa_jax.cache import Pages
from dsa_jax.pallas_kernels import assume_gpu
from dsa_jax.parallel.sharding import spec

pytestmark = pytest.mark.usefixtures("in_a_hurry")

CONFIG = small_config(baseline="blocks", block_size=4, first_k_dense_replace=2, num_attention_heads=4)
TOKENS = dataclasses.replace(CONFIG, baseline="none")
INF, NAN = np.inf, np.nan


@functools.partial(jax.jit, static_argnums=(4, 5))
def blocks_of(q, k, w, keys, count, block_size, k_scale=None):
    """`select_blocks`, compiled once a shape."""
    return select_blocks(q, k, w, keys, k=count, block_size=block_size, k_scale=k_scale)


def expected_blocks(q, k, w, keys, count, block_size, k_scale=None):
    rows = reference.reachable(keys.start, keys.stop, k.shape[1])
    scores = reference.index_scores(q, k, w, rows, k_scale).astype(np.float32)
    return reference.select_blocks(scores, count, rows, block_size)


def of_row(row, k, block_size, start=0, stop=None):
    """The selection of one query whose scores are `row`."""
    row = np.asarray(row, np.float32)
    keys = KeyRange(array([[start]]), array([[len(row) if stop is None else stop]]))
    # I = 1 · relu(x) - 1 · relu(-x) = x, for q = (1, -1), k = x and w = (1, -1)
    q, w = array([[[[1.0], [-1.0]]]]), array([[[1.0, -1.0]]])
    return np.asarray(blocks_of(q, array(row[None, :, None]), w, keys, k, block_size))[0, 0].tolist()


@pytest.mark.parametrize(
    ("row", "k", "block_size", "reach", "expected"),
    [
        ([1, 5, 2, 3, 4, 0], 2, 2, (0, 6), [0, 1]),  # the block of the best key, its other key with it
        ([1, 5, 2, 3, 4, 0], 4, 2, (0, 6), [0, 1, 4, 5]),
        ([1, 5, 2, 3, 4], 4, 2, (0, 5), [0, 1, 4, -1]),  # the last block is half there
        ([1, 5, 2, 3, 4, 9], 4, 2, (0, 5), [0, 1, 4, -1]),  # or half in reach
        ([1, 5, 2, 3, 4, 0], 4, 2, (1, 6), [1, 4, 5, -1]),  # and so may the first one be
        ([9, 1, 2, 3, 4, 0], 2, 2, (1, 6), [4, 5]),  # what is out of reach does not count
        ([3, 3, 3, 3, 3, 3], 2, 2, (0, 6), [0, 1]),  # ties: the lowest block
        ([0, 2, 2, 0, 1, 2], 4, 2, (0, 6), [0, 1, 2, 3]),
        ([-0.0, 0.0, 0.0, 0.0], 2, 2, (0, 4), [0, 1]),  # -0.0 equals +0.0
        ([-1, -2, -3, -4], 2, 2, (0, 4), [0, 1]),
        ([NAN, NAN, 1, NAN], 4, 2, (0, 4), [2, 3, -1, -1]),  # NaN counts for nothing
        ([1, 2, 3], 8, 4, (0, 3), [0, 1, 2, *[-1] * 5]),  # k may exceed S, and a block too
        ([1, 2, 3], 2, 2, (2, 2), [-1, -1]),
    ],
)
def test_literal_rows(row, k, block_size, reach, expected):
    assert of_row(row, k, block_size, *reach) == expected


@pytest.mark.parametrize(
    ("t", "s", "count", "block_size", "dtype"),
    the_first(
        3,
        [
            (9, 21, 6, 3, "float32"),
            (65, 130, 16, 8, "bfloat16"),  # in many blocks of queries, the last of which overlaps
            (4, 21, 16, 8, FP8),
            (5, 200, 128, 64, "float32"),
            (65, 130, 64, 64, "float32"),
        ],
    ),
)
def test_integer_scores_are_selected_exactly(t, s, count, block_size, dtype, monkeypatch):
    """Integer scores are exact in any order and full of ties, so the selection must be the definition's."""
    monkeypatch.setattr(module, "SCORES", 6000)
    q, k, w = integers(0, 2, t, 4, 4, dtype=dtype), integers(1, 2, s, 4, dtype=dtype), integers(2, 2, t, 4)
    for keys in (causal_range(2, t, s - t), random_range(3, 2, t, s)):
        selected = blocks_of(q, k, w, keys, count, block_size)
        same_bits(selected, expected_blocks(q, k, w, keys, count, block_size))


def test_blocks_of_one_key_are_the_best_keys_and_all_blocks_are_all_keys():
    q, k, w, scale = index_inputs(3, 2, 33, 70, 4, 16, FP8)
    keys = random_range(8, 2, 33, 70)
    same_bits(blocks_of(q, k, w, keys, 12, 1, scale), keys_of(q, k, w, keys, 12, scale))
    same_bits(blocks_of(q, k, w, keys, 72, 8, scale), keys_of(q, k, w, keys, 72, scale))
    scores = np.asarray(scores_of(q, k, w, keys, scale))
    rows = reference.reachable(keys.start, keys.stop, 70)
    same_bits(blocks_of(q, k, w, keys, 24, 8, scale), reference.select_blocks(scores, 24, rows, 8))


def test_edges_of_a_range_may_lie_anywhere():
    """Outside of the keys and at the ends of int32."""
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    edges = np.array(
        [(low, high), (-3, 5), (5, high), (low, 0), (high, low), (high, high), (7, 200), (11, 3)], np.int32
    )
    keys = KeyRange(array(edges[None, :, 0]), array(edges[None, :, 1]))
    q, k, w = integers(0, 1, 8, 2, 4), integers(1, 1, 19, 4), integers(2, 1, 8, 2)
    same_bits(blocks_of(q, k, w, keys, 8, 4), expected_blocks(q, k, w, keys, 8, 4))


def test_nan_of_keys_that_nobody_reaches_changes_nothing():
    q, k, w, _ = index_inputs(0, 1, 6, 30, 2, 8)
    keys = KeyRange(array(np.full((1, 6), 5)), array(np.full((1, 6), 27)))
    outside = ~((np.arange(30) >= 5) & (np.arange(30) < 27))[None]
    same_bits(blocks_of(q, poison(k, outside), w, keys, 8, 4), blocks_of(q, k, w, keys, 8, 4))


def test_a_selection_is_a_constant_to_gradients():
    q, k, w, _ = index_inputs(0, 1, 3, 9, 2, 8)
    total = lambda q, k, w: select_blocks(q, k, w, KeyRange.causal(1, 3), k=4, block_size=2).astype(jnp.float32).sum()
    assert not any(np.any(x) for x in jax.jit(jax.grad(total, (0, 1, 2)))(q, k, w))


@pytest.mark.parametrize(
    ("k", "block_size", "words"),
    [
        (8, 3, "block_size must divide k = 8, got 3"),
        (8, 16, "block_size must divide k = 8, got 16"),
        (8, 0, "block_size must be an integer of at least 1 .*, got 0"),
        (8, 2.0, "block_size must be an integer of at least 1 .*, got 2.0"),
        (0, 1, "k must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(k, block_size, words):
    with pytest.raises(ValueError, match=words):
        select_blocks(*index_inputs(0, 1, 2, 8, 2, 8)[:3], causal_range(1, 2), k=k, block_size=block_size)


def test_a_kernel_that_is_insisted_on_and_shapes_that_do_not_fit_are_named():
    arrays, options = (*index_inputs(0, 1, 2, 8, 2, 8)[:3], causal_range(1, 2)), dict(k=4, block_size=2)
    with pytest.raises(ValueError, match="index_scores .*kernel"):
        select_blocks(*arrays, **options, implementation="pallas")
    with unchecked(), pytest.raises(ValueError, match="weights must be"):
        select_blocks(*arrays[:2], np.asarray(arrays[2])[:, :1], arrays[3], **options)


def test_on_hopper_the_kernels_score_and_select():
    shape = jax.ShapeDtypeStruct
    edge = shape((1, 2048), jnp.int32)
    q, k, w = (shape((1, 2048, *x), jnp.bfloat16) for x in ((64, 128), (128,), (64,)))
    with assume_gpu("9.0"):
        traced = jax.jit(lambda *x: select_blocks(*x, k=2048, block_size=64)).trace(q, k, w, KeyRange(edge, edge))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert all(f"operation={name}" in str(traced.jaxpr) for name in ("index_scores", "select_topk"))


# In a model

PACKED = KeyRange.packed(array([[0] * 24, [0] * 9 + [1] * 11 + [-1] * 4]))


@pytest.fixture(scope="module")
def whole():
    """Tokens, and the model over them in packed documents with padding."""
    ids = tokens(2, 24)
    return ids, *forward(CONFIG, ids, keys=PACKED)


def test_the_config_chooses():
    blocks, keys = (next(small_model(config).layers()).self_attn for config in (CONFIG, TOKENS))
    assert type(blocks) is BlockMLA and type(keys) is SparseMLA
    jax.tree.map(same_bits, model_parts(CONFIG)[1], model_parts(TOKENS)[1])  # the same parameters


def test_a_model_attends_to_blocks_and_learns_from_them(whole):
    """It is the model that selects keys, with the blocks imposed on it: in its output and in its divergence."""
    ids, out, logits = whole
    same, same_logits = forward(TOKENS, ids, keys=PACKED, selected=out.selected)
    np.testing.assert_allclose(logits, same_logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.indexer_kl, same.indexer_kl, rtol=1e-5, atol=1e-6)
    kl = np.asarray(out.indexer_kl)
    assert kl.min((1, 2)).min() >= -1e-6 and kl.mean((1, 2)).min() > 0.01
    maps = small_model(CONFIG).attention_maps(ids, 0, keys=PACKED)
    rows = reference.reachable(PACKED.start, PACKED.stop, 24)
    selected = np.asarray(out.selected)[0]
    same_bits(selected, reference.select_blocks(maps.index_scores, CONFIG.index_topk, rows, 4))
    same_bits(maps.selected, selected)


def test_the_indexer_learns_through_the_blocks():
    graph, state = model_parts(CONFIG)

    @jax.jit
    def gradients(state):
        return jax.grad(lambda state: nnx.merge(graph, state)(tokens(1, 20)).indexer_kl.sum())(state)

    found = as_numpy(gradients(state)["dense_layers"]["self_attn"])
    assert all(np.any(x) for x in jax.tree.leaves(found["indexer"])) and not np.any(found["q_b_proj"][...])


def test_a_short_sequence_has_no_wider_selection():
    selected = np.asarray(forward(CONFIG, tokens(1, 3))[0].selected)
    assert selected.shape[-1] == 3 and selected[0, 0].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2]]


def test_prefill_and_decode_over_a_cache_equal_the_whole():
    ids = tokens(2, 24)
    out, logits = forward(CONFIG, ids)
    cache = Cache.empty(CONFIG, 2, 30)
    for first, last in ((0, 22), (22, 24)):
        part, found = forward(CONFIG, ids[:, first:last], cache=cache)
        cache = part.cache
        same_bits(part.selected, out.selected[:, :, first:last])
        np.testing.assert_allclose(found, logits[:, first:last], rtol=1e-5, atol=1e-5)


LONG = dataclasses.replace(CONFIG, max_position_embeddings=256)


def test_pages_hold_blocks_of_their_own_sequence():
    """Two prompts packed in a row and decoded beside each other select as each does alone."""
    runner = Runner(small_model(LONG), PagedCache(LONG, 8, format="float32"), return_selected=True)
    prompts = [np.asarray(tokens(1, length, seed=length))[0] for length in (70, 21)]
    sequences = [runner.cache.new() for _ in prompts]
    found = runner.prefill(sequences, prompts)
    for row, prompt in enumerate(prompts):
        out, logits = forward(LONG, prompt[None], keys=KeyRange.causal(1, len(prompt)))
        np.testing.assert_allclose(found.logits[row], logits[0, -1], atol=1e-5)
        np.testing.assert_array_equal(found.selected[row], out.selected[:, 0])


@pytest.mark.parametrize(
    ("block_size", "words"), [(3, "block_size must divide the 64 tokens of a page, got 3"), (4, "pages are sharded")]
)
def test_pages_that_cannot_are_refused(block_size, words):
    config = dataclasses.replace(CONFIG, index_topk=12, block_size=block_size)
    mesh = mesh_of("context=2" if block_size == 4 else "context=1")
    cache = PagedCache(config, 1, format="float32", mesh=mesh)

    def step(pools, table, zero):
        keys = KeyRange(zero, zero + 1)
        pages = Pages.at(*pools, table, keys, value_dim=config.kv_lora_rank)
        options = dict(keys=keys, positions=zero, cache=pages, return_indexer_kl=False)
        return small_model(config)(zero, **options).hidden

    specs = spec(None, "pool"), spec("rows", "pages"), spec("rows")
    local = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=spec("rows"), check_vma=False)
    arrays = (cache.latents, cache.index_keys), np.zeros((1, 2), np.int32), np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(local, *arrays)


def test_on_a_mesh_it_is_one_devices(whole):
    ids, want, _ = whole
    options = dict(keys=PACKED, return_selected=True, return_indexer_kl=True)
    out = forward_on_mesh(small_model(CONFIG), mesh_of("data=2,context=2"), ids, **options)
    np.testing.assert_array_equal(out.selected, want.selected)
    np.testing.assert_allclose(out.indexer_kl, want.indexer_kl, rtol=1e-4, atol=1e-6)
    valid = np.asarray(PACKED.nonempty())
    np.testing.assert_allclose(np.asarray(out.hidden)[valid], np.asarray(want.hidden)[valid], rtol=2e-4, atol=2e-5)


def test_it_is_not_saved_as_another_model(tmp_path):
    with pytest.raises(ValueError, match="no key for baseline='blocks'"):
        save_hf(small_model(CONFIG), tmp_path / "model")
    assert not (tmp_path / "model").exists()
