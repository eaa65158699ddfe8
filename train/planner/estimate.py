"""Estimates what a training step takes of each device of a mesh, before there is one.

The step is traced for the mesh without an array (`trace`). State is exact, from the shardings; activations are
the most that is alive at once in a device's program (`costs`), set against one measured run; collectives and
floating-point operations are counted there, and timed at recorded rates (`hardware`).
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dsa_jax import Config
from dsa_jax.parallel.sharding import AXES, check_model, imbalance, parameter_specs, path_names, shards
from dsa_jax.stacks import KINDS, PREDICTION_LAYERS, all_stacks, kind_of, stacked_layers
from train.optimizer import OptimizerSettings
from train.phases import PHASES, trained_params
from train.planner.costs import collective, executed, kept_bytes, layer_loops, peak_bytes
from train.planner.hardware import measured_rates, measured_step, network_seconds, usable_memory, work
from train.planner.overlap import exposed_seconds
from train.planner.trace import step_program, trace_step
from train.settings import PhaseSettings, RunConfig, Stage
from train.state import abstract_mesh, abstract_state, check_stage

GIB = 2**30
PUBLISHED_BATCH_SIZES = {"WARMUP": 16, "SPARSE": 480}  # sequences a step
ELSEWHERE = "elsewhere"
ONE_DEVICE: dict[str, int] = dict.fromkeys(AXES, 1)

type Shape = Mapping[str, int]
type ByPart = Mapping[str, float]  # kind of layer, or ELSEWHERE -> amount in all layers of the kind


@dataclasses.dataclass(frozen=True)
class Job:
    """Describes a step: a model, a phase and its batches."""

    config: Config
    settings: PhaseSettings
    batch_size: int
    seq_len: int
    micro_batches: int

    @classmethod
    def of(
        cls, run: RunConfig, phase: str, seq_len: int, batch_size: int | None = None, micro_batches: int | None = None
    ) -> "Job":
        """Takes a phase of a run at another length; sequences a step default to the phase's own, one a micro-batch."""
        settings = next((each for each in run.phases if each.name == phase), None)
        batch_size = batch_size or (
            settings.stages[-1].batch_size if settings else PUBLISHED_BATCH_SIZES.get(phase, 16)
        )
        stage = Stage(1, batch_size, seq_len, micro_batches or batch_size)
        adamw = OptimizerSettings(learning_rate=1e-4)
        settings = settings or PhaseSettings(PHASES[phase], (stage,), backbone=adamw, indexer=adamw)
        if seq_len > run.model.max_position_embeddings:
            raise ValueError(
                f"the sequence length must be at most the model's max_position_embeddings "
                f"{run.model.max_position_embeddings}, got {seq_len}"
            )
        return cls(run.model, settings, batch_size, seq_len, stage.micro_batches)

    @property
    def stacks(self) -> list[str]:
        """The kind of layers of each stack that runs, in their order."""
        own = ["MoE" if stack.moe else "dense" for stack in stacked_layers(self.config)]
        return [*own, KINDS[PREDICTION_LAYERS]] if self.settings.predictions else own

    @property
    def backward_stacks(self) -> list[str]:
        """The same of the stacks that have a backward pass: layers without an indexer may teach none."""
        alone = "backbone" not in self.settings.phase.trains and self.config.index_share_kl == "own"
        stacks = zip(self.stacks, all_stacks(self.config), strict=False)  # prediction layers last, if they run
        return [kind for kind, stack in stacks if stack.indexers or not alone]

    @property
    def layers(self) -> dict[str, int]:
        """The number of layers of each kind, in their order."""
        config = self.config
        counts = {"dense": config.num_dense_layers, "MoE": config.num_moe_layers}
        counts[KINDS[PREDICTION_LAYERS]] = config.num_nextn_predict_layers
        return {kind: count for kind, count in counts.items() if count}

    def check(self, shape: Shape) -> None:
        """Checks that model and batch can be split over the mesh.

        Raises:
          ValueError: if they cannot.
        """
        mesh = abstract_mesh(shape)
        check_model(mesh, self.config)
        check_stage(mesh, Stage(1, self.batch_size, self.seq_len, self.micro_batches))

    def trace(self, shape: Shape) -> Any:
        """Traces the step for a mesh."""
        sizes = dict(batch_size=self.batch_size, seq_len=self.seq_len, micro_batches=self.micro_batches)
        return trace_step(self.config, self.settings, shape, **sizes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds bytes, floating-point operations and seconds, of a device and a step."""

    job: Job
    shape: Shape
    parameters: ByPart
    gradients: ByPart
    optimizer: ByPart
    activations: float
    kept: ByPart  # of the activations, what all layers keep for the backward
    sent: Mapping[str, ByPart]  # by kind of collective
    flops: Mapping[str, ByPart]  # by kind of work
    compute_seconds: float
    network_seconds: float
    exposed_seconds: float  # of the network's, those in which nothing can be computed
    imbalance: float

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.shape.values())

    @property
    def bytes_needed(self) -> int:
        """The most bytes of a device that a step takes."""
        parts = (self.parameters, self.gradients, self.optimizer)
        return int(sum(sum(part.values()) for part in parts) + self.activations)

    @property
    def fits(self) -> bool:
        """Whether the memory of an H200 is enough."""
        return self.bytes_needed <= usable_memory()

    @property
    def seconds(self) -> float:
        """The seconds of a step: those of compute, and those in which it waits for the network."""
        return self.compute_seconds + self.exposed_seconds

    @property
    def tokens_per_second(self) -> float:
        """The tokens a second of all devices together."""
        return self.job.batch_size * self.job.seq_len / self.seconds

    @property
    def binds(self) -> str:
        """The part that takes longer: compute or network."""
        return "compute" if self.compute_seconds >= self.network_seconds else "network"


# The estimate


def make_plan(job: Job, shape: Shape) -> Plan:
    """Traces the step for a mesh and adds up what it costs.

    Raises:
      ValueError: if model or batch cannot be split over the mesh; not if they do not fit.
    """
    raw = traced_plan(job, shape)
    extra = calibration().copies * sum(raw.gradients.values())
    return dataclasses.replace(raw, activations=raw.activations + extra)


def state_bytes(job: Job, shape: Shape) -> dict[str, ByPart]:
    """Counts bytes a device of parameters, gradients and optimizer state, by kind of layer."""
    job.check(shape)
    state = abstract_state(job.config, job.settings)
    trained = trained_params(state.params, job.settings.phase, predictions=job.settings.predictions)
    trees = {"parameters": state.params, "gradients": trained, "optimizer": state.opt_state}
    return {name: _sharded_bytes(tree, shape) for name, tree in trees.items()}


def _sharded_bytes(tree: Any, shape: Shape) -> ByPart:
    mesh, total = abstract_mesh(shape), defaultdict(float)
    specs = jax.tree.leaves(parameter_specs(tree))
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(tree), specs, strict=True):
        local = math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape))
        kind = next(filter(None, map(kind_of, path_names(path))), ELSEWHERE)
        total[kind] += local * leaf.dtype.itemsize
    return dict(total)


def traced_plan(job: Job, shape: Shape) -> Plan:
    """Makes the plan of `make_plan` without the calibration."""
    state = state_bytes(job, shape)
    program = step_program(job.trace(shape), shape)
    loops = layer_loops(program, job.stacks, job.backward_stacks)
    sent, flops = defaultdict(lambda: defaultdict(float)), defaultdict(lambda: defaultdict(float))
    computing = networking = 0.0
    for done in executed(program, loops):
        part = done.layers or ELSEWHERE
        if (message := collective(program, done.op)) is not None:
            sent[message.kind][part] += done.times * message.sent
            networking += done.times * network_seconds(shape, message)
        else:
            each = work(program, done)
            flops[each.name][part] += done.times * each.flops
            computing += done.times * each.seconds
    totals = {name: sum(part.values()) for name, part in state.items()}
    updated = 3 * totals["gradients"] + 2 * totals["optimizer"]  # gradients and parameters read, all that moves written
    return Plan(
        job=job,
        shape=dict(shape),
        **state,
        activations=peak_bytes(program) - totals["gradients"],
        kept={
            kind: sum(kept_bytes(program, op) for op in ops[: job.stacks.count(kind)]) for kind, ops in loops.items()
        },
        sent={kind: dict(parts) for kind, parts in sorted(sent.items())},
        flops={name: dict(parts) for name, parts in flops.items() if sum(parts.values())},
        compute_seconds=computing + updated / measured_rates().copy,
        network_seconds=networking,
        exposed_seconds=exposed_seconds(program),
        imbalance=_imbalance(job.seq_len, shards(abstract_mesh(shape), "sequence")),
    )


def _imbalance(length: int, count: int) -> float:
    """Computes the imbalance for one document as long as the sequence."""
    stop = np.arange(1, length + 1)[None]
    return imbalance(np.zeros_like(stop), stop, count)


# The calibration


SLICE = Config(
    vocab_size=16384,
    num_hidden_layers=4,
    first_k_dense_replace=0,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=1024,
    n_group=1,
    topk_group=1,
    index_fp8=True,
)  # four layers of the published shape, with 8 experts of half the width for 256: the model that was measured


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Says how the estimate was set, and how far it is from what was measured: 0.1 is a tenth too much.

    The walk counts what is alive, without the gaps and copies with which XLA packs it. What it misses is taken to grow
    with the gradients, which measured steps bear out better than growth with the walk.
    """

    copies: float  # of the gradients, in whose bytes that is given
    memory_error: float  # of WARMUP
    sparse_seconds_error: float
    warmup_seconds_error: float

    def __str__(self) -> str:
        return (
            f"calibrated on the measured peak of a SPARSE step ({self.copies:.2f} further copies of the gradients), "
            f"error on WARMUP: {self.memory_error:+.1%}; seconds, not calibrated, on one H200: SPARSE "
            f"{self.sparse_seconds_error:+.1%}, WARMUP {self.warmup_seconds_error:+.1%}"
        )


@functools.cache
def calibration() -> Calibration:
    """Sets the estimate against the recorded SPARSE step of four layers of the 671B shape on one H200."""
    sparse, warmup = (measured_step(phase) for phase in ("SPARSE", "WARMUP"))
    plans = [traced_plan(measured_job(phase), ONE_DEVICE) for phase in ("SPARSE", "WARMUP")]
    gradients = [sum(plan.gradients.values()) for plan in plans]
    copies = (sparse.peak_gib * GIB - plans[0].bytes_needed) / gradients[0]
    needed = plans[1].bytes_needed + copies * gradients[1]
    return Calibration(
        copies=copies,
        memory_error=needed / (warmup.peak_gib * GIB) - 1,
        sparse_seconds_error=plans[0].seconds / sparse.seconds - 1,
        warmup_seconds_error=plans[1].seconds / warmup.seconds - 1,
    )


def measured_settings(phase: str, length: int, *, steps: int = 1, sequences: int = 1) -> PhaseSettings:
    """Makes the recipe of the steps that are measured, on `sequences` of `length` tokens at a time."""
    rate = OptimizerSettings(learning_rate=7.3e-6)
    stages = (Stage(steps, sequences, length),)
    return PhaseSettings(PHASES[phase], stages, backbone=rate, indexer=rate, bias_rate=1e-3)


def measured_job(phase: str) -> Job:
    """Describes the step of a phase that was measured on one H200."""
    length = measured_step(phase).seq_len
    return Job(SLICE, measured_settings(phase, length), 1, length, 1)
