"""Each process reads its own rows and places alone, and on every mesh the batches are the same."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
from shard_cases import random_documents, write_shards
from sharded_cases import mesh_of
from train_cases import batch_at, one_layer_run, small_config, small_phases

from dsa_jax.parallel.sharding import place_batch
from train.data import TOKEN_FIELDS, DataConfig, load
from train.run import Run
from train.settings import Stage, stream_seed

ROOT = Path(__file__).parents[3]
PATIENCE = 300.0  # seconds that two processes may take on a busy machine
SHAPE = {"batch_size": 8, "seq_len": 32, "seed": 3}
BATCHES = 6
MESHES = ["data=8", "data=2,context=4", "context=8", "data=2,tensor=4", "data=2,expert=2,context=2", "tensor=8"]

# Tokens that each of two processes asks for besides its half of a batch: the target behind each run of places that it
# holds of a row. Of four shards of the context the last holds two chunks that are neighbours.
EXTRA = {"data=4": (4, 4), "context=4": (8 * 4, 8 * 3), "data=2,tensor=2": (4, 4)}

# What a process prints: the bytes of tokens that it asked for, and a hash of all that its devices hold.
SCRIPT = """
import hashlib, json, sys, jax, numpy as np
from dsa_jax.parallel.sharding import make_mesh, parse_mesh
from train.data import DataConfig, load
values = json.loads(sys.argv[1])
jax.distributed.initialize(values["address"], 2, values["process"])
found = {}
for mesh in values["meshes"]:
    corpus = load(DataConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values["config"].items()}))
    batches = corpus.part_dataset("train", mesh=make_mesh(parse_mesh(mesh)), **values["shape"])
    parts = []
    for number in range(values["batches"]):
        batch = batches[number].place()
        for shard in batch.tokens.addressable_shards:
            parts.append([number, str(shard.index), hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()])
    found[mesh] = {"bytes": sum(s.documents.reader.bytes_read for s in corpus.train_sources), "parts": parts}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sources of shards, as `DataConfig` takes them."""
    folder = tmp_path_factory.mktemp("data")
    for name, seed in (("a", 0), ("b", 1)):
        write_shards(folder / name, [random_documents(50, seed=seed), random_documents(30, seed=seed + 2)])
    return (f"a=0.75:{folder}/a", f"b=0.25:{folder}/b")


def bytes_read(corpus) -> int:
    return sum(source.documents.reader.bytes_read for source in corpus.train_sources)


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
@pytest.mark.parametrize("mesh", MESHES)
def test_parts_are_the_whole_batch_on_every_mesh(data, mesh, pack):
    corpus, mesh = load(DataConfig(data=data, pack=pack)), mesh_of(mesh)
    whole, parts = corpus.dataset("train", **SHAPE), corpus.part_dataset("train", mesh=mesh, **SHAPE)
    for number in (0, 5):
        expected, found = place_batch(batch_at(whole, number), mesh), batch_at(parts, number).place()
        for name in TOKEN_FIELDS:
            x, y = getattr(expected, name), getattr(found, name)
            assert x.dtype == y.dtype and x.sharding == y.sharding
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_replicas_are_read_once_and_no_token_twice(data):
    """Of one process's devices all parts together are the batch; a part ends with the target of its last token."""
    for mesh, parts_a_row in (("tensor=8", 1), ("data=8", 1), ("context=4,data=2", 8)):
        corpus = load(DataConfig(data=data))
        batches = corpus.part_dataset("train", mesh=mesh_of(mesh), **SHAPE)
        for number in range(BATCHES):
            batch_at(batches, number)
        runs = 7 if parts_a_row == 8 else 1  # of the middle shard both chunks are one run
        assert bytes_read(corpus) == 2 * BATCHES * 8 * (32 + runs)


@pytest.fixture(scope="module")
def two_processes(data):
    """Gives the findings of each of two processes of two devices, by mesh, of each packing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    values = {"address": address, "meshes": [*EXTRA], "batches": BATCHES}
    values |= {"config": {"data": data}, "shape": SHAPE}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(values | {"process": i})],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    streams = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], streams
    return [json.loads(out.splitlines()[-1]) for out, _ in streams]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", EXTRA)
def test_each_of_two_processes_asks_for_half_of_the_tokens(data, two_processes, mesh):
    whole = load(DataConfig(data=data))
    dataset = whole.dataset("train", **SHAPE)
    batches = [batch_at(dataset, number) for number in range(BATCHES)]
    half = BATCHES * SHAPE["batch_size"] * SHAPE["seq_len"] // 2
    for found, extra in zip(two_processes, EXTRA[mesh], strict=True):
        assert found[mesh]["bytes"] == 2 * (half + BATCHES * extra)  # uint16
    assert bytes_read(whole) == 2 * BATCHES * SHAPE["batch_size"] * (SHAPE["seq_len"] + 1)
    parts = sorted(tuple(part) for found in two_processes for part in found[mesh]["parts"])
    assert parts == sorted(hashes(batches, mesh))


def hashes(batches, mesh):
    """Hashes what four devices of one process hold of whole batches."""
    placed = [place_batch(batch, mesh_of(mesh)).tokens for batch in batches]
    return [
        (number, str(shard.index), hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest())
        for number, tokens in enumerate(placed)
        for shard in tokens.addressable_shards
    ]


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_a_position_holds_on_every_mesh(data, pack):
    """Saved on one mesh and continued on another, and on one device: exactly the batches that would have come."""
    corpus = load(DataConfig(data=data, pack=pack))
    dataset, number, state = corpus.dataset("train", **SHAPE), 0, None
    for mesh in ("data=8", None, "data=2,context=4", "tensor=8"):
        again = load(DataConfig(data=data, pack=pack))
        batches = again.batches("train", **SHAPE) if mesh is None else again.parts("train", mesh=mesh_of(mesh), **SHAPE)
        if state is not None:
            batches.set_state(state)
        for _ in range(3):
            batch, whole = next(batches), batch_at(dataset, number)
            found = batch if mesh is None else batch.place()
            expected = whole if mesh is None else place_batch(whole, mesh_of(mesh))
            np.testing.assert_array_equal(np.asarray(found.tokens), np.asarray(expected.tokens))
            number += 1
        state = json.loads(json.dumps(batches.get_state()))


def test_a_run_on_a_mesh_reads_its_parts(data, tmp_path):
    """And refuses in them what it refuses in whole batches."""
    stage = Stage(1, 8, 32)
    phases = (small_phases(stage)["BASE"],)
    run = Run(one_layer_run(tmp_path, phases=phases), tmp_path / "out", mesh=mesh_of("data=2,context=2"))
    corpus = load(DataConfig(data=data))
    batches = run._batches(corpus, phases[0], 0)
    placed, _ = run._next_batch(batches, stage)
    seed = stream_seed(run.config.seed, phases[0].phase.stream, 0)
    expected = corpus.dataset("train", batch_size=8, seq_len=32, seed=seed)
    chex.assert_trees_all_equal(placed, place_batch(batch_at(expected, 0), run.mesh))
    small = dataclasses.replace(run, config=dataclasses.replace(run.config, model=small_config(vocab_size=200)))
    with pytest.raises(ValueError, match="tokens must be ids from 0 to 199, got 2"):
        small._next_batch(batches, stage)


def test_data_too_short_for_a_later_stage_are_refused_at_the_start(data, tmp_path):
    phases = tuple(small_phases(Stage(1, 2, 16)).values())
    phases = (phases[0], dataclasses.replace(phases[1], stages=(Stage(1, 2, 16), Stage(1, 2, 4096))))
    model = small_config(num_hidden_layers=1, first_k_dense_replace=0, max_position_embeddings=4096)
    run = Run(one_layer_run(tmp_path, model=model, phases=phases), tmp_path / "out")
    with pytest.raises(ValueError, match="one sequence takes 4097 tokens, but the train text of a has"):
        run.train(load(DataConfig(data=data)))
    assert not (tmp_path / "out").exists()
