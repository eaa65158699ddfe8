"""Kept mass and held-out losses against float64 NumPy, and what must hold of every selection."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import as_numpy, keys_of, the_first, topk_of
from flax import nnx

from dsa_jax import Config, KeyRange, Transformer
from dsa_jax import blockwise as blocks
from dsa_jax.rope import rotation
from train.data import DataConfig, load
from train.evaluation import kept_mass as layers
from train.evaluation.evaluate import Weights, evaluate_run, held_out_losses, measure_selections
from train.evaluation.held_out import HeldOut, draw_batches
from train.evaluation.kept_mass import KeptMass, kept_mass, measure_layers
from train.phases import merge_groups, split_groups, window_selection

K, T = 4, 160
CONFIG = dataclasses.replace(
    Config.tiny(),
    hidden_size=32,
    num_attention_heads=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    index_n_heads=16,
    index_head_dim=16,
    index_topk=K,
    intermediate_size=32,
    moe_intermediate_size=16,
)

pytestmark = pytest.mark.usefixtures("in_a_hurry")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        lines = "".join(f"line {j} of file {i} = {i * j}\n" for j in range(8))
        (folder / f"{i}.txt").write_text(lines)
    return load(DataConfig(data=(f"{folder}/*.txt",), held_out=0.5))


@pytest.fixture(scope="module")
def held_out(corpus):
    """Draws text, the same as one long document a row, of which digits are a subset, and their mixture."""
    text = draw_batches(corpus, 2, 2, T)
    place = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    whole = [dataclasses.replace(b, start=0 * place, stop=place + 1, positions=place) for b in text]
    whole = tuple(dataclasses.replace(b, valid=np.ones((2, T), bool)) for b in whole)
    digits = tuple((batch.targets >= ord("0")) & (batch.targets <= ord("9")) for batch in whole)
    return HeldOut({"text": text, "whole": whole}, {"whole": {"digits": digits}}, {"text": 0.25, "whole": 0.75})


def make(config, seed):
    """Makes a model as the trainer holds it, drawn by NumPy, which compiles nothing; attention is far from uniform."""
    graphdef, shapes = split_groups(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        around = 1.0 if path[-1].key == "weight" and leaf.ndim < 3 else 0.0  # norms
        return rng.normal(around, 0.3, leaf.shape).astype(leaf.dtype)

    return graphdef, jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


@pytest.fixture(scope="module")
def trained():
    return make(CONFIG, 0)


@pytest.fixture(scope="module")
def other_indexer():
    return make(CONFIG, 1)[1]["indexer"]


@pytest.fixture(scope="module")
def models(trained, other_indexer):
    """Makes the model, and its backbone with another indexer."""
    graphdef, params = trained
    return {
        "indexer": merge_groups(graphdef, params),
        "other": merge_groups(graphdef, {**params, "indexer": other_indexer}),
    }


def softmax(logits, reach):
    """Head-averaged probabilities in float64; a query without keys has none."""
    logits = np.where(reach[:, :, None], logits, -np.inf)
    weights = np.exp(logits - np.maximum(logits.max(-1, keepdims=True), -1e300))
    return (weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)).mean(2)


def inputs(seed, batch=2, length=40, heads=3, dim=8):
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(batch, length, heads, dim)).astype(np.float32) for _ in range(2))
    segments = np.sort(rng.integers(0, 3, (batch, length)), axis=1)
    segments[:, -3:] = -1  # padding
    keys = as_numpy(KeyRange.packed(jnp.asarray(segments)))
    selected = rng.integers(-1, length, (batch, length, K)).astype(np.int32)
    return q, k, keys, selected, rng.integers(2**31, size=(batch, length)).astype(np.int32)


@partial(jax.jit, static_argnames=("top_k", "scale"))
def mass_of(q, k, keys, given, seeds, *, top_k=K, scale=0.7):
    """`kept_mass`, compiled once a shape."""
    return kept_mass(q, k, keys, given, seeds, top_k=top_k, scale=scale)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kept_mass_is_the_attention_on_the_selected_keys(seed):
    q, k, keys, selected, seeds = inputs(seed)
    mass, found = mass_of(q, k, keys, {"given": selected}, seeds)
    place = np.arange(q.shape[1])
    reach = (place >= keys.start[..., None]) & (place < keys.stop[..., None])
    p = softmax(0.7 * np.einsum("btnh,bsnh->btns", np.asarray(q, np.float64), np.asarray(k, np.float64)), reach)
    np.testing.assert_allclose(p.sum(-1), reach.any(-1), atol=1e-12)  # of norm 1
    for name, chosen in {"given": selected, **found}.items():
        expected = [
            [p[b, t, row[row >= 0]].sum() for t, row in enumerate(rows)] for b, rows in enumerate(np.asarray(chosen))
        ]
        np.testing.assert_allclose(mass[name], expected, atol=2e-6)
    np.testing.assert_allclose(mass["oracle"], np.sort(p, axis=-1)[..., -K:].sum(-1), atol=2e-6)


def test_random_keys_are_reachable_distinct_and_drawn_anew():
    q, k, keys, selected, seeds = inputs(0)
    draws = [np.asarray(mass_of(q, k, keys, {"given": selected}, seeds + i)[1]["random"]) for i in range(50)]
    count = np.minimum(keys.stop - keys.start, K)
    counts = np.zeros((*q.shape[:2], q.shape[1]))
    for chosen in draws:
        assert ((chosen >= 0).sum(-1) == count).all()
        for b, t in np.ndindex(*q.shape[:2]):
            row = chosen[b, t][chosen[b, t] >= 0]
            assert (np.diff(row) > 0).all()
            assert ((row >= keys.start[b, t]) & (row < keys.stop[b, t])).all()
            counts[b, t, row] += 1
    wide = keys.stop - keys.start >= 2 * K
    assert wide.any()
    for b, t in np.argwhere(wide):
        assert (counts[b, t, keys.start[b, t] : keys.stop[b, t]] > 0).mean() > 0.9  # no key is left out for good


def test_blocks_change_nothing(monkeypatch):
    q, k, keys, selected, seeds = inputs(3)
    whole = mass_of(q, k, keys, {"given": selected}, seeds)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 4 * 40 * 3 * 7)
    in_parts = jax.jit(partial(kept_mass, top_k=K, scale=0.7))  # traced anew
    parts = in_parts(q, k, keys, {"given": selected}, seeds)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)


def test_memory_is_bounded_by_a_block():
    length, heads = 32768, 8
    q = jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32)
    edge = jax.ShapeDtypeStruct((1, length), jnp.int32)
    selected = jax.ShapeDtypeStruct((1, length, 64), jnp.int32)

    def measure(q, k, start, stop, selected):
        keys = KeyRange(start, stop)
        return kept_mass(q, k, keys, {"given": selected}, start, top_k=64, scale=1.0)

    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # in no hurry
    compiled = jax.jit(measure).lower(q, q, edge, edge, selected).compile(options)
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2**29  # the probabilities alone would take 4 GiB


@partial(jax.jit, static_argnames="graph")
def run_layer(graph, state, x, angles, keys):
    layer = nnx.merge(graph, state)
    projections = layer.self_attn.project(layer.input_layernorm(x), angles)
    k, _ = layer.self_attn.expand(projections.kv)
    return layer(x, angles, keys, attention="dense").x, projections, k


def layer_by_layer(model, batch):
    """Runs the layers one by one, dense, and yields what the attention of each sees."""
    angles = jax.jit(rotation, static_argnums=1)(batch.positions, model.config)
    x = np.asarray(model.embed_tokens[...])[batch.tokens]
    for layer in model.layers():
        x, projections, k = run_layer(*nnx.split(layer), x, angles, batch.keys)
        yield projections, k
    np.testing.assert_allclose(model.norm(x), run_model(*nnx.split(model), batch, attention="dense"), atol=1e-4)


@partial(jax.jit, static_argnames=("graph", "attention"))
def run_model(graph, state, batch, *, attention, selected=None):
    model = nnx.merge(graph, state)
    options = {"attention": attention, "selected": selected}
    return model(batch.tokens, keys=batch.keys, positions=batch.positions, **options).hidden


@pytest.mark.parametrize("part", [pytest.param("text", marks=pytest.mark.slow), "whole"])
def test_a_model_is_measured_like_its_attention_in_float64(trained, models, held_out, part):
    batch = jax.tree.map(jnp.asarray, held_out.parts[part][0])
    model = merge_groups(*trained)
    mass, hidden = measure_layers(model, models, batch)
    reach = np.asarray(batch.keys.mask(T))
    start, stop = np.asarray(batch.start), np.asarray(batch.stop)
    oracles = []
    assert mass["oracle"].shape == (3, 2, T)
    for number, (p, k) in enumerate(layer_by_layer(model, batch)):
        q, k = (np.asarray(x, np.float64) for x in (p.q, k))
        attention = softmax(CONFIG.softmax_scale * np.einsum("btnh,bsnh->btns", q, k), reach)
        rows = np.asarray(keys_of(p.q_index, p.k_index, p.weights, batch.keys, K))
        kept = np.where(rows >= 0, np.take_along_axis(attention, np.maximum(rows, 0), -1), 0).sum(-1)
        np.testing.assert_allclose(mass["indexer"][number], kept, atol=1e-5, err_msg=f"layer {number}")
        best = np.sort(attention, axis=-1)[..., -K:].sum(-1)
        np.testing.assert_allclose(mass["oracle"][number], best, atol=1e-5, err_msg=f"layer {number}")
        last = [
            [attention[b, t, max(start[b, t], stop[b, t] - K) : stop[b, t]].sum() for t in range(T)] for b in range(2)
        ]
        np.testing.assert_allclose(mass["window"][number], last, atol=1e-5, err_msg=f"layer {number}")
        oracles.append(topk_of(attention.astype(np.float32), K, batch.keys))
    imposed = np.asarray(run_model(*nnx.split(model), batch, attention="sparse", selected=np.stack(oracles)))
    hidden = as_numpy(hidden)
    # Where two keys tie to the last bits the two may differ in one; nearly nowhere.
    assert (np.abs(hidden["oracle"] - imposed).max(-1) < 1e-3).mean() > 0.97
    assert (np.abs(hidden["oracle"] - hidden["dense"]).max(-1) > 1e-2).mean() > 0.5


def test_no_selection_keeps_more_than_the_oracle(models, held_out):
    mass, _ = measure_layers(models["indexer"], models, held_out.parts["whole"][0])
    for name, kept in mass.items():
        assert (kept <= mass["oracle"] + 1e-5).all(), name
        assert (kept >= 0).all() and (kept <= 1 + 1e-5).all()
    assert (mass["indexer"] != mass["other"]).any()


@pytest.mark.slow
def test_one_layer_of_each_kind_is_compiled(held_out):
    deep = dataclasses.replace(CONFIG, num_hidden_layers=5, hidden_size=40)
    model = merge_groups(*make(deep, 0))
    cache_size = getattr(layers._measure_layer, "_cache_size")  # noqa: B009
    before = cache_size()
    measure_layers(model, {"indexer": model}, held_out.parts["text"][0])
    assert cache_size() == before + 2  # the dense layer and the MoE layers


@pytest.fixture(scope="module")
def measured(trained, held_out, other_indexer):
    graphdef, params = trained
    return measure_selections(graphdef, params, held_out, indexers={"other": other_indexer})


def test_an_indexer_of_other_weights_is_swapped_in(measured):
    mass = measured[0].mass["all"]
    assert mass["indexer"] != mass["other"]


def test_queries_are_those_that_reach_four_times_k(measured, models, held_out):
    kept, _ = measured
    assert kept.k == K
    reach = lambda batch: batch.stop - batch.start >= 4 * K
    digits = held_out.subsets["whole"]["digits"]
    counts = {part: sum(reach(batch).sum() for batch in batches) for part, batches in held_out.parts.items()}
    counts["digits"] = sum((reach(b) & mask).sum() for b, mask in zip(held_out.parts["whole"], digits, strict=True))
    assert kept.queries == {**counts, "all": counts["text"] + counts["whole"]}
    assert 0 < counts["digits"] < counts["whole"] and counts["text"] < counts["whole"]
    window = []
    for batch, mask in zip(held_out.parts["whole"], digits, strict=True):
        mass, _ = measure_layers(models["indexer"], models, batch)
        window.append(np.asarray(mass["window"])[:, mask & reach(batch)])
    expected = np.concatenate(window, axis=1).mean(1)
    np.testing.assert_allclose(kept.mass["digits"]["window"], expected, atol=1e-6)
    for text, whole, mixed in zip(*(kept.mass[part]["oracle"] for part in ("text", "whole", "all")), strict=True):
        assert mixed == pytest.approx(0.25 * text + 0.75 * whole)


def naive_losses(model, batch, attention):
    hidden = run_model(*nnx.split(model), batch, attention=attention)
    logits = np.asarray(model.unembed(hidden), np.float64)
    peak = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
    return log_sum - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize("attention", the_first(1, ["sparse", "dense"]))
def test_held_out_losses_are_means_over_valid_targets(trained, held_out, attention):
    graphdef, params = trained
    losses = held_out_losses(graphdef, params, held_out, attention=attention)
    model = merge_groups(*trained)
    text = np.concatenate([naive_losses(model, b, attention)[b.valid] for b in held_out.parts["text"]])
    whole = np.stack([naive_losses(model, b, attention) for b in held_out.parts["whole"]])
    digits = whole[np.stack(held_out.subsets["whole"]["digits"])]
    assert len(digits) and any((~b.valid).any() for b in held_out.parts["text"])
    expected = {
        "all": 0.25 * text.mean() + 0.75 * whole.mean(),
        "text": text.mean(),
        "whole": whole.mean(),
        "digits": digits.mean(),
    }
    assert losses == pytest.approx(expected, abs=1e-4) and list(losses) == list(expected)


@pytest.mark.slow
def test_losses_of_selections(trained, held_out, measured):
    _, losses = measured
    graphdef, params = trained
    expected = {
        "dense": held_out_losses(graphdef, params, held_out, attention="dense"),
        "indexer": held_out_losses(graphdef, params, held_out, attention="sparse"),
        "window": held_out_losses(graphdef, params, held_out, attention="sparse", selection=window_selection),
    }
    for name, parts in expected.items():
        assert losses[name] == pytest.approx(parts, abs=1e-5), name
    assert set(losses) == {"dense", "indexer", "oracle", "window", "random"}
    values = sorted(parts["all"] for parts in losses.values())
    assert (np.diff(values) > 1e-3).all()  # each selection has a loss of its own


@pytest.mark.slow
def test_a_run_is_evaluated_from_the_weights_of_each_phase(trained, held_out, other_indexer, measured):
    graphdef, final = trained
    other = {**final, "indexer": other_indexer}
    before = (
        Weights("after BASE, dense", lambda: other, "dense"),
        Weights("after WARMUP, sparse", lambda: final, "sparse"),
    )
    controls = (
        Weights("DENSE_CONTROL, dense", lambda: final, "dense"),
        Weights("WINDOW_CONTROL, last K keys", lambda: final, "sparse", window_selection),
    )
    indexers = {"warmed": final["indexer"], "untrained": other["indexer"]}
    found = evaluate_run(graphdef, held_out, final, before=before, controls=controls, indexers=indexers)
    _, losses = measured
    expected = {
        "after BASE, dense": losses["dense"],  # no indexer takes part in dense attention
        "after WARMUP, sparse": losses["indexer"],
        "final, sparse": losses["indexer"],
        "final, dense": losses["dense"],
        "DENSE_CONTROL, dense": losses["dense"],
        "WINDOW_CONTROL, last K keys": losses["window"],
    }
    assert list(found.losses) == list(expected)
    for name, parts in expected.items():
        assert found.losses[name] == pytest.approx(parts, abs=1e-5), name
    assert found.selections == losses
    mass = found.kept.mass["all"]
    assert set(mass) == {"indexer", "warmed", "untrained", "oracle", "window", "random"}
    assert mass["warmed"] == mass["indexer"] == measured[0].mass["all"]["indexer"]
    assert mass["untrained"] == measured[0].mass["all"]["other"]


@pytest.mark.slow
def test_with_k_as_long_as_the_sequence_every_selection_is_dense(held_out):
    config = dataclasses.replace(CONFIG, index_topk=T)
    graphdef, params = make(config, 0)
    kept, losses = measure_selections(graphdef, params, held_out)
    assert not kept.mass  # no query reaches 4 K keys
    assert kept.mean("indexer", "text") is None and kept.mean_gap_closed(part="text") is None
    for name in ("indexer", "oracle", "window", "random"):
        assert losses[name] == pytest.approx(losses["dense"], abs=1e-4)


def test_held_out_batches_show_no_window_twice(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("".join(f"text {j} of {i} " for j in range(90)))
    corpus = load(DataConfig(data=(f"{tmp_path}/*.txt",)))
    assert len(draw_batches(corpus, 3, 1, 64)) == 3
    windows = (len(corpus.held_out.tokens) - 1) // 64
    assert len({batch.tokens.tobytes() for batch in draw_batches(corpus, 1000, 1, 64)}) == windows
    with pytest.raises(ValueError, match="batches must be at least 1, got 0"):
        draw_batches(corpus, 0, 1, 64)


def test_text_alone_has_no_mixture(trained, held_out, other_indexer):
    graphdef, params = trained
    only_text = HeldOut({"text": held_out.parts["text"]})
    losses = held_out_losses(graphdef, params, only_text, attention="dense")
    assert list(losses) == ["text"]
    assert losses["text"] == held_out_losses(graphdef, params, held_out, attention="dense")["text"]
    kept, _ = measure_selections(graphdef, params, only_text, indexers={"other": other_indexer})
    assert set(kept.mass) == set(kept.queries) == {"text"}


def test_a_mixture_lacks_what_a_part_lacks(held_out):
    assert held_out.mix({"text": None, "whole": 2.0}) is None
    assert held_out.mix({"text": 1.0, "whole": 2.0}) == 1.75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(subsets={"code": {}}), r"of the parts \['text', 'whole'\], got \['code'\]"),
        (dict(mixture={"code": 1.0}), r"of the parts \['text', 'whole'\], got \['code'\]"),
        (dict(subsets={"whole": {"digits": ()}}), "must have a mask for each batch, of 2"),
    ],
)
def test_bad_held_out_data_are_named(held_out, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(held_out, **changes)


def test_gap_closed():
    mass = {"indexer": [0.8, 0.5], "window": [0.6, 0.5], "oracle": [0.9, 0.5]}
    kept = KeptMass(8, {"all": mass}, {"all": 10})
    first, second = kept.gap_closed(part="all")
    assert first == pytest.approx(2 / 3) and second is None
    assert kept.mean("indexer", "all") == pytest.approx(0.65)
    assert kept.mean_gap_closed(part="all") == pytest.approx((0.65 - 0.55) / (0.7 - 0.55))
    assert kept.mean_gap_closed("window", part="all") == 0
    assert kept.mean_gap_closed(part="answers") is None
