"""Native Sparse Attention: its functions against float64 NumPy, and its layer over packed rows."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import nsa_reference
import numpy as np
import pytest
import reference
from cases import close, equations, error, normal, poison, pulled, random_range, same_bits, unchecked
from flax import nnx
from model_cases import forward, model_parts, small_config, small_model, tokens
from sharded_cases import mesh_of

from dsa_jax import Config, KeyRange, NSASizes, generate, save_hf
from dsa_jax.baselines import compress_keys, native_sparse_attention, select_by_entries, span_attention
from dsa_jax.baselines import nsa as module
from dsa_jax.blockwise import BLOCK_ELEMENTS
from dsa_jax.cache import LayerKeys
from dsa_jax.pallas_kernels import assume_gpu
from dsa_jax.parallel.sharding import check_model
from train.evaluation.evaluate import check_selects

SIZES = NSASizes(compression=4, stride=2, block=8, blocks=4, window=6)
B, T, S, N, H, C, U = 2, 40, 61, 3, 10, 7, 5
SCALE = 0.3
pytestmark = pytest.mark.usefixtures("in_a_hurry")
RANGES = {
    "causal": KeyRange.causal(B, T),
    "offset": KeyRange.causal(B, T, offset=jnp.array([S - T, 3])),
    "packed": KeyRange.packed(jnp.array([[0] * 13 + [1] * 27, [0] * 9 + [1] * 20 + [-1] * 11])),
    "any": random_range(3, B, T, S),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Has queries evaluated in several blocks, the last one padded."""
    monkeypatch.setattr("dsa_jax.blockwise.BLOCK_ELEMENTS", 6_000)
    assert BLOCK_ELEMENTS > 6_000


def inputs(seed=0):
    queries = tuple(normal(seed + branch, B, T, N, H) for branch in range(3))
    weights = normal(seed + 4, 4, C), normal(seed + 5, C, U) / 2, normal(seed + 6, U, C) / 2
    return queries, normal(seed + 3, B, S, H), weights


@jax.jit
def attended(queries, kv, weights, keys):
    entries = compress_keys(kv, *weights, sizes=SIZES)
    return entries, native_sparse_attention(queries, kv, entries, keys, sizes=SIZES, value_dim=C, scale=SCALE)


@jax.jit
def attended_in_cache(queries, kv, entries, keys):
    """The same of a store that has each entry at its last stride, and NaN where nobody reaches."""
    room = ((0, 0), (SIZES.compression // SIZES.stride - 1, 0), (0, 0))
    store = LayerKeys(kv, jnp.pad(entries, room, constant_values=jnp.nan), None)
    return module.attend_to_store(queries, store, keys, sizes=SIZES, value_dim=C, scale=SCALE)


def expected(queries, kv, weights, keys):
    """The entries, the lists of each branch, and the blocks."""
    rows = reference.reachable(keys.start, keys.stop, S)
    entries = nsa_reference.compress(kv, *weights, sizes=SIZES)
    blocks = nsa_reference.select_blocks(queries[0], entries, rows, S, SIZES, SCALE)
    lists = (
        nsa_reference.entry_rows(rows, S, SIZES),
        nsa_reference.block_rows(rows, blocks, SIZES),
        nsa_reference.window_rows(rows, SIZES),
    )
    return entries, lists, blocks


@pytest.mark.parametrize("name", RANGES)
def test_values_are_the_definitions(name, small_blocks):
    queries, kv, weights = inputs()
    entries, found = attended(queries, kv, weights, RANGES[name])
    own, lists, blocks = expected(queries, kv, weights, RANGES[name])
    close(entries, own, 1e-5)
    padded = [[[*row, *[-1] * (SIZES.blocks - len(row))] for row in batch] for batch in blocks]
    unread = np.ones((B, S), bool)
    for b, batch in enumerate(reference.reachable(RANGES[name].start, RANGES[name].stop, S)):
        unread[b, np.concatenate(batch).astype(int)] = False
    kept = attended_in_cache(queries, poison(kv, unread), entries, RANGES[name])
    for each in found, kept:
        np.testing.assert_array_equal(each.blocks, padded)
    for branch, keys, q, rows in zip(module.BRANCHES, (own, kv, kv), queries, lists, strict=True):
        attended_to = reference.latent_attention(q, keys, rows, C, SCALE)[0]
        for each in found, kept:
            close(getattr(each, branch), attended_to, 2e-5)


def test_gradients_are_the_definitions(small_blocks):
    queries, kv, weights = inputs(7)
    keys = RANGES["packed"]
    cotangents = {branch: normal(20 + number, B, T, N, C) for number, branch in enumerate(module.BRANCHES)}

    def joined(queries, kv, *weights):
        found = attended(queries, kv, weights, keys)[1]
        return sum(jnp.sum(getattr(found, branch) * cotangent) for branch, cotangent in cotangents.items())

    _, (d_queries, d_kv, *d_weights) = pulled(joined, queries, kv, *weights)
    entries, lists, _ = expected(queries, kv, weights, keys)
    expected_kv, zero = np.zeros(kv.shape), np.zeros((B, T, N))
    for branch, q, rows, d_q in zip(module.BRANCHES, queries, lists, d_queries, strict=True):
        of = entries if branch == "compressed" else kv
        by_q, by_keys = reference.latent_attention_vjp(q, of, rows, C, SCALE, cotangents[branch], zero)
        close(d_q, by_q, 3e-5)
        if branch == "compressed":
            by_keys, *by_weights = nsa_reference.compress_vjp(kv, *weights, sizes=SIZES, d_entries=by_keys)
            for mine, own in zip(d_weights, by_weights, strict=True):
                close(mine, own, 3e-5)
        expected_kv += by_keys
    close(d_kv, expected_kv, 3e-5)


def test_gradients_of_the_reference_are_central_differences():
    sizes = NSASizes(compression=4, stride=2, block=4, blocks=3, window=2)
    arrays = [reference.f64(normal(seed, *shape)) for seed, shape in enumerate([(1, 7, 4), (4, 3), (3, 2), (2, 3)])]
    cotangent = reference.f64(normal(5, 1, 2, 4))
    gradients = nsa_reference.compress_vjp(*arrays, sizes=sizes, d_entries=cotangent)
    for place, gradient in enumerate(gradients):

        def total(x, place=place):
            changed = [x if each == place else array for each, array in enumerate(arrays)]
            return (cotangent * nsa_reference.compress(*changed, sizes=sizes)).sum()

        np.testing.assert_allclose(gradient, reference.central_difference(total, arrays[place]), atol=1e-8)


def test_published_sizes_select_what_is_published():
    """Of 16 blocks of 64 the first and the last two are fixed; a block scores by the entries that share its keys."""
    sizes = NSASizes()
    assert dataclasses.astuple(sizes) == (32, 16, 64, 16, 512)
    size, place = 64 * 40, 64 * 9 + 16 * 3  # an entry that begins with the last stride of block 9 and ends in block 10
    entries = np.zeros((1, (size - 32) // 16 + 1, 1), np.float32)
    entries[0, place // 16] = 50.0
    q, keys = jnp.ones((1, 1, 1, 1)), KeyRange.causal(1, 1, offset=size - 1)
    lse = jnp.asarray(np.log(np.exp(entries.astype(float)).sum(1)), jnp.float32)[:, None]
    select = jax.jit(functools.partial(select_by_entries, size=size, sizes=sizes, scale=1.0))
    blocks = select(q, jnp.asarray(entries), lse, keys)[0, 0].tolist()
    assert len(set(blocks)) == 16 and {0, 9, 10, 38, 39} <= set(blocks)


def test_spans_are_the_positions_that_they_list(small_blocks):
    """Spans out of the keys, past their end and twice the same; a row of nothing; NaN that nobody attends to."""
    q, kv = normal(0, B, T, N, H), normal(1, B, S, H)
    begins = jnp.asarray(np.random.default_rng(2).integers(-3, S + 3, (B, T, 3)), jnp.int32)
    begins = begins.at[0, 0].set(-1).at[:, 5, 1].set(begins[:, 5, 0])
    keys = random_range(5, B, T, S)
    reach = reference.reachable(keys.start, keys.stop, S)
    rows = [
        [
            np.concatenate([row[(row >= begin) & (row < begin + 4)] for begin in own if 0 <= begin])
            if any(0 <= begin for begin in own)
            else np.zeros(0, int)
            for row, own in zip(reach[b], np.asarray(begins)[b], strict=True)
        ]
        for b in range(B)
    ]
    unread = np.ones((B, S), bool)
    for b, batch in enumerate(rows):
        unread[b, np.concatenate(batch).astype(int)] = False
    cotangent = lambda value: (jnp.cos(value[0]), jnp.where(value[1] > -jnp.inf, 0.5, 0.0))
    attend = functools.partial(span_attention, begins=begins, keys=keys, size=4, value_dim=C, scale=SCALE)
    (out, lse), (d_q, d_kv) = pulled(attend, q, poison(kv, unread), cotangent=cotangent)
    own_out, own_lse = reference.latent_attention(q, kv, rows, C, SCALE)
    close(out, own_out, 2e-5)
    close(lse, own_lse, 2e-5)
    d_out, d_lse = cotangent((out, lse))
    own = reference.latent_attention_vjp(q, kv, rows, C, SCALE, d_out, d_lse)
    close(d_q, own[0], 3e-5)
    close(d_kv, own[1], 3e-5)


def on_the_card(q, kv, begins, keys, implementation=None):
    """Values and gradients, of the study's heads and columns."""
    attend = functools.partial(span_attention, size=64, value_dim=256, scale=0.1, implementation=implementation)
    value, pull = jax.vjp(lambda q, kv: attend(q, kv, begins, keys), q, kv)
    return value, pull(jax.tree.map(jnp.sin, value))


def test_on_hopper_the_kernels_take_the_positions():
    shape = jax.ShapeDtypeStruct
    edge: Any = shape((1, 512), jnp.int32)
    q, kv = shape((1, 512, 32, 320), jnp.bfloat16), shape((1, 1024, 320), jnp.bfloat16)
    with assume_gpu("9.0"):
        traced = jax.jit(on_the_card).trace(q, kv, shape((1, 512, 16), jnp.int32), KeyRange(edge, edge))
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") > 2
    found = str(traced.jaxpr)
    assert "operation=span_attention" in found and "operation=the backward of span_attention" in found


@pytest.mark.gpu
def test_on_the_card_they_are_what_xla_gathers():
    """By norm, against float32: what bfloat16 rounds before it is summed over queries shows in single elements."""
    q, kv = normal(0, 1, 512, 32, 320, dtype="bfloat16"), normal(1, 1, 1024, 320, dtype="bfloat16")
    begins = jnp.asarray(np.random.default_rng(2).integers(-1, 16, (1, 512, 16)) * 64, jnp.int32)
    keys = KeyRange.causal(1, 512, offset=512)
    attend = jax.jit(on_the_card, static_argnums=4)
    kernels = attend(q, kv, begins, keys, "pallas")
    exact = attend(q.astype("float32"), kv.astype("float32"), begins, keys, "xla")
    for ours, theirs in zip(jax.tree.leaves(kernels), jax.tree.leaves(exact), strict=True):
        assert error(ours, theirs) < 1e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(stride=3), "nsa stride must divide compression 32 and block 64, got 3"),
        (dict(compression=128), "nsa compression must be at most block 64, got 128"),
        (dict(blocks=2), "nsa blocks must be at least 3, the first and two local ones, got 2"),
        (dict(window=0), "nsa window must be an integer of at least 1, got 0"),
        (dict(block=64.0), "nsa block must be an integer of at least 1, got 64.0"),
    ],
)
def test_sizes_that_cannot_be_are_named(change, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        NSASizes(**change)


def test_arrays_that_do_not_fit_are_named():
    queries, kv, weights = inputs()
    keys, options = RANGES["causal"], cast(Any, dict(value_dim=C, scale=SCALE))
    with unchecked():
        with pytest.raises(ValueError, match="queries must be one of each branch, compressed, selected, window, got 2"):
            native_sparse_attention(queries[:2], kv, kv, keys, sizes=SIZES, **options)
        with pytest.raises(ValueError, match=r"position, up and down must be \[4, C\]"):
            compress_keys(kv, weights[0][:3], *weights[1:], sizes=SIZES)
        with pytest.raises(ValueError, match=r"entries must be \[2, 29, 10\].* got \[2, 28, 10\]"):
            native_sparse_attention(queries, kv, kv[:, :28], keys, sizes=SIZES, **options)
        with pytest.raises(ValueError, match="begins must be signed integers"):
            span_attention(queries[0], kv, jnp.zeros((B, T, 2)), keys, size=4, **options)
    with pytest.raises(ValueError, match="span_attention has no kernel"):
        begins = jnp.zeros((B, T, 1), jnp.int32)
        span_attention(queries[0], kv, begins, keys, size=4, implementation="pallas", **options)


# In a model

CONFIG = small_config(baseline="nsa", nsa=SIZES, first_k_dense_replace=2, max_position_embeddings=256)
PACKED = KeyRange.packed(jnp.array([[0] * 40, [0] * 16 + [1] * 20 + [-1] * 4]))


@pytest.fixture(scope="module")
def whole():
    """Tokens, and the model over them in packed documents with padding."""
    ids = tokens(2, 40)
    return ids, *forward(CONFIG, ids, keys=PACKED)


def test_the_config_chooses_and_there_is_no_indexer():
    layer = next(small_model(CONFIG).layers()).self_attn
    assert type(layer) is module.NativeSparseMLA and layer.indexer is None
    assert not any("indexer" in str(path) for path, _ in jax.tree.leaves_with_path(model_parts(CONFIG)[1]))
    assert CONFIG.num_index_layers == 0


def test_a_layer_is_its_branches_by_its_gates():
    """The first layer against NumPy, from its own projections; all of its parameters learn."""
    ids = tokens(2, 40)
    model = small_model(CONFIG)
    layer = cast(module.NativeSparseMLA, next(model.layers()).self_attn)
    x = normal(3, 2, 40, CONFIG.hidden_size)
    rotation = jnp.ones((2, 40, 4)), jnp.zeros((2, 40, 4))
    graph, state = nnx.split(layer)
    out, (gradients,) = pulled(lambda state: nnx.merge(graph, state)(x, rotation, PACKED).x, state, cotangent=jnp.sin)
    assert all(np.any(each) and np.all(np.isfinite(each)) for each in jax.tree.leaves(gradients))
    p = jax.jit(lambda x: layer.project(x, rotation))(x)
    value_dim, nope = CONFIG.kv_lora_rank, CONFIG.qk_nope_head_dim
    own, rows = layer.compression, reference.reachable(PACKED.start, PACKED.stop, ids.shape[1])
    kv, q = reference.f64(p.kv), reference.f64(p.q)
    entries = nsa_reference.compress(kv, own.position[...], own.up_proj[...], own.down_proj[...], SIZES)
    gates = nsa_reference.sigmoid(
        np.einsum("btd,dng->btng", reference.f64(x), reference.f64(layer.branch_gate[...]))
        + reference.f64(layer.branch_bias[...])
    )
    total, lists = 0.0, None
    for branch, part in enumerate((own, layer, layer.window)):
        weight = reference.f64(part.kv_b_proj[...])
        query = np.concatenate([np.einsum("btnp,cnp->btnc", q[..., :nope], weight[..., :nope]), q[..., nope:]], -1)
        if lists is None:
            blocks = nsa_reference.select_blocks(query, entries, rows, 40, SIZES, CONFIG.softmax_scale)
            lists = (
                nsa_reference.entry_rows(rows, 40, SIZES),
                nsa_reference.block_rows(rows, blocks, SIZES),
                nsa_reference.window_rows(rows, SIZES),
            )
        keys = entries if branch == 0 else kv
        latents = reference.latent_attention(query, keys, lists[branch], value_dim, CONFIG.softmax_scale)[0]
        total += gates[..., branch, None] * np.einsum("btnc,cnv->btnv", latents, weight[..., nope:])
    close(out, np.einsum("btnv,nvd->btd", total, reference.f64(layer.o_proj[...])), 2e-5)


def test_padding_changes_nothing_and_documents_do_not_mix(whole):
    """A document that begins with a block is what it is alone; another's tokens and padding do not reach it."""
    ids, _, logits = whole
    moved = jnp.concatenate([ids[:, 16:], ids[:, :16]], axis=1)
    keys = KeyRange.lengths(jnp.array([20, 20]), 40)
    _, alone = forward(CONFIG, moved, keys=keys)
    np.testing.assert_allclose(logits[1, 16:36], alone[1, :20], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_generation_reads_pages():
    """Greedy tokens are those that the whole forward finds likeliest, prompts packed and of different lengths."""
    prompts = [np.asarray(tokens(1, length, seed=length))[0].tolist() for length in (36, 5)]
    found = np.asarray(generate(small_model(CONFIG), prompts, max_new_tokens=3, temperature=0.0))
    texts = [[*prompt, *new] for prompt, new in zip(prompts, found.tolist(), strict=True)]
    padded = jnp.asarray([text + [0] * (40 - len(text)) for text in texts])
    logits = forward(CONFIG, padded, keys=KeyRange.lengths(jnp.array([len(text) for text in texts]), 40))[1]
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(found[row], np.argmax(logits[row, len(prompt) - 1 : len(prompt) + 2], -1))


def test_nothing_grows_with_both_lengths():
    """Of the gradients of a layer at 64K tokens no array has as many numbers as T · S / 8."""
    length = 2**16
    config = Config.tiny(baseline="nsa", num_hidden_layers=1, dtype="bfloat16", max_position_embeddings=length)
    graph, state = nnx.split(nnx.eval_shape(lambda: module.NativeSparseMLA(config, rngs=nnx.Rngs(0))))
    edge: Any = jax.ShapeDtypeStruct((1, length), jnp.int32)
    angle = jax.ShapeDtypeStruct((1, length, config.qk_rope_head_dim // 2), jnp.float32)
    x = jax.ShapeDtypeStruct((1, length, config.hidden_size), jnp.bfloat16)

    def loss(state, x, angle, keys):
        return jnp.sum(nnx.merge(graph, state)(x, (angle, angle), keys).x.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(state, x, angle, KeyRange(edge, edge))
    made = (each.aval.shape for equation in equations(traced.jaxpr) for each in equation.outvars)
    largest = max(np.prod(shape, dtype=np.int64) for shape in made)
    assert length * config.hidden_size <= largest < length**2 / 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(attention="dense"), "baseline 'nsa' attends by its own three branches alone, got attention='dense'"),
        (dict(selected=jnp.zeros((2, 1, 4, 2), jnp.int32)), "three branches alone, got a selection"),
    ],
)
def test_what_it_cannot_do_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        small_model(CONFIG)(tokens(1, 4), **options)


def test_what_measures_or_keeps_an_indexer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^config.json has no key for baseline='nsa'"):
        save_hf(small_model(CONFIG), tmp_path / "out")
    with pytest.raises(ValueError, match="^selections are measured of a model with an indexer, got baseline 'nsa'"):
        check_selects(CONFIG)
    assert check_selects(dataclasses.replace(CONFIG, baseline="window")) is None


def test_maps_and_meshes_are_refused():
    layer = next(small_model(CONFIG).layers()).self_attn
    with pytest.raises(ValueError, match="no attention maps"):
        angle = jnp.zeros((1, 4, 4))
        layer.attention_maps(jnp.zeros((1, 4, CONFIG.hidden_size)), (angle, angle), KeyRange.causal(1, 4))
    with pytest.raises(ValueError, match="a model of baseline 'nsa' must be on one device, got data=2"):
        check_model(mesh_of("data=2"), CONFIG)
    check_model(mesh_of("data=1"), CONFIG)


def test_selected_keys_come_out(whole):
    _, out, _ = whole
    assert out.selected.shape == (2, 2, 40, SIZES.blocks * SIZES.block)
    row = np.asarray(out.selected[0, 1, 35])
    kept = row[row >= 0]
    assert {16, 17, 35} <= set(kept.tolist()) and kept.min() >= 16
    same_bits(row[: len(kept)], np.sort(kept))
