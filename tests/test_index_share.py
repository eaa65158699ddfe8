"""Layers that reuse a selection: against imposed selections, float64 and the same model by caches, pages and files."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import FAST, array, as_numpy, causal_range, noise, the_first
from flax import nnx
from model_cases import abstract_parts, forward, model_parts, small_config, small_model, tokens
from safetensors.numpy import load_file, save_file
from sharded_cases import mesh_of

from dsa_jax import Cache, KeyRange, PagedCache, Runner, forward_on_mesh, load_hf, save_hf, to_hf
from dsa_jax.cache import Pages
from dsa_jax.cache_shapes import cache_token_bytes, page_shapes
from dsa_jax.hf.table import leaves
from dsa_jax.rope import rotation
from dsa_jax.stacks import leaders
from train.losses import indexer_loss

pytestmark = pytest.mark.usefixtures("in_a_hurry")

# Periods that repeat, quick to compile; and an indexer that serves a dense and a MoE layer before these.
TYPES = ("full", "shared") * 2
SIZES = dict(num_hidden_layers=4, num_attention_heads=4, index_n_heads=16)
CONFIG = small_config(**SIZES, indexer_types=TYPES, max_position_embeddings=256)
MIXED = dataclasses.replace(CONFIG, num_hidden_layers=6, first_k_dense_replace=1, indexer_types=TYPES + TYPES[:2])
FULL = dataclasses.replace(MIXED, indexer_types=())
IDS = tokens(2, 40)


def full_state():
    """The state of the model with an indexer in every layer: the shared model's, and drawn ones that may not matter."""
    own = {leaf.path: leaf for leaf in leaves(MIXED)}
    _, state = model_parts(MIXED)
    arrays = {
        tuple(key.key for key in path if hasattr(key, "key")): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(state)
    }
    by_name = {}
    for path, leaf in own.items():
        for index, name in leaf.tensors():
            by_name[name] = arrays[path][index]
    graph, other = model_parts(FULL)
    filled = dict(jax.tree.leaves_with_path(other))
    for path, x in filled.items():
        names = tuple(key.key for key in path if hasattr(key, "key"))
        leaf = next(each for each in leaves(FULL) if each.path == names)
        x = np.array(x)
        for index, name in leaf.tensors():
            x[index] = by_name.get(name, x[index])
        filled[path] = array(x)
    return graph, jax.tree.unflatten(jax.tree.structure(other), list(filled.values()))


@pytest.mark.parametrize("fp8", [pytest.param(False, marks=pytest.mark.variants), True])
def test_it_is_the_full_model_over_imposed_selections(fp8):
    config = dataclasses.replace(MIXED, index_fp8=fp8)
    out, logits = as_numpy(forward(config, IDS))
    selected = out.selected
    for layer, leader in enumerate(leaders(config)):
        np.testing.assert_array_equal(selected[layer], selected[leader])
    assert np.any(selected[0] != selected[2]) and np.any(selected[2] != selected[4])
    graph, state = full_state()
    graph = abstract_parts(dataclasses.replace(FULL, index_fp8=fp8))[0]

    @jax.jit
    def imposed(state, selected):
        model = nnx.merge(graph, state)
        other: Any = model(IDS, selected=selected)
        return other.indexer_kl, model.unembed(other.hidden)

    kl, other_logits = as_numpy(imposed(state, selected))
    np.testing.assert_allclose(other_logits, logits, atol=1e-5)
    # Indexers are made alike: a layer that has one diverges as much, whoever else uses its selection.
    mine = [layer for layer, leader in enumerate(leaders(config)) if layer == leader]
    np.testing.assert_allclose(kl[mine], out.indexer_kl[mine], atol=1e-5)


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=FAST)
def run_layer(graph, state, x, shared, attention):
    """A layer's normalised inputs, its projections and each head's keys, and its results."""
    layer, keys = nnx.merge(graph, state), KeyRange.causal(*IDS.shape)
    turn = rotation(jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape), CONFIG)
    inputs = layer.input_layernorm(x)
    p = layer.self_attn.project(inputs, turn)
    out = layer(x, turn, keys, attention=attention, shared=shared, return_selected=True, return_indexer_kl=False)
    q_latent = layer.self_attn.q_a_layernorm(inputs @ layer.self_attn.q_a_proj[...])
    return (inputs, q_latent, turn), p, layer.self_attn.expand(p.kv)[0], out


def in_float64(model, attention) -> Iterator[Any]:
    """Of each layer its indexer and what that reads, q, k and lse of all heads, its keys, and the index over these."""
    keys, shared = causal_range(*IDS.shape), None
    index: Any = None
    x = model.embed(IDS)
    for layer in model.layers():
        shared = shared if layer.self_attn.indexer is None else None
        inputs, p, k, out = run_layer(*nnx.split(layer), x, shared, attention)
        rows = reference.reachable(keys.start, keys.stop, IDS.shape[1])
        if attention == "sparse":
            rows = reference.listed(out.selected, IDS.shape[1])
        lse = reference.attention(p.q, k, k, rows, CONFIG.softmax_scale)[1]
        index = (p.q_index, p.k_index, p.weights) if p.q_index is not None else index
        yield layer.self_attn.indexer, inputs, (p.q, k, lse), rows, index
        x, shared = out.x, out.shared if shared is None else shared


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_the_divergence_of_every_layer_is_its_definition(attention):
    """KL to a layer's own target, of the scores of the indexer that selects for it, in float64."""
    out, _ = forward(CONFIG, IDS, attention=attention)
    found = list(in_float64(small_model(CONFIG), attention))
    assert len(found) == CONFIG.num_hidden_layers
    divergences = np.asarray(out.indexer_kl)
    for kl, (_, _, (q, k, lse), rows, (q_index, k_index, weights)) in zip(divergences, found, strict=True):
        expected = reference.indexer_kl(q_index, k_index, weights, q, k, lse, rows, CONFIG.softmax_scale)
        np.testing.assert_allclose(kl, expected, atol=2e-5)


def kl_gradients(config, attention):
    """Gradients of the indexers' loss, a mean over queries, by all parameters, under their names in a checkpoint."""
    graph, state = model_parts(config)

    @functools.partial(jax.jit, compiler_options=FAST)
    def gradients(state):
        def loss(state):
            kl: Any = nnx.merge(graph, state)(IDS, attention=attention).indexer_kl
            return indexer_loss(kl, jnp.ones(IDS.shape, bool), config) / IDS.size

        return jax.grad(loss)(state)

    return {name: np.asarray(x) for name, x in to_hf(as_numpy(gradients(state)), config=config)}


def indexer_gradients(indexer, inputs, d_index):
    """Gradients of an indexer's parameters by those of what it makes."""
    graph, state = nnx.split(indexer)
    return _indexer_gradients(graph, state, inputs, tuple(array(x, "float32") for x in d_index))


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _indexer_gradients(graph, state, inputs, d_index):
    return jax.vjp(lambda state: nnx.merge(graph, state)(*inputs), state)[1](d_index)[0]


@pytest.mark.parametrize(
    ("option", "attention"),
    the_first(2, [("mean", "sparse"), ("own", "dense"), ("mean", "dense"), ("own", "sparse")]),
)
def test_an_indexer_learns_from_every_layer_that_it_serves(attention, option):
    """The gradient is that of the KL to the mean of the layers' targets, or to the target of its own layer."""
    config = dataclasses.replace(CONFIG, index_share_kl=option)
    found = kl_gradients(config, attention)
    layers = list(in_float64(small_model(config), attention))
    for leader in dict.fromkeys(leaders(config)):
        served = [i for i, other in enumerate(leaders(config)) if other == leader and (option == "mean" or i == leader)]
        indexer, inputs, _, rows, (q_index, k_index, weights) = layers[leader]
        heads = [layers[i][2] for i in served]
        cotangent = np.full(IDS.shape, 1 / IDS.size)
        d_index = reference.shared_indexer_kl_vjp(
            q_index, k_index, weights, heads, rows, config.softmax_scale, cotangent
        )
        expected = indexer_gradients(indexer, inputs, d_index)
        for path, x in jax.tree.leaves_with_path(expected):
            name = ".".join(key.key for key in path if hasattr(key, "key"))
            of_file = found[f"model.layers.{leader}.self_attn.indexer.{name}" + ("" if "norm" in name else ".weight")]
            x = np.asarray(x)
            x = x if x.ndim == 1 else x.reshape(x.shape[0], -1).T
            np.testing.assert_allclose(of_file, x, atol=2e-5 * np.abs(x).max(), err_msg=f"{leader} {name}")
    assert all(np.abs(x).max() == 0 for name, x in found.items() if "indexer" not in name)


def test_an_indexer_of_its_own_layer_alone_leaves_the_other_divergences_out():
    config = dataclasses.replace(CONFIG, index_share_kl="own")
    kl = np.asarray(forward(config, IDS)[0].indexer_kl)
    own = np.array([layer == leader for layer, leader in enumerate(leaders(config))])
    np.testing.assert_allclose(kl[own], np.asarray(forward(CONFIG, IDS)[0].indexer_kl)[own], atol=1e-6)
    assert not kl[~own].any() and kl[own].all(axis=0)[:, 1:].all()


@pytest.mark.slow
def test_the_backbone_learns_through_shared_selections_as_through_imposed_ones():
    """Gradients of the output by the backbone, of two layers that share and of two that are given the selection."""
    shared, full = small_config(indexer_types=("full", "shared")), small_config()
    options: Any = dict(return_selected=True, return_indexer_kl=False)

    def gradients(config, state, selected):
        graph, _ = abstract_parts(config)

        def loss(state):
            out: Any = nnx.merge(graph, state)(IDS[:1], selected=selected, **options)
            return (out.hidden**2).sum(), out.selected

        found, selected = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)(state)
        return {name: np.asarray(x) for name, x in to_hf(as_numpy(found), config=config)}, selected

    state, whole = model_parts(shared)[1], model_parts(full)[1]
    kept = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}

    def take(path, x):
        name = jax.tree_util.keystr(path)
        return x if "indexer" in name else kept[name]

    of_shared, selected = gradients(shared, state, None)
    of_full, _ = gradients(full, jax.tree_util.tree_map_with_path(take, whole), selected)
    for name, x in of_shared.items():
        np.testing.assert_allclose(x, of_full[name], atol=1e-5 * max(1.0, np.abs(x).max()), err_msg=name)
        if "self_attn" in name:
            assert np.any(x) != ("indexer" in name), name


# Caches


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [pytest.param(False, marks=pytest.mark.variants), True])
def test_prefill_and_decode_equal_the_whole(fp8):
    config = dataclasses.replace(CONFIG, index_fp8=fp8)
    whole, logits = forward(config, IDS)
    ids = np.asarray(IDS)
    cache = Cache.empty(config, 2, 48)
    chex.assert_shape(cache.k_index, (2, 2, 48, 16))
    out, first = forward(config, ids[:, :30], cache=cache)
    found, selected = [first], [np.asarray(out.selected)[..., :8]]
    for at in range(30, 40):
        out, next_logits = forward(config, ids[:, at : at + 1], cache=out.cache)
        found.append(next_logits)
        selected.append(np.asarray(out.selected))
    np.testing.assert_allclose(np.concatenate(found, axis=1), logits, atol=2e-5)
    np.testing.assert_array_equal(np.concatenate(selected, axis=2), whole.selected)


PROMPTS = [np.asarray(tokens(1, length, seed=length))[0] for length in (70, 9)]


@pytest.mark.slow
def test_pages_serve_it():
    """Prompts of several lengths in chunks, then drafts: the logits are those of the plain forward pass."""
    cache = PagedCache(CONFIG, 8, format="float32")
    runner = Runner(small_model(CONFIG), cache, prefill_chunk=32, return_selected=True)
    sequences = [runner.cache.new() for _ in PROMPTS]
    first: Any = runner.prefill(sequences, [prompt[:-3] for prompt in PROMPTS])
    last = runner.extend(sequences, np.stack([prompt[-3:] for prompt in PROMPTS]))
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    padded = np.stack([np.pad(prompt, (0, lengths.max() - len(prompt))) for prompt in PROMPTS])
    out, logits = as_numpy(forward(CONFIG, padded, keys=KeyRange.lengths(array(lengths), lengths.max())))
    first_logits, last = as_numpy((first.logits, last))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(first_logits[row], logits[row, length - 4], atol=1e-5)
        np.testing.assert_allclose(last[row], logits[row, length - 3 : length], atol=1e-5)
        np.testing.assert_array_equal(first.selected[row], out.selected[:, row, : length - 3])


def test_pages_have_index_keys_by_the_number_of_the_indexer():
    """In FP8: layer 4 writes those of indexer 2, which layers 4 and 5 read; layer 5 writes its latents alone."""
    config = dataclasses.replace(MIXED, index_fp8=True)
    pools = [array(np.zeros(x.shape), x.dtype) for x in page_shapes(config, 3, "fp8")]
    kv, k_index = noise(0, 1, 5, 24), noise(1, 1, 5, 16)
    table, slots = array([[2, 0]], jnp.int32), array([[128, 129, 130, -1, 131]], jnp.int32)  # page 2

    @jax.jit
    def written_and_read(latents, index_keys, kv, k_index):
        pages = Pages(latents, index_keys, table, slots, 16).write(4, kv, k_index, 2).write(5, 2 * kv, None, 2)
        return pages.latents, pages.index_keys, {at: pages.layer(at, 2).read(jnp.float32) for at in (4, 5)}

    latents, index_keys, read = as_numpy(written_and_read(*pools, kv, k_index))
    values, scale = reference.quantize(k_index)
    kept = np.array([0, 1, 2, 4])
    for layer, factor in ((4, 1), (5, 2)):
        found, keys, scales = read[layer]
        np.testing.assert_allclose(found[0, :4], factor * kv[0, kept], atol=0.5)
        np.testing.assert_array_equal(keys[0, :4].astype(np.float32), values[0, kept].astype(np.float32))
        np.testing.assert_array_equal(scales[0, :4], scale[0, kept])
    for indexer in (0, 1):
        assert not index_keys[indexer].astype(np.float32).any()
    assert not latents[:4].any()


def test_layers_that_share_keep_no_index_keys():
    """2 of 4 layers have an indexer; in FP8 a token takes 132 bytes less in each of the others, at full width."""
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, index_fp8=True)
    shared = dataclasses.replace(CONFIG, **sizes)
    assert cache_token_bytes(shared, "fp8") == 4 * 656 + 2 * 132 == 4 * 788 - 2 * 132
    latents, index_keys = page_shapes(shared, 3, "fp8")
    assert latents.shape[0] == 4 and index_keys.shape[0] == 2
    cache = PagedCache(CONFIG, 2, format="float32")
    held = cache.latents.nbytes + cache.index_keys.nbytes
    assert held == 2 * 64 * cache_token_bytes(CONFIG, "float32") == 2 * 64 * 4 * (4 * 24 + 2 * 16)


# Files, meshes, size


def test_files_hold_no_indexer_of_a_layer_that_shares(tmp_path):
    model = small_model(CONFIG)
    save_hf(model, tmp_path / "model")
    names = {name for name, _ in to_hf(model)}
    indexers = {int(name.split(".")[2]) for name in names if ".indexer." in name}
    assert indexers == {0, 2}
    loaded = load_hf(tmp_path / "model")
    assert loaded.config == CONFIG
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))


def test_a_missing_or_superfluous_indexer_is_named(tmp_path):
    save_hf(small_model(CONFIG), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    text = json.loads(config.read_text())
    for types, message in (
        (["full"] * 4, "indexer.wk.weight is missing"),
        (["full"] + ["shared"] * 3, "is unexpected"),
    ):
        config.write_text(json.dumps(text | {"indexer_types": types}))
        with pytest.raises(ValueError, match=message):
            load_hf(tmp_path / "model")


def test_a_dense_checkpoint_gets_indexers_where_they_are_wanted(tmp_path):
    """Of a model without any, `config` says which layers get one; all else is the file's."""
    folder, model = tmp_path / "dense", small_model(CONFIG)
    save_hf(model, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if ".indexer." not in name}
    save_file(kept, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("index")}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    loaded = load_hf(folder, config=CONFIG)
    found = dict(to_hf(loaded))
    assert {name for name in found if ".indexer." in name} == tensors.keys() - kept.keys()
    for name, x in kept.items():
        np.testing.assert_array_equal(found[name], x)
    assert np.any(found["model.layers.2.self_attn.indexer.wk.weight"])


@pytest.mark.parametrize("mesh", ["data=2,context=2,tensor=2"])
def test_a_mesh_gives_what_one_device_gives(mesh):
    want, _ = forward(CONFIG, IDS)
    found: Any = forward_on_mesh(
        small_model(CONFIG), mesh_of(mesh), IDS, return_selected=True, return_indexer_kl=True, return_routed=True
    )
    np.testing.assert_array_equal(found.selected, want.selected)
    np.testing.assert_allclose(found.hidden, want.hidden, atol=2e-5)
    np.testing.assert_allclose(found.indexer_kl, want.indexer_kl, atol=2e-5)
    np.testing.assert_array_equal(found.expert_load, want.expert_load)
    chex.assert_shape(found.routed, (4, 2, 40, 2))


def test_the_program_does_not_grow_with_depth():
    """Of as many operations with 27 layers as with 6, each layer of the period of three traced once."""

    def operations(periods):
        types = ["full", "shared", "shared"] * periods
        config = small_config(num_hidden_layers=len(types), first_k_dense_replace=0, indexer_types=types)
        graph, state = abstract_parts(config)

        def loss(state, ids):
            out: Any = nnx.merge(graph, state)(ids)
            return out.hidden.sum() + out.indexer_kl.sum()

        program = str(jax.make_jaxpr(jax.grad(loss))(state, jax.ShapeDtypeStruct((1, 20), jnp.int32)))
        return program.count("\n")

    counts = [operations(periods) for periods in (2, 9)]
    assert counts[0] == counts[1] > 1000, counts


def test_nothing_of_gathered_rows_is_made_ahead_of_the_layers():
    """Of a stack whose selection comes from outside: neither T × S nor T × K × (C + R) elements stand beside a loop."""
    length = 32768  # many blocks of queries
    sizes = dict(num_hidden_layers=3, first_k_dense_replace=1, max_position_embeddings=length)
    config = small_config(**sizes, indexer_types=("full", "shared", "shared"))
    graph, state = abstract_parts(config)

    def loss(state, ids):
        out: Any = nnx.merge(graph, state)(ids)
        return out.hidden.sum() + out.indexer_kl.sum()

    program = jax.make_jaxpr(jax.grad(loss))(state, jax.ShapeDtypeStruct((1, length), jnp.int32))
    made: Any = [v.aval for equation in program.jaxpr.eqns if equation.invars for v in equation.outvars]
    largest = max(made, key=lambda aval: aval.size)
    assert largest.size < length * config.index_topk * config.latent_dim / 2, largest


@pytest.mark.slow
def test_maps_show_the_index_scores_of_the_layer_that_selects():
    model = small_model(CONFIG)
    out, _ = forward(CONFIG, IDS)
    maps = model.attention_maps(IDS, layer=3)
    np.testing.assert_array_equal(maps.selected, np.asarray(out.selected)[3])
    np.testing.assert_array_equal(maps.index_scores, model.attention_maps(IDS, layer=2).index_scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(indexer_types=["full"] * 5), "for each of the 4 layers"),
        (dict(indexer_types=["shared"] + ["full"] * 3), "the first of them 'full'"),
        (dict(indexer_types=["full"] * 3 + ["half"]), "must be 'full' or 'shared'"),
        (dict(indexer_types="full"), "must be 'full' or 'shared' for each layer, got 'full'"),
        (dict(indexer_types=TYPES, baseline="blocks", block_size=4), "no 'shared' layer under baseline 'blocks'"),
        (dict(index_share_kl="all"), "index_share_kl must be 'mean' or 'own'"),
    ],
)
def test_wrong_patterns_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**SIZES, **changes)


def test_a_layer_without_an_indexer_must_be_handed_a_selection():
    layer = list(small_model(CONFIG).layers())[1]
    x, turn = jax.eval_shape(lambda: (jnp.ones((1, 4, 32)), rotation(jnp.arange(4)[None], CONFIG)))
    with pytest.raises(ValueError, match="shared must be given to a layer without an indexer"):
        jax.eval_shape(lambda x, turn: layer(x, turn, KeyRange.causal(1, 4)), x, turn)
