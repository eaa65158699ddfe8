"""Moments in bfloat16: the two neighbours of every number, the mean, AdamW in float64, and the same bits anywhere."""

import dataclasses
import functools
import json
import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_cases import one_layer_run, small_batch, small_config, small_params, small_phases

from dsa_jax.parallel.sharding import make_mesh, parameter_shardings, place_batch
from train.commands.overrides import set_fields
from train.data import load
from train.moments import MOMENTS, round_stochastically, store_rounded
from train.optimizer import OptimizerSettings, make_optimizer
from train.run import Run
from train.settings import RunConfig
from train.state import abstract_params, init_state, place_state
from train.step import make_step

pytestmark = pytest.mark.usefixtures("in_a_hurry")

KEY, RANDOM = jax.random.key(0), jnp.asarray([0, 7], jnp.uint32)
LARGEST = 2.0**128 - 2.0**120  # of the finite bfloat16 numbers
ROUNDED = OptimizerSettings(1e-2, moment_dtype="bfloat16", clip=1e12)
nearest = lambda x, key: x.astype(jnp.bfloat16)


def neighbours(x):
    """The bfloat16 numbers around float32 numbers, toward zero and away from it, in float64 by their spacing."""
    x = np.asarray(x, np.float64)
    exponent = np.maximum(np.frexp(x)[1] - 1, -126)
    spacing = np.ldexp(1.0, exponent - 7)
    inner = np.floor(np.abs(x) / spacing) * spacing
    outer = np.where(inner == np.abs(x), inner, inner + spacing)
    return np.sign(x) * inner, np.sign(x) * np.where(outer > LARGEST, LARGEST, outer)


def hard_numbers():
    """Numbers of every size and sign, those around powers of two, subnormal ones, and the largest."""
    rng = np.random.default_rng(0)
    sizes = np.ldexp(rng.uniform(1, 2, 4000), rng.integers(-149, 128, 4000))
    edges = [np.nextafter(np.float32(2.0**e), np.float32(0)) for e in (-126, -10, 0, 127)]
    values = np.array(
        [*sizes, *edges, 0.0, LARGEST, np.nextafter(np.float32(2.0**127), np.float32(np.inf))], np.float32
    )
    return np.concatenate([values, -values])


def test_a_number_becomes_one_of_its_neighbours():
    x = hard_numbers()
    inner, outer = neighbours(x)
    found = {key: np.asarray(round_stochastically(jnp.asarray(x), jax.random.key(key)), np.float64) for key in range(8)}
    seen = np.stack(list(found.values()))
    assert ((seen == inner) | (seen == outer)).all() and (np.signbit(seen) == np.signbit(x)).all()
    assert (seen[:, inner == outer] == x[inner == outer]).all()
    moves = (outer != inner) & (np.abs(x) < 2.0**127) & (np.abs(x) > 2.0**-126)
    assert (seen != inner)[:, moves].mean() == pytest.approx(0.5, abs=0.02)
    assert (seen != seen[0]).any(axis=0)[moves].mean() == pytest.approx(1 - 2 / 9, abs=0.02)  # of P uniform


def test_what_is_not_finite_stays_and_what_is_finite_stays_finite():
    """NaN of any payload: added bits would carry it over to zero, and cutting would leave an infinity."""
    payloads = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    largest = np.finfo(np.float32).max
    x = jnp.asarray(np.tile(np.concatenate([payloads, np.array([np.inf, -np.inf, largest, -largest], "f4")]), (500, 1)))
    rounded = np.asarray(round_stochastically(x, KEY).astype(jnp.float32))
    assert np.isnan(rounded[:, : len(payloads)]).all()
    assert (rounded[:, len(payloads) :] == [np.inf, -np.inf, LARGEST, -LARGEST]).all()


def test_the_mean_of_many_roundings_is_the_number():
    """Within five standard deviations of the mean of 20,000; nearest would be off by hundreds."""
    values = np.array([1 + 2.0**-9, 1 + 2.0**-8, 2 - 2.0**-10, -3.1415927, 1e-3, 6.02e23, 1e-39, 127 / 128], np.float32)
    count = 20_000
    seen = np.asarray(round_stochastically(jnp.tile(values, (count, 1)), KEY), np.float64)
    inner, outer = neighbours(values)
    width = np.abs(outer - inner)
    share = np.divide(np.abs(values - inner), width, out=np.zeros(len(values)), where=width > 0)
    deviation = width * np.sqrt(share * (1 - share) / count)
    assert (np.abs(seen.mean(0) - values) <= 5 * deviation).all()
    off = np.abs(np.asarray(nearest(jnp.asarray(values), KEY), np.float64) - values)
    assert (off[:1] > 50 * deviation[:1]).all()


def test_a_moment_moves_by_less_than_half_its_last_bit_a_step():
    """A second moment of 1 decays by a thousandth a step, which to the nearest is never."""
    params = jnp.zeros(4096)

    def decayed(rounding, steps=700):
        adam = store_rounded(optax.scale_by_adam(b2=0.999), rounding)
        state = adam.init(params)
        state = state._replace(nu=jnp.ones_like(state.nu))
        advance = lambda state, step: (adam.update(params, state, random=RANDOM, step=step)[1], None)
        return np.asarray(jax.lax.scan(advance, state, jnp.arange(steps))[0].nu, np.float64)

    assert (decayed(nearest) == 1).all()
    found = decayed(round_stochastically)
    assert found.mean() == pytest.approx(0.999**700, rel=5e-3)
    assert 0.02 < found.std() / found.mean() < 0.2


def adamw(grads, params, settings):
    """AdamW (arXiv:1711.05101, Algorithm 2) in float64, without a schedule: parameters and both moments."""
    m = v = np.zeros_like(params)
    for step, grad in enumerate(grads, 1):
        m = settings.b1 * m + (1 - settings.b1) * grad
        v = settings.b2 * v + (1 - settings.b2) * grad**2
        rate = m / (1 - settings.b1**step) / (np.sqrt(v / (1 - settings.b2**step)) + 1e-8)
        params = params - settings.learning_rate * (rate + settings.weight_decay * params)
    return params, m, v


def test_adamw_is_that_of_float64_but_for_the_rounding_of_its_moments():
    """An error of a last bit a step, forgotten at the moment's own pace, and none on average."""
    rng, steps = np.random.default_rng(1), 30
    start, grads = rng.normal(size=5000), rng.normal(size=(steps, 5000)) + 0.3
    expected = adamw(grads, start, ROUNDED)
    optimizer = make_optimizer(ROUNDED, steps)

    @jax.jit
    def advance(carry, step):
        params, state = carry
        grad = {"lm_head": jnp.asarray(grads, jnp.float32)[step]}
        updates, state = optimizer.update(grad, state, params, random=RANDOM, step=step)
        return (optax.apply_updates(params, updates), state), None

    params = {"lm_head": jnp.asarray(start, jnp.float32)}
    (params, state), _ = jax.lax.scan(advance, (params, optimizer.init(params)), jnp.arange(steps))
    for name, moment, decay in (("mu", expected[1], ROUNDED.b1), ("nu", expected[2], ROUNDED.b2)):
        found = optax.tree.get(state, name)["lm_head"]
        assert found.dtype == jnp.bfloat16
        error = np.asarray(found, np.float64) - moment
        size = np.sqrt(np.mean(moment**2))
        spread = 2.0**-7 / math.sqrt(6) / math.sqrt(1 - decay**2)  # of a last bit, at most 2^-7, added up
        assert np.sqrt(np.mean(error**2)) < spread * size
        assert np.abs(error).max() < 2.0**-7 / (1 - decay) * np.abs(moment).max()
        assert abs(error.mean()) < 5 * spread * size / math.sqrt(error.size)
    moved = np.sqrt(np.mean((expected[0] - start) ** 2))
    assert 0 < np.sqrt(np.mean((np.asarray(params["lm_head"]) - expected[0]) ** 2)) < 0.01 * moved


# The same bits


@functools.cache
def layer_params():
    rng = np.random.default_rng(0)
    shapes = {"gate_proj": (2, 8, 64, 32), "up_proj": (2, 8, 64, 32), "down_proj": (2, 8, 32, 64)}
    experts = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return {"moe_layers": {"mlp": {"experts": experts}}, "lm_head": jnp.asarray(rng.normal(size=(64, 128)), "float32")}


def advance(settings, params, steps, *, mesh=None, random=RANDOM, first=0):
    """Parameters and state after some steps of gradients that are the first parameters."""
    optimizer, grads = make_optimizer(settings, 10), params
    state, place = optimizer.init(params), lambda tree: tree
    if mesh is not None:
        place = lambda tree: jax.lax.with_sharding_constraint(tree, parameter_shardings(tree, mesh))
        params, state, grads = (
            jax.device_put(tree, parameter_shardings(tree, mesh)) for tree in (params, state, grads)
        )

    @jax.jit
    def step(params, state, grads, number):
        updates, state = optimizer.update(grads, state, params, random=random, step=number)
        return place((optax.apply_updates(params, updates), state))

    for number in range(first, first + steps):
        params, state = step(params, state, grads, number)
    return params, state


def test_a_mesh_has_the_bits_of_one_device():
    sizes = {"data": 2, "expert": 2, "tensor": 2}
    chex.assert_trees_all_equal(
        advance(ROUNDED, layer_params(), 3, mesh=make_mesh(sizes)), advance(ROUNDED, layer_params(), 3)
    )


def moments(state):
    """The moments of a state, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if set(MOMENTS) & set(name.split("/"))}


def test_every_moment_is_rounded_by_bits_of_its_own():
    """Muon's and AdamW's, by the run's key and the step too; arrays of one shape are told apart by their paths."""
    settings = dataclasses.replace(ROUNDED, muon_learning_rate=0.02)
    params = jax.tree.map(lambda x: jnp.full_like(x, 0.3), layer_params())
    found = moments(advance(settings, params, 1)[1])
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(jnp.bfloat16)}
    gate, up = (found[name] for name in found if "mu" in name and name.endswith(("gate_proj", "up_proj")))
    assert (gate != up).mean() > 0.2
    assert len(found) == 5
    raised = {name: np.asarray(leaf > leaf.min()) for name, leaf in found.items()}
    assert all(0.1 < part.mean() < 0.9 for part in raised.values()), {n: p.mean() for n, p in raised.items()}
    first, second = (raised[name] for name in raised if name.endswith(("mu/lm_head", "nu/lm_head")))
    assert (first != second).mean() > 0.2
    for change in (dict(random=RANDOM + 1), dict(first=1)):
        other = moments(advance(settings, params, 1, **change)[1])
        assert all((np.asarray(found[name]) != np.asarray(other[name])).any() for name in found), change
    chex.assert_trees_all_equal(found, moments(advance(settings, params, 1)[1]))


def test_a_bad_gradient_shows_in_the_moments():
    params = {"lm_head": jnp.ones(3)}
    optimizer = make_optimizer(dataclasses.replace(ROUNDED, clip=1.0), 10)
    grads = {"lm_head": jnp.asarray([1.0, jnp.nan, jnp.inf])}
    updates, state = optimizer.update(grads, optimizer.init(params), params, random=RANDOM, step=0)
    assert not np.isfinite(updates["lm_head"][1:]).any()
    assert not np.isfinite(np.asarray(optax.tree.get(state, "nu")["lm_head"], np.float32)[1:]).any()
    with pytest.raises(ValueError, match="must be given random and step, got no step"):
        optimizer.update(grads, state, params, random=RANDOM)


def test_on_a_gpu_nothing_but_elementwise_operations_is_added():
    """No loop and no call, which would write random bits or float32 moments to memory."""
    params = jax.eval_shape(layer_params)
    texts = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(ROUNDED, moment_dtype=dtype), 10)
        update = jax.jit(lambda g, s, p, o=optimizer: o.update(g, s, p, random=RANDOM, step=3))
        traced = update.trace(params, jax.eval_shape(optimizer.init, params), params)
        texts[dtype] = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "bf16" in texts["bfloat16"] and "bf16" not in texts["float32"]
    for name in ("while", "custom_call", "dot_general", "reduce(", "gather", "scatter", "sort"):
        assert texts["bfloat16"].count(f"stablehlo.{name}") == texts["float32"].count(f"stablehlo.{name}"), name


# In a run


def rounded_run(folder, steps=4) -> RunConfig:
    """BASE alone, of AdamW whose moments are bfloat16."""
    run = dataclasses.replace(one_layer_run(folder), checkpoint_every=2, keep_checkpoints=9).select(("BASE",))
    return set_fields(run, [f"phases.BASE.stages.0.steps={steps}", "phases.BASE.backbone.moment_dtype=bfloat16"])


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_an_unbroken_one_and_keeps_its_dtype(tmp_path):
    """Another dtype is refused by the field where the run recorded it, and by the arrays where the run is older."""
    config, out = rounded_run(tmp_path / "text"), tmp_path / "out"
    assert RunConfig.from_json(config.to_json()) == config
    run = Run(config, out)
    whole = run.train(load(config.data))
    assert {leaf.dtype for leaf in moments(whole.opt_state).values()} == {jnp.dtype(jnp.bfloat16)}
    shutil.rmtree(out / "checkpoints" / "4")
    chex.assert_trees_all_equal(run.train(load(config.data), resume=True), whole)
    assert [record["step"] for record in run.records()] == [1, 2, 3, 4]
    other = set_fields(config, ["phases.BASE.backbone.moment_dtype=float32", "phases.BASE.stages.0.steps=5"])
    with pytest.raises(ValueError, match="moment_dtype 'bfloat16', here 'float32' .the dtype of moments stays"):
        Run(other, out).train(load(config.data), resume=True)
    for path in (out / "run.json", *out.glob("checkpoints/*/meta/metadata")):
        values = json.loads(path.read_text())
        del values["run"]["phases"][0]["backbone"]["moment_dtype"]
        path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="holds bfloat16 moments of the backbone, the run's moment_dtype is float32"):
        Run(other, out).train(load(config.data), resume=True)


@pytest.mark.slow
def test_a_step_on_a_mesh_has_the_moments_of_one_device():
    """But for gradients that differ by rounding, which may take a moment to the other neighbour."""
    sizes = {"data": 2, "expert": 2, "tensor": 2}
    config = small_config(num_attention_heads=4)
    settings = small_phases()["SPARSE"]
    groups = {
        name: dataclasses.replace(getattr(settings, name), moment_dtype="bfloat16") for name in settings.phase.trains
    }
    settings, batch, mesh = dataclasses.replace(settings, **groups), small_batch(length=32), make_mesh(sizes)
    graphdef, params = abstract_params(config)[0], jax.tree.map(jnp.asarray, small_params(config))
    one, many = (init_state(params, settings, RANDOM) for _ in range(2))
    one, _ = make_step(graphdef, settings)(one, batch)
    many, _ = make_step(graphdef, settings, mesh=mesh)(place_state(many, mesh), place_batch(batch, mesh))
    found, expected = (moments(state.opt_state) for state in (many, one))
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        a, b = (np.asarray(x, np.float64) for x in (found[name], leaf))
        assert (a == b).mean() > 0.98, name
        assert (np.abs(a - b) <= 2.0**-7 * np.maximum(np.abs(a), np.abs(b)) + 1e-4 * np.abs(b).max()).all(), name
