"""Checkpoints on a mesh: the bits of one device, each shard where it belongs, and little else in memory meanwhile."""

import dataclasses
import gc
import math
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_cases import FP8_CONFIG, SMALL, random_tensors, read, same, to_fp8, write
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from sharded_cases import mesh_of

from dsa_jax.hf import convert, stacked
from dsa_jax.hf import files as hf_files
from dsa_jax.hf.checkpoint import Checkpoint
from dsa_jax.hf.convert import load_hf, save_hf
from dsa_jax.hf.stacked import Piece, Stack
from dsa_jax.hf.table import leaves
from dsa_jax.parallel.sharding import make_mesh, parameter_axes, path_names, spec

pytestmark = pytest.mark.usefixtures("in_a_hurry")

# Both of its layers are in one stack, and many shapes are the same: each has a program for each device.
MOE = dataclasses.replace(
    SMALL,
    first_k_dense_replace=0,
    hidden_size=32,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    index_n_heads=4,
    index_head_dim=16,
    moe_intermediate_size=32,
)
EIGHT = dict(data=2, expert=2, tensor=2)


def parameters(model):
    """Lists a model's parameters by path."""
    return {path_names(path): x for path, x in jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]}


def check_placed(model, expected, mesh):
    """Asserts the bits and dtypes of the model of one device, each parameter where the table of `sharding` has it."""
    actual, expected = parameters(model), parameters(expected)
    assert actual.keys() == expected.keys()
    for path, x in actual.items():
        sharding = NamedSharding(mesh, spec(*parameter_axes(path, x.ndim)))
        assert x.sharding == sharding and x.committed, path
        assert len(x.addressable_shards) == mesh.size, path
        assert {shard.data.shape for shard in x.addressable_shards} == {sharding.shard_shape(x.shape)}, path
        assert x.dtype == expected[path].dtype and np.asarray(x).tobytes() == np.asarray(expected[path]).tobytes(), path
    return actual


class Alive:
    """Counts the bytes of what is read and of its copies on devices, from their birth to their end."""

    def __init__(self, monkeypatch):
        self.now = self.peak = 0
        reading, copying = hf_files.StoredTensor.read, jax.device_put
        monkeypatch.setattr(hf_files.StoredTensor, "read", lambda *a: self.watch(reading(*a)))
        monkeypatch.setattr(jax, "device_put", lambda *a: self.watch(copying(*a)))

    def watch(self, tree):
        for x in jax.tree.leaves(tree):
            owner = x if getattr(x, "base", None) is None else x.base  # views share the memory of their owner
            self.now += owner.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(owner, self.forget, owner.nbytes)
        return tree

    def forget(self, nbytes):
        self.now -= nbytes


def largest_part(config, mesh, itemsize):
    """Counts the bytes of the largest part of a file's tensor that one device holds."""
    sizes = []
    for leaf in leaves(config):
        shape = leaf.shape(config)
        part = NamedSharding(mesh, spec(*parameter_axes(leaf.path, len(shape)))).shard_shape(shape)
        sizes.append(math.prod(part[len(shape) - len(leaf.entry.shape(config)) :]) * itemsize)
    return max(sizes)


@pytest.mark.slow
def test_a_checkpoint_on_a_mesh_and_back(tmp_path, monkeypatch):
    tensors, mesh = random_tensors(MOE), make_mesh(EIGHT)
    folder = write(tmp_path / "hf", tensors, MOE)
    expected = load_hf(folder)
    with monkeypatch.context() as patch:
        alive = Alive(patch)
        model = load_hf(folder, mesh=mesh)
        gc.collect()  # seldom in tests; a small part stood in a cycle of JAX's then and when
        assert alive.peak == 2 * largest_part(MOE, mesh, 2) and alive.now == 0
        assert alive.peak <= 2 * max(x.nbytes for x in tensors.values())
    placed = check_placed(model, expected, mesh)
    assert placed["embed_tokens",].sharding.spec == PartitionSpec(("tensor",), ("data",))
    experts = placed["moe_layers", "mlp", "experts", "down_proj"]
    assert experts.shape == (2, 4, 32, 32) and experts.addressable_shards[0].data.shape == (2, 2, 16, 16)

    taken, take = [], stacked._take
    monkeypatch.setattr(stacked, "_take", lambda *a: (taken.append(a[0]), take(*a))[1])
    save_hf(model, tmp_path / "out", max_shard_bytes=20_000)
    same(read(tmp_path / "out"), tensors)
    assert len(taken) > len(tensors) and all(len(x.sharding.device_set) == 1 for x in taken)


def test_fp8_where_shards_split_its_blocks(tmp_path, monkeypatch):
    stored, dequantized = to_fp8(random_tensors(), np.float32)
    checkpoint, parts = Checkpoint(write(tmp_path / "fp8", stored, keys=FP8_CONFIG)), []
    mesh, reading = mesh_of("data=2,tensor=2"), hf_files.StoredTensor.read
    monkeypatch.setattr(hf_files.StoredTensor, "read", lambda *a: (x := reading(*a), parts.append(x.shape))[0])
    for leaf in leaves(SMALL):
        if leaf.path[-1] not in ("q_b_proj", "o_proj", "down_proj") or leaf.path[0] == "dense_layers":
            continue
        sharding = NamedSharding(mesh, spec(*parameter_axes(leaf.path, len(leaf.shape(SMALL)))))
        x = convert._fill(leaf, checkpoint, dataclasses.replace(SMALL, param_dtype="float32"), sharding)
        assert x.sharding == sharding and x.dtype == jnp.float32
        for index, name in leaf.tensors():
            expected = dequantized[name].astype(np.float32)
            np.testing.assert_array_equal(leaf.entry.to_file(np.asarray(x)[index]), expected)
    assert (80, 2, 32) in parts and (160, 128) not in parts  # of o_proj: from row 80 on, in the middle of a block


def test_a_drawn_indexer_on_a_mesh():
    mesh = mesh_of("data=2")
    indexers = [leaf for leaf in leaves(SMALL) if leaf.entry.indexer]
    shardings = {
        leaf.path: NamedSharding(mesh, spec(*parameter_axes(leaf.path, len(leaf.shape(SMALL))))) for leaf in indexers
    }
    expected = convert._draw_indexers(SMALL, 5, dict.fromkeys(shardings))
    drawn = convert._draw_indexers(SMALL, 5, shardings)
    assert drawn.keys() == expected.keys() == shardings.keys()
    for path, x in drawn.items():
        assert x.sharding == shardings[path]
        np.testing.assert_array_equal(x, expected[path])
    assert drawn["dense_layers", "self_attn", "indexer", "wk"].addressable_shards[1].data.shape == (1, 80, 32)


STACKS = [
    dict(context=8),
    dict(expert=8),
    dict(data=2, context=2, expert=2),
    dict(data=4, tensor=2),
    dict(context=2, expert=2, tensor=2),
]


@pytest.mark.parametrize("sizes", STACKS, ids=str)
def test_who_reads_and_who_writes(sizes, monkeypatch):
    """Each part is read once, and written by the devices that hold it, alone and in place."""
    mesh, shape = make_mesh(sizes), (2, 8, 16, 24)
    whole = np.random.default_rng(0).normal(size=shape).astype(jnp.bfloat16)
    sharding = NamedSharding(mesh, spec(None, "experts", "fsdp", "width"))
    stack, reads, writes, place = Stack(shape, jnp.float32, sharding), [], [], stacked._place

    def watched(x, piece, index, *, inputs):
        result = place(x, piece, index, inputs=inputs)
        assert x.is_deleted() and result.sharding.device_set == piece.values.sharding.device_set
        writes.append(result.device)
        return result

    def read_part(part):
        reads.append(part)
        return Piece(np.ascontiguousarray(whole[tensor][part].T))

    monkeypatch.setattr(stacked, "_place", watched)
    for tensor in np.ndindex(2, 8):
        reads.clear()
        writes.clear()
        stack.place(tensor, read_part, inputs=1)
        holders = [
            device
            for device, index in sharding.devices_indices_map(shape).items()
            if index[1].indices(8)[0] <= tensor[1] < index[1].indices(8)[1]
        ]
        assert sorted(d.id for d in writes) == sorted(d.id for d in holders)
        assert len(holders) == 8 // mesh.shape["expert"]
        assert len(reads) == len(set(reads)) == mesh.shape["data"] * mesh.shape["tensor"]
    x = stack.array()
    assert x.sharding == sharding and x.dtype == jnp.float32
    np.testing.assert_array_equal(x, whole.astype(np.float32))
    np.testing.assert_array_equal(stacked.tensor_at(x, (1, 5)), whole[1, 5].astype(np.float32))


def test_placing_gathers_nothing(monkeypatch):
    """The programs that place parts of a mesh's parameter are of one device, write in place and need no room."""
    texts, place = [], stacked._place

    def compiled(x, piece, index, *, inputs):
        program = place.lower(x, piece, index, inputs=inputs).compile()
        memory = program.memory_analysis()
        assert memory is not None and memory.alias_size_in_bytes == memory.output_size_in_bytes == x.nbytes
        assert memory.temp_size_in_bytes <= piece.values.nbytes
        texts.append(program.as_text())
        return place(x, piece, index, inputs=inputs)

    monkeypatch.setattr(stacked, "_place", compiled)
    sharding = NamedSharding(mesh_of("data=2"), spec(None, "experts", "fsdp", "width"))
    stack = Stack((3, 4, 256, 32), jnp.bfloat16, sharding)
    stack.place((1, 2), lambda part: Piece(np.ones((32, 128), jnp.bfloat16)), inputs=1)
    scale, rows, columns = np.ones((1, 2), np.float32), np.zeros(32, np.int32), np.zeros(128, np.int32)
    fp8 = np.ones((32, 128), jnp.float8_e4m3fn)
    stack.place((1, 3), lambda part: Piece(fp8, scale, rows, columns), inputs=1)
    assert len(texts) == 4
    for text in texts:
        assert "input_output_alias" in text and "num_partitions" not in text
        assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "collective") if op in text]


def test_a_mesh_that_does_not_fit(tmp_path, monkeypatch):
    folder = write(tmp_path / "hf", random_tensors())

    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(hf_files.StoredTensor, "read", refuse)
    with pytest.raises(ValueError, match="must have the axes"):
        load_hf(folder, mesh=jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2))
    with pytest.raises(ValueError, match="tensor=8 must divide num_attention_heads 4; nearest that does: 4"):
        load_hf(folder, mesh=make_mesh(dict(tensor=8)))
    with pytest.raises(ValueError, match="expert=8 must divide n_routed_experts 4; nearest that does: 4"):
        load_hf(folder, mesh=make_mesh(dict(expert=8)))


PROCESS = """
import sys
import jax, numpy as np
from flax import nnx
from safetensors.numpy import load_file
from dsa_jax.hf.convert import load_hf, to_hf
from dsa_jax.parallel.sharding import make_mesh, path_names
folder, address, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, rank)
model = load_hf(folder + "/hf", mesh=make_mesh(dict(data=2)))
expected, shards = load_file(folder + "/whole.safetensors"), 0
for path, x in jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]:
    assert len(x.sharding.device_set) == 2 and not x.is_fully_addressable
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[".".join(path_names(path))][shard.index])
        shards += shard.data.shape != x.shape
try:
    list(to_hf(model))
except ValueError as error:
    print(f"{shards} shards; {error}")
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each process places what its own devices hold; neither can export alone, and says so."""
    whole = parameters(load_hf(write(tmp_path / "hf", random_tensors(MOE), MOE)))
    save_file({".".join(path): np.asarray(x) for path, x in whole.items()}, tmp_path / "whole.safetensors")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), address, str(rank)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=120)
            assert process.returncode == 0, error
            assert out.startswith("17 shards; to_hf and save_hf must have every shard in their own process")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
