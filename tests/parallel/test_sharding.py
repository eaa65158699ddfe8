"""Sharding: what a mesh may be, which parameter is split how, and which shard owns which part of the sequence."""

import ast
import dataclasses
import math
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.tree_util import tree_flatten_with_path
from sharded_cases import EVERY_MESH, LENGTH, ROWS, mesh_config, mesh_of, random_batch
from train_cases import small_config, small_phases

from dsa_jax import Config
from dsa_jax.parallel import sharding
from dsa_jax.parallel.sharding import (
    AXES,
    check_batch,
    check_model,
    describe,
    imbalance,
    make_mesh,
    parameter_axes,
    parameter_shardings,
    parse_mesh,
    path_names,
    place_batch,
    shards,
    spec,
    zigzag_order,
)
from train import state
from train.state import abstract_params, init_state

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = {"deepseek_v32": Config.deepseek_v32(), "tiny": Config.tiny()}


def abstract_mesh(text):
    """Makes a mesh without devices."""
    return state.abstract_mesh(parse_mesh(text))


def parameters(config):
    """Lists (names of the path, array) of every parameter."""
    leaves = tree_flatten_with_path(abstract_params(config)[1])[0]
    return [(path_names(path), leaf) for path, leaf in leaves]


# The mesh.


def test_a_mesh_has_all_axes_in_one_order():
    mesh = make_mesh({"tensor": 2, "data": 4})
    assert mesh.axis_names == AXES and mesh.devices.shape == (4, 1, 1, 2)
    assert parse_mesh(describe(mesh.shape)) == dict(mesh.shape)
    assert parse_mesh(" context = 4,data=2") == dict(data=2, context=4, expert=1, tensor=1)
    assert make_mesh({}, jax.devices()[:1]).size == 1


@pytest.mark.parametrize("text", ["data", "data=2,data=4", "data=-1", "data=two", "data=2;context=4", "data:2"])
def test_what_does_not_read_like_a_mesh(text):
    with pytest.raises(ValueError, match=f"read like data=2,context=4, each axis once, got {text!r}"):
        parse_mesh(text)


def test_unknown_axes_and_sizes_are_named():
    with pytest.raises(ValueError, match="mesh axes must be among data, context, expert, tensor, got model"):
        parse_mesh("data=2,model=4")
    with pytest.raises(ValueError, match="mesh axis context must be at least 1, got 0"):
        make_mesh({"data": 8, "context": 0})


@given(st.tuples(*[st.integers(1, 9)] * 4), st.integers(1, 8))
def test_the_nearest_mesh_is_one(sizes, count):
    sizes, devices = dict(zip(AXES, sizes, strict=True)), jax.devices()[:count]
    if math.prod(sizes.values()) == count:
        assert dict(make_mesh(sizes, devices).shape) == sizes
        return
    with pytest.raises(ValueError, match=f"must multiply to the {count} devices") as error:
        make_mesh(sizes, devices)
    message = str(error.value)
    assert f"got {describe(sizes)} = {math.prod(sizes.values())};" in message
    nearest = parse_mesh(re.search("nearest: (.*)$", message)[1])
    assert make_mesh(nearest, devices).size == count
    assert all(nearest[axis] == sizes[axis] or sizes[axis] % nearest[axis] == 0 for axis in AXES[1:])


SPLIT = [  # a mesh, a size that it does not divide, and the nearest of its divisors
    ("tensor=3", dict(num_attention_heads=8), "tensor=3 must divide num_attention_heads 8", "tensor=4"),
    ("tensor=16", dict(num_attention_heads=8), "tensor=16 must divide num_attention_heads 8", "tensor=8"),
    ("tensor=8", dict(num_attention_heads=8, vocab_size=252), "tensor=8 must divide vocab_size 252", "tensor=4"),
    ("tensor=8", dict(num_attention_heads=8, intermediate_size=12), "divide intermediate_size 12", "tensor=4"),
    ("tensor=8", dict(num_attention_heads=8, moe_intermediate_size=4), "divide moe_intermediate_size 4", "tensor=4"),
    ("data=5", {}, "data=5 must divide hidden_size 16", "data=4"),
    ("data=16", dict(kv_lora_rank=8), "data=16 must divide kv_lora_rank 8", "data=8"),
    ("data=16", dict(q_lora_rank=8), "data=16 must divide q_lora_rank 8", "data=8"),
    ("expert=8", dict(n_routed_experts=12), "expert=8 must divide n_routed_experts 12", "expert=6"),
]


@pytest.mark.parametrize(("mesh", "changes", "message", "nearest"), SPLIT)
def test_a_model_that_a_mesh_cannot_split(mesh, changes, message, nearest):
    config = small_config(**changes)
    with pytest.raises(ValueError, match=message) as error:
        check_model(abstract_mesh(mesh), config)
    axis, found = mesh.split("=")[0], re.search("nearest that does: ([0-9]+)$", str(error.value))[1]
    assert f"{axis}={found}" == nearest
    check_model(abstract_mesh(nearest), config)


def test_a_mesh_of_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"must have the axes .*, as `make_mesh` gives it, got \('x',\)"):
        check_model(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)), small_config())


def test_layers_that_a_model_does_not_have_are_not_split():
    check_model(abstract_mesh("expert=3"), small_config(num_hidden_layers=1))  # no experts
    check_model(abstract_mesh("tensor=2"), small_config(first_k_dense_replace=0, intermediate_size=3))
    with pytest.raises(ValueError, match="tensor=2 must divide intermediate_size 3"):
        check_model(abstract_mesh("tensor=2"), small_config(intermediate_size=3))


def test_a_batch_that_a_mesh_cannot_split():
    mesh = abstract_mesh("data=4,context=2,expert=2")
    check_batch(mesh, batch_size=8, seq_len=24)
    with pytest.raises(ValueError, match="data=4 must divide the batch size 6; nearest that does: 3"):
        check_batch(mesh, batch_size=6, seq_len=24)
    check_batch(abstract_mesh("data=3"), batch_size=6, seq_len=5)
    chunks, rows = "two chunks for each of the context=2 × expert={} shards", "tensor={} shares out a shard's tokens"
    for text, unit, why in (
        ("data=4,context=2,expert=2", 8, chunks.format(2)),
        ("tensor=8", 8, rows.format(8)),
        ("context=2,tensor=4", 8, f"{chunks.format(1)}; {rows.format(4)}"),
        ("context=2,tensor=3", 12, f"{chunks.format(1)}; {rows.format(3)}"),
    ):
        for length in (1, 5, 10, 29, 100):
            wrong = rf"must be a multiple of {unit} \({why}\), got {length}; nearest: (\d+)$"
            with pytest.raises(ValueError, match=wrong) as error:
                check_batch(abstract_mesh(text), batch_size=4, seq_len=length)
            nearest = int(re.search(wrong, str(error.value))[1])
            check_batch(abstract_mesh(text), batch_size=4, seq_len=nearest)
            assert abs(nearest - length) <= max(unit // 2, unit - length)


@pytest.mark.parametrize("name", EVERY_MESH)
def test_every_mesh_of_eight_suits_the_tests(name):
    mesh = abstract_mesh(name)
    assert mesh.size == 8 and len(EVERY_MESH) == len(set(EVERY_MESH)) == 20
    check_model(mesh, mesh_config())
    check_batch(mesh, batch_size=ROWS, seq_len=LENGTH)


# Parameters.


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_fully_sharded_but_norms_and_the_routers_bias(name):
    seen = set()
    for names, leaf in parameters(dataclasses.replace(CONFIGS[name], expert_dtype="fp8", num_nextn_predict_layers=1)):
        axes = parameter_axes(names, leaf.ndim)
        assert len(axes) == leaf.ndim
        small = names[-1] == "e_score_correction_bias" or names[-2].endswith("norm")
        assert axes.count("fsdp") == (not small), names
        assert not small or not any(axes), names
        seen |= {key for key in sharding.PARAMETERS if ".".join(names).endswith(key)}
    assert seen == sharding.PARAMETERS.keys(), "an entry of the table that no parameter has"


def bytes_a_device(config, text):
    """Counts the bytes of all float32 parameters, and of those that one device of the mesh holds."""
    mesh, tree = abstract_mesh(text), abstract_params(config)[1]
    placed = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), tree, parameter_shardings(tree, mesh))
    return 4 * sum(x.size for x in jax.tree.leaves(tree)), 4 * sum(jax.tree.leaves(placed))


def test_a_device_holds_its_share():
    config = CONFIGS["deepseek_v32"]
    whole, part = bytes_a_device(config, "data=32")
    assert 2.6e12 < whole < 2.8e12
    assert whole / 32 < part < whole / 32 + 8e6, "61 layers of norms and biases are all that is on every device"
    experts = (
        4 * config.num_moe_layers * config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size
    )
    assert bytes_a_device(config, "data=32,context=4") == (whole, part)
    assert part - bytes_a_device(config, "data=32,expert=8")[1] == experts / 32 * 7 / 8
    less = bytes_a_device(config, "data=32,expert=8,tensor=8")[1]
    indexer = {"wq_b", "wk", "weights_proj", "weight", "q_a_proj", "kv_a_proj_with_mqa"}  # not over `tensor`
    kept = 4 * sum(x.size for names, x in parameters(config) if names[-1] in indexer) / 32
    assert less < experts / (32 * 8 * 8) + (whole - experts) / (32 * 8) + kept + 8e6


@pytest.mark.parametrize("phase", ["BASE", "WARMUP", "SPARSE"])
def test_moments_live_where_their_parameters_do(phase):
    """BASE has Muon, whose state is another tree."""
    mesh, settings = abstract_mesh("data=2,expert=2,tensor=2"), small_phases()[phase]
    params = abstract_params(mesh_config())[1]
    where = {}
    for path, x in tree_flatten_with_path(parameter_shardings(params, mesh))[0]:
        where[path_names(path)[1:]] = x
    state = jax.eval_shape(lambda p: init_state(p, settings, jnp.zeros(2, jnp.uint32)), params)
    moments = 0
    for path, x in tree_flatten_with_path(parameter_shardings(state, mesh))[0]:
        known = [names for names in where if path_names(path)[-len(names) :] == names]
        assert x == where[known[0]] if known else not any(x.spec), path
        moments += bool(known) and "opt_state" in str(path)
    trained = sum(len(jax.tree.leaves(params[group])) for group in settings.phase.trains)
    assert trained <= moments <= 2 * trained


# The sequence.


@given(st.integers(1, 9), st.integers(1, 5))
def test_zigzag_is_a_permutation_that_gives_a_shard_its_two_chunks(count, width):
    length = 2 * count * width
    order = zigzag_order(length, count)
    assert order.dtype.kind == "i" and sorted(order) == list(range(length))
    chunks = order.reshape(count, 2, width)
    for shard in range(count):
        if count > 1:
            np.testing.assert_array_equal(chunks[shard, 0], shard * width + np.arange(width))
            np.testing.assert_array_equal(chunks[shard, 1], (2 * count - 1 - shard) * width + np.arange(width))
    np.testing.assert_array_equal(zigzag_order(length, 1), np.arange(length))


@given(st.integers(2, 9), st.integers(1, 5))
def test_causal_work_is_exactly_even(count, width):
    length = 2 * count * width
    stop = np.arange(1, length + 1)[None].repeat(2, axis=0)
    start = np.zeros_like(stop)
    assert imbalance(start, stop, count) == 0
    neighbours = stop[:, np.argsort(zigzag_order(length, count))]  # as if shards owned 2 · width in a row
    expected = (count - 1) * width / ((length + 1) / 2)
    np.testing.assert_allclose(imbalance(start, neighbours, count), expected)


def test_packed_work_is_as_uneven_as_it_is():
    start, stop = np.zeros((1, 8), int), np.array([[1, 2, 0, 0, 0, 0, 0, 0]])
    assert imbalance(start, stop, 2) == 1.0, "all of it with the first of two"
    assert imbalance(start, start, 4) == 0.0, "nobody has any"
    batch = random_batch(0)
    for count in (2, 4, 8):
        work = np.maximum(batch.stop - batch.start, 0).sum(0).reshape(2 * count, -1).sum(1)
        work = work[:count] + work[::-1][:count]
        np.testing.assert_allclose(imbalance(batch.start, batch.stop, count), work.max() / work.mean() - 1)


@pytest.mark.parametrize("name", ["data=2,context=2,expert=2", "data=8", "context=8", "context=2,expert=4", "tensor=8"])
def test_every_device_gets_its_rows_and_chunks(name):
    mesh = mesh_of(name)
    batch = SimpleNamespace(tokens=np.arange(8 * 48, dtype=np.int32).reshape(8, 48))
    placed = place_batch(vars(batch), mesh)["tokens"]
    assert placed.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec("batch", "sequence")), 2)
    count = shards(mesh, "sequence")
    chunks, rows = batch.tokens.reshape(8, 2 * count, -1), 8 // shards(mesh, "batch")
    for shard in placed.addressable_shards:
        [[data, context, expert, _]] = np.argwhere(mesh.devices == shard.device)
        mine = context * mesh.shape["expert"] + expert
        part = chunks[data * rows : (data + 1) * rows]
        wanted = part.reshape(rows, -1) if count == 1 else np.concatenate([part[:, mine], part[:, -1 - mine]], axis=1)
        np.testing.assert_array_equal(shard.data, wanted)
    np.testing.assert_array_equal(np.asarray(placed), batch.tokens[:, zigzag_order(48, count)])


# The table.


def axis_names(source, axes=AXES):
    """Lists the lines on which a string names a mesh axis."""
    constants = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [node.lineno for node in constants if node.value in axes]


def test_one_file_names_the_axes():
    """Where runs are described "data" is a field as well, of what they train on."""
    assert axis_names('x = f("data")\ny = {"tensor": 1}\nz = "the data", data') == [1, 2]
    assert axis_names((ROOT / "dsa_jax" / "parallel" / "sharding.py").read_text())
    for path in [path for top in ("dsa_jax", "train") for path in sorted((ROOT / top).rglob("*.py"))]:
        of_runs = "train" in path.relative_to(ROOT).parts or path.name == "export.py"
        if path.name != "sharding.py":
            assert not axis_names(path.read_text(), AXES[1:] if of_runs else AXES), path
