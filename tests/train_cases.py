"""Small runs and batches for the tests of `train`."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import FAST, array

from dsa_jax import Config, KeyRange
from train.data import Batch, DataConfig
from train.optimizer import OptimizerSettings
from train.phases import BASE, SPARSE, WARMUP, Params
from train.settings import PhaseSettings, RunConfig, Stage
from train.state import abstract_params, init_state
from train.step import Step

DOCUMENTS = 40


def write_documents(folder: Path) -> Path:
    """Writes files of which every line names its file, some of them not ASCII."""
    for i in range(DOCUMENTS):
        lines = [f"file{i:02d} = value_{i:02d}_{j:03d}  # naïve\n" for j in range(5 + 3 * i)]
        (folder / f"f{i:02d}.txt").write_text("".join(lines))
    return folder


def batch_at(dataset, index: int) -> Batch:
    """Takes a batch by random access."""
    batch = dataset[index]
    assert batch is not None
    return batch


def small_config(**changes) -> Config:
    """Makes one dense and one MoE layer, everything as narrow as it may be; K is 4."""
    values: dict[str, Any] = dict(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        index_n_heads=4,
        index_head_dim=8,
        index_topk=4,
        intermediate_size=16,
        moe_intermediate_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        rope_scaling=None,
        max_position_embeddings=64,
        initializer_range=0.1,
        dtype="float32",
    )
    return Config(**values | changes)


def small_phases(*stages: Stage) -> dict[str, PhaseSettings]:
    """Makes the three phases, each of the same stages."""
    stages = stages or (Stage(3, 2, 16),)
    muon = OptimizerSettings(4e-3, muon_learning_rate=0.02, schedule="cosine")
    adamw = OptimizerSettings(1e-3)
    phases = (
        PhaseSettings(BASE, stages, backbone=muon, bias_rate=1e-2),
        PhaseSettings(WARMUP, stages, indexer=adamw),
        PhaseSettings(SPARSE, stages, backbone=adamw, indexer=adamw, bias_rate=1e-2),
    )
    return {phase.name: phase for phase in phases}


def small_run(folder: Path, **changes) -> RunConfig:
    """Makes a run of nine steps over two small files that it writes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("a.txt", "b.txt"):
        words = rng.choice(["alpha", "beta", "gamma", "delta", "(", ")", "\n"], size=2000)
        (folder / name).write_text(" ".join(words))
    phases = small_phases(Stage(3, 2, 16))
    run = RunConfig(small_config(), tuple(phases.values()), DataConfig((f"{folder}/*.txt",)), checkpoint_every=2)
    return dataclasses.replace(run, **changes)


def one_layer_run(folder: Path, **changes) -> RunConfig:
    """Makes it of the MoE layer and AdamW alone, for processes that train: they spend their time in the compiler."""
    phases = small_phases()
    phases["BASE"] = dataclasses.replace(phases["BASE"], backbone=phases["SPARSE"].backbone)
    values = {"model": small_config(num_hidden_layers=1, first_k_dense_replace=0), "phases": tuple(phases.values())}
    return small_run(folder, **values | changes)


def write_preset(run: RunConfig, path: Path) -> Path:
    """Writes a run as the file that `--preset` takes."""
    path.write_text(json.dumps(run.to_json()))
    return path


def small_batch(batch: int = 4, length: int = 16, *, seed: int = 0, vocab: int = 256) -> Batch:
    """Random tokens; the rows hold two packed documents and then padding, of which each row has another share."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((batch, length), np.int32)
    for row in range(batch):
        real = length - 3 * row % length
        segments[row, real // 3 : real] = 1
        segments[row, real:] = -1
    keys = KeyRange.packed(jnp.asarray(segments))
    start, stop = np.asarray(keys.start), np.asarray(keys.stop)
    tokens = rng.integers(vocab, size=(batch, length + 1), dtype=np.int32)
    same = np.concatenate([segments[:, 1:] == segments[:, :-1], np.zeros((batch, 1), bool)], axis=1)
    return Batch(
        tokens=tokens[:, :-1].copy(),
        targets=tokens[:, 1:].copy(),
        valid=same & (segments >= 0),
        start=start,
        stop=stop,
        positions=np.arange(length, dtype=np.int32) - start,
    )


@functools.cache
def small_params(config: Config) -> Params:
    """NumPy parameters: normal, but for the normalisations near 1 and the routers' biases near 0."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        names = [key.key for key in path]
        if names[-1] == "e_score_correction_bias":
            return rng.normal(size=leaf.shape).astype(np.float32) * 0.01
        one = names[-1] == "weight" and names[-2].endswith("norm")
        return (one + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config)[1])


def compiled(step: Step, *arguments) -> Step:
    """Compiles a step for these arguments, in a hurry."""
    return step.lower(*arguments).compile(compiler_options=FAST)


def state_of(run, phase=0):
    params = jax.tree.map(jnp.array, small_params(run.model))
    state = init_state(params, run.phases[phase], array([0, 7], jnp.uint32))
    return dataclasses.replace(state, step=array(3, jnp.int32))


@jax.jit
def _one_more(params):
    return jax.tree.map(lambda x: x + 1, params)


def fake_step(bad_at):
    """Stands in for `make_step`: adds one to every parameter, and reports a loss that is NaN at one step of a phase."""

    def make_step(graphdef, settings, *, micro_batches=1, mesh=None):
        def step(state, batch):
            done = int(state.step) + 1
            loss = np.nan if (settings.name, done) == bad_at else 1.0 / done
            state = dataclasses.replace(state, step=state.step + 1, params=_one_more(state.params))
            return state, {"loss": jnp.asarray(loss), "lm_loss": jnp.asarray(loss)}

        return step

    return make_step
