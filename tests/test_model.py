"""The model: layouts that must not matter, caches, gradients, and what a compiled pass may contain."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAST, array, as_numpy, causal_range, close, equations, normal, same_bits, the_first, unchecked
from flax import nnx
from model_cases import abstract_parts, forward, model_parts, small_config, small_model, tokens

from dsa_jax import Cache, Config, KeyRange, Transformer, select_topk
from dsa_jax.model import Output
from dsa_jax.rope import rotation

CONFIG = small_config()
FP8 = small_config(index_fp8=True)
lengths_range = jax.jit(KeyRange.lengths, static_argnums=1)
BOTH = pytest.mark.parametrize("attention", the_first(1, ["sparse", "dense"]))
NEAR = 5e-5  # between layouts: what float32 leaves of two orders of summation, through two layers


def at(out: Output, row, columns):
    """Hidden states, KL and selection of some columns of one row."""
    out = as_numpy(out)
    selected = None if out.selected is None else out.selected[:, row, columns]
    return out.hidden[row, columns], out.indexer_kl[:, row, columns], selected


def agree(actual, expected, shift=0):
    """Compares two results of `at`, of which the first's selection lies `shift` keys to the right."""
    close(actual[0], expected[0], NEAR)
    close(actual[1], expected[1], NEAR)
    if expected[2] is not None:
        same_bits(actual[2], np.where(expected[2] >= 0, expected[2] + shift, np.int32(-1)))


# Layouts


@BOTH
def test_packed_sequences_equal_separate_ones(attention):
    ids = np.tile(tokens(1, 32), (2, 1))
    keys = jax.jit(KeyRange.packed)(array([[0] * 20 + [1] * 12, [0] * 32]))
    positions = np.arange(32, dtype=np.int32)[None] - np.asarray(keys.start)
    packed, _ = forward(CONFIG, ids, keys=keys, positions=positions, attention=attention)
    rows = np.stack([ids[0, :20], np.pad(ids[0, 20:], (0, 8), constant_values=9)])
    apart, _ = forward(CONFIG, rows, keys=lengths_range(array([20, 12]), 20), attention=attention)
    agree(at(packed, 0, slice(0, 20)), at(apart, 0, slice(0, 20)))
    agree(at(packed, 0, slice(20, 32)), at(apart, 1, slice(0, 12)), shift=20)
    whole, _ = forward(CONFIG, ids, attention=attention)
    agree(at(packed, 1, slice(None)), at(whole, 1, slice(None)))
    close(packed.expert_load, np.asarray(apart.expert_load) + np.asarray(whole.expert_load) / 2, 0)


@BOTH
def test_padding_on_either_side_changes_nothing(attention):
    """Padding may hold any ids; its KL is zero and no expert counts it."""
    ids, pad = as_numpy((tokens(2, 20), tokens(2, 12, seed=1)))
    plain, _ = forward(CONFIG, ids, attention=attention)
    wide = np.concatenate([pad[:, :5], ids, pad[:, 5:]], 1)
    column = np.arange(32)
    real = (column >= 5) & (column < 25)
    rows = lambda x: array(np.broadcast_to(x, (2, 32)))
    keys = KeyRange(rows(np.where(real, 5, 0)), rows(np.where(real, column + 1, 0)))
    positions = rows(np.maximum(column - 5, 0))
    padded = as_numpy(forward(CONFIG, wide, keys=keys, positions=positions, attention=attention)[0])
    for row in range(2):
        agree(at(padded, row, slice(5, 25)), at(plain, row, slice(None)), shift=5)
    assert not np.any(padded.indexer_kl[..., ~real]) and np.all(np.isfinite(padded.hidden))
    close(padded.expert_load, plain.expert_load, 0)
    assert padded.selected is None or np.all(padded.selected[:, :, ~real] == -1)


def test_expert_load_counts_valid_slots():
    """A batch's load is the sum of its rows', counted one by one from the router's own choice in the first layer."""
    config, ids = small_config(num_hidden_layers=1), tokens(2, 20)
    keys = lengths_range(array([20, 7]), 20)
    load = np.asarray(forward(config, ids, keys=keys)[0].expert_load)
    assert load.shape == (1, 8) and load.dtype == np.float32
    assert load.sum() == (20 + 7) * config.num_experts_per_tok

    @functools.partial(jax.jit, compiler_options=FAST)
    def chosen(ids):
        """Returns the router's choice, given the input of the feed-forward."""
        model = small_model(config)
        layer: Any = next(model.layers())
        turn = rotation(jnp.broadcast_to(jnp.arange(20), (2, 20)), config)
        x = model.embed_tokens[...][ids]
        x = x + layer.self_attn(layer.input_layernorm(x), turn, keys).x
        return layer.mlp.gate(layer.post_attention_layernorm(x))[0]

    experts = np.asarray(chosen(ids))[np.arange(20) < np.array([[20], [7]])]
    assert load[0].tolist() == np.bincount(experts.reshape(-1), minlength=8).tolist()


@pytest.mark.parametrize(
    "changes",
    the_first(
        1,
        [
            dict(num_hidden_layers=3, first_k_dense_replace=1),
            dict(first_k_dense_replace=2, tie_word_embeddings=True),
            dict(n_shared_experts=0),
        ],
    ),
    ids=["both kinds", "dense layers alone, tied", "no shared experts"],
)
def test_the_scan_equals_the_layers_one_by_one(changes):
    config, ids = small_config(**changes), tokens(2, 20)
    out, logits = as_numpy(forward(config, ids))
    assert out.expert_load.shape == (config.num_moe_layers, 8)
    model = small_model(config)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
    def apply(graph, state, x):
        turn = rotation(jnp.broadcast_to(jnp.arange(20), (2, 20)), config)
        return nnx.merge(graph, state)(x, turn, KeyRange.causal(2, 20))

    x, loads = np.asarray(model.embed_tokens[...])[np.asarray(ids)], []
    for number, layer in enumerate(model.layers()):
        one = apply(*nnx.split(layer), x)
        x = one.x
        close(out.indexer_kl[number], one.indexer_kl, NEAR)
        same_bits(out.selected[number], one.selected)
        loads += [] if one.expert_load is None else [one.expert_load]
    close(out.hidden, jax.jit(model.norm)(x), NEAR)
    close(out.expert_load, np.reshape(loads, (-1, 8)), 0)
    head = np.asarray(model.embed_tokens[...]).T if config.tie_word_embeddings else model.lm_head[...]  # pyright: ignore[reportOptionalSubscript]
    close(logits, np.asarray(out.hidden, np.float64) @ np.asarray(head, np.float64), NEAR)
    assert (model.lm_head is None) == config.tie_word_embeddings


# Selections


def test_a_replayed_selection_gives_the_same_output():
    ids = tokens(2, 20)
    first, _ = forward(CONFIG, ids)
    again, _ = forward(CONFIG, ids, selected=first.selected)
    same_bits(again.selected, first.selected)
    close(again.hidden, first.hidden, 2e-6)
    close(again.indexer_kl, first.indexer_kl, 2e-6)
    window = np.arange(20)[:, None] - np.arange(7, -1, -1)
    window = array(np.broadcast_to(np.where(window >= 0, window, -1), (2, 2, 20, 8)))
    imposed, _ = forward(CONFIG, ids, selected=window)
    assert np.abs(np.asarray(imposed.hidden) - np.asarray(first.hidden)).max() > 0.1


def test_sparse_equals_dense_while_every_key_is_selected():
    """The first K tokens, and all of them where K ≥ S."""
    ids = tokens(2, 20)
    dense, _ = as_numpy(forward(CONFIG, ids, attention="dense"))
    sparse, _ = as_numpy(forward(CONFIG, ids))
    close(sparse.hidden[:, :8], dense.hidden[:, :8], NEAR)
    close(sparse.indexer_kl[..., :8], dense.indexer_kl[..., :8], NEAR)
    assert np.abs(sparse.hidden - dense.hidden).max() > 0.1
    whole, _ = forward(small_config(index_topk=24), ids)
    close(whole.hidden, dense.hidden, NEAR)
    close(whole.indexer_kl, dense.indexer_kl, NEAR)


# Cache


@pytest.mark.parametrize(
    ("config", "attention"),
    the_first(1, [(FP8, "sparse"), (CONFIG, "dense"), (CONFIG, "sparse")]),
    ids=["fp8", "dense", "sparse"],
)
def test_prefill_and_decode_equal_one_full_forward(config, attention):
    """Ragged rows, padded on the right: two chunks, one of them empty for the shorter row, then one token at a time."""
    ids, lengths = np.asarray(tokens(2, 20)), np.array([20, 10])
    full, full_logits = forward(config, ids, keys=lengths_range(array(lengths), 20), attention=attention)
    cache = Cache.empty(config, 2, 24)
    prompt = np.array([16, 6])
    for begin in (0, 8):
        real = np.clip(prompt - begin, 0, 8)
        column = np.arange(8)
        stop = array(np.where(column < real[:, None], np.asarray(cache.lengths)[:, None] + column + 1, 0), jnp.int32)
        keys = KeyRange(array(np.zeros((2, 8), np.int32)), stop)
        out, _ = forward(config, ids[:, begin : begin + 8], keys=keys, cache=cache, attention=attention)
        for row in range(2):
            columns = slice(begin, begin + int(real[row]))
            agree(at(out, row, slice(0, int(real[row]))), at(full, row, columns))
        cache = jax.tree.map(jnp.array, out.cache)  # a copy carries everything along
    assert cache.lengths.tolist() == prompt.tolist()
    for step in range(4):
        column = prompt + step
        out, logits = forward(config, ids[np.arange(2), column][:, None], cache=cache, attention=attention)
        for row in range(2):
            agree(at(out, row, slice(None)), at(full, row, slice(column[row], column[row] + 1)))
            close(np.asarray(logits)[row, 0], np.asarray(full_logits)[row, column[row]], NEAR)
        cache = out.cache
    assert cache.lengths.tolist() == lengths.tolist()
    assert cache.k_index.dtype == ("float8_e4m3fn" if config.index_fp8 else "float32")


def test_a_cache_is_never_mutated_and_needs_its_index_keys():
    ids = np.asarray(tokens(2, 20))
    before = Cache.empty(CONFIG, 2, 24)
    filled = forward(CONFIG, ids, cache=before)[0].cache
    assert not any(np.any(leaf) for leaf in as_numpy((before.kv, before.k_index, before.lengths)))
    good, _ = forward(CONFIG, ids[:, :1], cache=filled)
    lost, _ = forward(CONFIG, ids[:, :1], cache=dataclasses.replace(filled, k_index=before.k_index))
    assert np.any(np.asarray(good.selected) != np.asarray(lost.selected))


# Gradients


def gradients(config, attention):
    """Gradients of an LM loss and of the KL, of all parameters, in one program."""
    graph, state = model_parts(config)
    ids = tokens(2, 21)

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(state):
        def losses(state):
            model = nnx.merge(graph, state)
            out = model(ids[:, :-1], attention=attention)
            log_p = jax.nn.log_softmax(model.unembed(out.hidden))
            return -jnp.take_along_axis(log_p, ids[:, 1:, None], -1).mean(), out.indexer_kl.mean((1, 2)).sum()

        _, pull = jax.vjp(losses, state)
        return pull((1.0, 0.0))[0], pull((0.0, 1.0))[0]

    return [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in as_numpy(both(state))]


@pytest.mark.parametrize(
    ("config", "attention"),
    the_first(1, [(FP8, "sparse"), (CONFIG, "dense"), (CONFIG, "sparse")]),
    ids=["fp8", "dense", "sparse"],
)
def test_each_loss_reaches_its_own_parameters_alone(config, attention):
    """Exact zeros across, nothing but non-zeros within, in every layer."""
    lm, kl = gradients(config, attention)
    for (path, of_lm), (_, of_kl) in zip(lm, kl, strict=True):
        name = jax.tree_util.keystr(path)
        own, other = (of_kl, of_lm) if "indexer" in name else (of_lm, of_kl)
        assert np.all(np.isfinite(of_lm)) and np.all(np.isfinite(of_kl)), name
        assert not np.any(other), name
        if "e_score_correction_bias" in name:
            assert not np.any(own)
        else:
            layers = own if "layers" in name else own[None]
            assert all(np.abs(layer).max() > 1e-7 for layer in layers), name


# What is compiled


def gradient_jaxpr(config, attention="sparse", batch=2, length=20):
    graph, state = abstract_parts(config)

    def loss(state, ids):
        out = nnx.merge(graph, state)(ids, attention=attention)
        return out.hidden.sum() + out.indexer_kl.sum()

    return jax.make_jaxpr(jax.grad(loss))(state, jax.ShapeDtypeStruct((batch, length), jnp.int32)).jaxpr


def test_the_program_does_not_grow_with_depth():
    counts = [
        [
            e.primitive.name
            for e in equations(gradient_jaxpr(small_config(num_hidden_layers=n, first_k_dense_replace=n // 2)))
        ]
        for n in (4, 12)
    ]
    assert counts[0] == counts[1] and len(counts[0]) > 500


def test_the_backward_neither_selects_again_nor_keeps_more_than_it_needs():
    """Besides the KL a layer's forward leaves its input, `indices` and `lse`; there is no second top-k anywhere."""
    config = small_config(first_k_dense_replace=2)
    jaxpr: Any = gradient_jaxpr(config)
    assert [e.primitive.name for e in equations(jaxpr)].count("top_k") == 1
    forward_scan = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    shapes = {tuple(v.aval.shape) for v in forward_scan.outvars}
    carried, stacked = {(2, 20, 32), (2, 20)}, {(2, 2, 20), (2, 2, 20, 3), (2, 2, 20, 8), (2, 2, 20, 32)}
    assert stacked <= shapes <= stacked | carried, shapes


@BOTH
def test_no_array_of_a_training_step_is_quadratic(attention):
    """Nothing of T × S elements exists, not even a mask that a differentiated scan would hoist out of the layers."""
    length = 32768
    config = small_config(max_position_embeddings=length)
    program = list(equations(gradient_jaxpr(config, attention, 1, length)))
    largest = max((v.aval.size, v.aval.str_short()) for e in program for v in e.outvars)
    assert largest[0] < length**2 / 8, largest


def test_bfloat16_is_close_to_float32():
    """Over one selection: 8 bits of mantissa through two layers; parameters stay float32."""
    ids = tokens(2, 20)
    exact, logits = as_numpy(forward(CONFIG, ids))
    config = small_config(dtype="bfloat16")
    rounded, rounded_logits = as_numpy(forward(config, ids, selected=exact.selected))
    assert rounded.hidden.dtype == jnp.bfloat16 and rounded_logits.dtype == jnp.float32
    assert rounded.indexer_kl.dtype == rounded.expert_load.dtype == jnp.float32
    error = np.linalg.norm(rounded_logits - logits) / np.linalg.norm(logits)
    assert 1e-4 < error < 0.05, error
    own, _ = forward(config, ids)
    assert np.mean(np.asarray(own.selected == exact.selected)) > 0.8


# The published size


@functools.cache
def published():
    return abstract_parts(Config.deepseek_v32())


def test_parameters_of_the_671b_model():
    """671.0 billion without the prediction layer, and 14 million for each of 61 indexers."""
    _, state = published()
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    indexer = 1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64
    attention = 7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168 + 2 * 7168
    dense, expert = 3 * 7168 * 18432, 3 * 7168 * 2048
    moe = 257 * expert + 7168 * 256 + 256
    assert count == 61 * (attention + indexer) + 3 * dense + 58 * moe + 2 * 129280 * 7168 + 7168
    assert round((count - 61 * indexer) / 1e9, 1) == 671.0


@BOTH
def test_the_671b_model_traces(attention):
    graph, state = published()

    def call(state, ids):
        model = nnx.merge(graph, state)
        out = model(ids, attention=attention, return_selected=attention == "sparse")
        return out, model.unembed(out.hidden[:, -1])

    out, logits = jax.eval_shape(call, state, jax.ShapeDtypeStruct((1, 4096), jnp.int32))
    assert out.hidden.shape == (1, 4096, 7168) and out.hidden.dtype == jnp.bfloat16
    assert out.indexer_kl.shape == (61, 1, 4096) and out.expert_load.shape == (58, 256)
    assert logits.shape == (1, 129280) and logits.dtype == jnp.float32
    assert attention == "dense" or out.selected.shape == (61, 1, 4096, 2048)


# Bad input


def shaped(*dims, dtype="int32"):
    return array(np.zeros(dims), dtype)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(tokens=shaped(20)), ["tokens", "[B, T]", "(20,)"]),
        (dict(tokens=shaped(2, 20, dtype="float32")), ["tokens", "integers", "float32"]),
        (dict(tokens=shaped(1, 97)), ["tokens", "max_position_embeddings", "96", "97"]),
        (dict(keys=causal_range(2, 19)), ["keys", "[2, 20]", "(2, 19)"]),
        (dict(keys=KeyRange(shaped(2, 20), shaped(2, 1))), ["keys", "(2, 1)"]),
        (dict(positions=shaped(1, 20)), ["positions", "[2, 20]", "(1, 20)"]),
        (dict(attention="linear"), ["attention", "'sparse'", "'dense'", "'linear'"]),
        (dict(attention="dense", selected=shaped(2, 2, 20, 8)), ["selected", "sparse", "dense"]),
        (dict(selected=shaped(2, 20, 8)), ["selected", "[2, 2, 20, K]", "(2, 20, 8)"]),
        (dict(selected=shaped(3, 2, 20, 8)), ["selected", "(3, 2, 20, 8)"]),
        (dict(selected=shaped(2, 2, 20, 8, dtype="float32")), ["selected|indices", "float32"]),
        (dict(cache=Cache.empty(CONFIG, 3, 24)), ["cache", "2", "3"]),
        (dict(cache=Cache.empty(CONFIG, 2, 19)), ["cache", "19", "20"]),
        (dict(cache=Cache.empty(small_config(num_hidden_layers=3), 2, 24)), ["cache", "2", "3"]),
        (dict(cache=Cache.empty(small_config(kv_lora_rank=18), 2, 24)), ["cache", "24", "26"]),
        (dict(cache=Cache.empty(FP8, 2, 24)), ["cache", "float32", "float8_e4m3fn"]),
        (dict(cache=Cache.empty(small_config(dtype="bfloat16"), 2, 24)), ["cache", "float32", "bfloat16"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_calls_are_refused_by_name(arguments, words):
    """Before any work: the message says what was expected and what came."""
    model = small_model(CONFIG)
    arguments = dict(tokens=shaped(2, 20)) | arguments
    with unchecked(), pytest.raises(ValueError) as error:
        jax.eval_shape(lambda: model(arguments.pop("tokens"), **arguments))
    for word in words:
        assert any(each in str(error.value) for each in word.split("|")), error.value


@pytest.mark.parametrize(
    ("batch", "size", "words"),
    [(0, 4, ["batch 0"]), (1, 0, ["size 0"]), (1, 97, ["max_position_embeddings", "96", "97"])],
)
def test_bad_caches_are_refused(batch, size, words):
    with pytest.raises(ValueError) as error:
        Cache.empty(CONFIG, batch, size)
    assert all(word in str(error.value) for word in words), error.value


def test_a_model_starts_from_its_seed():
    """The constructor: normal(initializer_range) weights, norms of one, biases of zero, and the same twice."""
    config = small_config(num_hidden_layers=1, first_k_dense_replace=1, initializer_range=0.1)
    make = lambda: nnx.state(Transformer(config, rngs=nnx.Rngs(3)))
    first, second = (as_numpy(jax.jit(lambda: make(), compiler_options=FAST)()) for _ in range(2))
    jax.tree.map(same_bits, first, second)
    assert np.std(first["embed_tokens"][...]) == pytest.approx(0.1, rel=0.1)
    attention = first["dense_layers"]["self_attn"]
    assert np.all(attention["kv_a_layernorm"]["weight"][...] == 1)
    assert not np.any(attention["indexer"]["k_norm"]["bias"][...])
    assert np.std(attention["indexer"]["wq_b"][...]) == pytest.approx(0.1, rel=0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize(("index_fp8", "attention"), [(True, "sparse"), (False, "dense")], ids=["sparse", "dense"])
def test_attention_maps_show_what_a_layer_attends_to(index_fp8, attention):
    config = small_config(first_k_dense_replace=2, index_fp8=index_fp8)
    model, ids = small_model(config), tokens(2, 20)
    keys = KeyRange.packed(array([[0] * 12 + [1] * 8, [3] * 18 + [-1] * 2]))
    maps = model.attention_maps(ids, -1, keys=keys, attention=attention)
    output = model(ids, keys=keys, attention=attention, return_selected=True)
    np.testing.assert_array_equal(maps.selected, output.selected[-1])
    np.testing.assert_array_equal(jnp.isfinite(maps.index_scores), keys.mask(20))
    np.testing.assert_array_equal(maps.selected, select_topk(maps.index_scores, 8))
    sums = np.asarray(maps.weights.sum(-1))
    np.testing.assert_allclose(sums, np.broadcast_to(keys.nonempty()[:, None], sums.shape), atol=1e-5)
    attended = np.asarray((maps.weights > 0).any(1))
    if attention == "dense":
        np.testing.assert_array_equal(attended, keys.mask(20))
    else:
        chosen = np.zeros((2, 20, 21), bool)
        np.put_along_axis(chosen, np.where(maps.selected < 0, 20, maps.selected), True, axis=-1)
        np.testing.assert_array_equal(attended, chosen[..., :20])
    # Weights times values, projected, are what the layer itself makes of the same hidden states.
    graph, state = nnx.split(list(model.layers())[-1].self_attn)

    @jax.jit
    def both_ways(state, x):
        layer, angles = nnx.merge(graph, state), rotation(jnp.broadcast_to(jnp.arange(20), (2, 20)), config)
        weights = layer.attention_maps(x, angles, keys, attention=attention).weights
        values = layer.expand(layer.project(x, angles).kv)[1]
        out = jnp.einsum("bnts,bsnv,nvd->btd", weights, values, layer.o_proj[...], precision="highest")
        return out, layer(x, angles, keys, attention=attention).x

    actual, expected = both_ways(state, normal(1, 2, 20, config.hidden_size))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("layer", [3, -4, 1.0, True, None])
def test_attention_maps_refuse_layers_that_are_not_there(layer):
    with unchecked(), pytest.raises(ValueError, match=r"layer must be an integer from -3 to 2, got"):
        small_model(Config.tiny()).attention_maps(tokens(1, 4), layer)
