"""The command `python -m train plan`: what a training step takes of each GPU of a mesh, and what binds it."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from dsa_jax import Config
from dsa_jax.parallel.sharding import AXES, RULES, describe, parse_mesh
from train.planner.estimate import ELSEWHERE, GIB, ByPart, Job, Plan, Shape, calibration, make_plan, state_bytes
from train.planner.hardware import NETWORK_BYTES_PER_SECOND, recorded_rates, usable_memory
from train.planner.keeping import choose_keep, keep_plans, with_keep
from train.planner.trace import lower_step
from train.presets import PRESETS, load_preset, read_preset
from train.settings import PhaseSettings, RunConfig

MAX_DEVICES = 1 << 15
AUTO = "auto"  # what is kept is chosen
MESHES_TRIED = 4  # of one size, where several axes must grow


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Plans a training step: bytes, collectives and floating-point operations of each H200 of a mesh.

    With --serve, plans serving instead: see `plan --serve --help`.
    """

    config: str
    """deepseek_v32 or tiny, a run's run.json, or a Hugging Face folder."""
    mesh: str
    """The mesh, like data=16,context=1,tensor=1,expert=16; an axis left out has size 1."""
    seq_len: int
    """Tokens of a sequence."""
    phase: Literal["BASE", "WARMUP", "SPARSE"] = "SPARSE"
    """The phase whose step is planned."""
    batch: int | None = None
    """Sequences of a step; without it those of the phase's own recipe."""
    micro_batches: int | None = None
    """In how many parts a data shard takes its sequences; without it, one by one."""
    moment_dtype: Literal["float32", "bfloat16"] | None = None
    """How the optimizers' moments are stored; without it as the recipe says."""
    keep: tuple[str, ...] | None = None
    """Results kept for the backward pass, names of a phase's `keep`, or auto for those that fit and save most; without
    it as the recipe says."""
    budget: float | None = None
    """GiB of a device within which auto chooses; without it what an H200 gives."""


def main(arguments: Sequence[str]) -> int:
    """Prints the plan.

    Raises:
      ValueError: if the arguments are no plan, or the step does not fit.
    """
    parsed, unknown = tyro.cli(Arguments, prog="python -m train plan", args=list(arguments), return_unknown_args=True)
    if unknown:
        raise ValueError(f"unknown arguments: {' '.join(unknown)}; see --help")
    for name in ("seq_len", "batch", "micro_batches"):
        if (value := getattr(parsed, name)) is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {value}")
    job = Job.of(load_run(parsed.config), parsed.phase, parsed.seq_len, parsed.batch, parsed.micro_batches)
    if parsed.moment_dtype is not None:
        job = with_moments(job, parsed.moment_dtype)
    if parsed.keep is not None and AUTO in parsed.keep and parsed.keep != (AUTO,):
        raise ValueError(f"keep must be auto alone, or names of results, got {' '.join(parsed.keep)}")
    if parsed.budget is not None and parsed.keep != (AUTO,):
        raise ValueError("budget needs --keep auto, which chooses within it")
    if parsed.budget is not None and not 0 < parsed.budget < math.inf:
        raise ValueError(f"budget must be GiB, more than 0, got {parsed.budget}")
    if not parsed.mesh.strip():
        raise ValueError("mesh must name an axis at least, such as data=1, got none")
    if parsed.keep is not None:
        job = with_keep(job, () if parsed.keep == (AUTO,) else parsed.keep)
    shape, console = parse_mesh(parsed.mesh), Console()
    job.check(shape)
    planned = fitting_plan(job, shape)
    if parsed.keep == (AUTO,):
        alone = keep_plans(job, shape)
        budget = usable_memory() if parsed.budget is None else parsed.budget * GIB
        planned, nothing = choose_keep(job, shape, budget=budget, alone=alone), planned
        show_keep(nothing, alone, planned, budget, console)
    show(planned, parsed.config, lower_step(planned.job.trace(shape)), console)
    return 0


def with_moments(job: Job, dtype: Literal["float32", "bfloat16"]) -> Job:
    """Makes the job whose optimizers store their moments so."""
    trained = {group: getattr(job.settings, group) for group in job.settings.phase.trains}
    stored = {group: dataclasses.replace(settings, moment_dtype=dtype) for group, settings in trained.items()}
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, **stored))


def load_run(config: str) -> RunConfig:
    """Makes a preset, or reads the run of a run.json or its folder, or a Hugging Face folder, by the published recipe.

    Raises:
      ValueError: if it is none of these.
    """
    path = Path(config)
    if config in PRESETS:
        return load_preset(config)
    if config.endswith(".json"):
        return _read_run(path)
    if not path.is_dir():
        raise ValueError(f"config must be {' or '.join(PRESETS)}, a run.json, or a Hugging Face folder, got {config!r}")
    if (path / "run.json").is_file():
        return _read_run(path / "run.json")
    model = dataclasses.replace(Config.from_hf(path), dtype="bfloat16", param_dtype="float32")
    recipe = PRESETS["deepseek_v32"]()
    phases = tuple(_no_longer(phase, model.max_position_embeddings) for phase in recipe.phases)
    return dataclasses.replace(recipe, model=model, phases=phases)


def _read_run(path: Path) -> RunConfig:
    """Reads a run but for its data, which say nothing of a step and may be a study's own."""
    return RunConfig.from_json(read_preset(path), data=None)


def _no_longer(phase: PhaseSettings, longest: int) -> PhaseSettings:
    stages = (dataclasses.replace(stage, seq_len=min(stage.seq_len, longest)) for stage in phase.stages)
    return dataclasses.replace(phase, stages=tuple(stages))


# What fits


def fitting_plan(job: Job, shape: Shape) -> Plan:
    """Makes the plan of a mesh.

    Raises:
      ValueError: if it does not fit, with the bytes, the limit, and the axis to grow.
    """
    plan, limit = make_plan(job, shape), usable_memory()
    if plan.fits:
        return plan
    larger = larger_mesh(job, shape)
    if larger is None:
        advice = "no mesh that the model's sizes and the batch allow is large enough"
    else:
        grown = ", ".join(f"{axis} to {larger.shape[axis]}" for axis in AXES if larger.shape[axis] != shape[axis])
        advice = (
            f"grow {grown}: {describe(larger.shape)}, {larger.devices} GPUs, needs {larger.bytes_needed / GIB:.1f} GiB"
        )
    raise ValueError(
        f"{describe(shape)} needs {plan.bytes_needed / GIB:.1f} GiB a device ({plan.bytes_needed:,} bytes), of which "
        f"an H200 gives {limit / GIB:.1f} ({limit:,}); {advice}"
    )


def larger_mesh(job: Job, shape: Shape) -> Plan | None:
    """Plans the smallest mesh that fits with one axis grown by a power of two; with several, if none does.

    Of those with equally many devices it is the fastest. With several axes grown it is the first that fits of
    `MESHES_TRIED`: those that grow `tensor` least, whose shards hold alike what all heads share, and then those of the
    smallest state.
    """
    most = MAX_DEVICES // math.prod(shape.values())
    factors = [1 << power for power in range(1, most.bit_length())]
    for factor in factors:
        plans = [plan_if_small(job, {**shape, axis: shape[axis] * factor}) for axis in AXES]
        if fitting := [plan for plan in plans if plan and plan.fits]:
            return min(fitting, key=lambda plan: plan.seconds)
    for factor in factors:
        meshes = [mesh for mesh in _grown(shape, factor) if _state_bytes(job, mesh) <= usable_memory()]
        meshes.sort(key=lambda mesh: (mesh[RULES["heads"][0]], _state_bytes(job, mesh)))
        plans = (make_plan(job, mesh) for mesh in meshes[:MESHES_TRIED])
        if plan := next((plan for plan in plans if plan.fits), None):
            return plan
    return None


def plan_if_small(job: Job, shape: Shape) -> Plan | None:
    """Makes the plan; None, without tracing, where sizes do not divide or the state alone does not fit."""
    return make_plan(job, shape) if _state_bytes(job, shape) <= usable_memory() else None


def _grown(shape: Shape, factor: int) -> Iterator[dict[str, int]]:
    for powers in _compositions(factor.bit_length() - 1, len(AXES)):
        yield {axis: shape[axis] << power for axis, power in zip(AXES, powers, strict=True)}


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(total + parts - 1), parts - 1):
        ends = (-1, *cuts, total + parts - 1)
        yield tuple(b - a - 1 for a, b in itertools.pairwise(ends))


def best_plan(job: Job, devices: int) -> Plan | None:
    """Plans the mesh of `devices`, a power of two, with the most tokens a second; None if none fits."""
    plan = nearest_plan(job, devices)
    return plan if plan and plan.fits else None


def nearest_plan(job: Job, devices: int) -> Plan | None:
    """Plans the mesh of `best_plan` or, where none fits, one of few bytes; None if the state alone fits on none.

    It is found by descent from the most even mesh: a step moves a factor of two or four from one axis to another.
    Meshes that do not fit are ordered by the bytes they need.
    """
    meshes = [_mesh(powers) for powers in _compositions(devices.bit_length() - 1, len(AXES))]
    best = min(meshes, key=lambda mesh: max(mesh.values()))
    plans: dict[str, Plan | None] = {}

    def badness(mesh: Shape) -> tuple[int, float]:
        name = describe(mesh)
        if name not in plans:
            plans[name] = plan_if_small(job, mesh)
        plan = plans[name]
        if plan is None:
            return 2, _state_bytes(job, mesh)
        return (0, plan.seconds) if plan.fits else (1, plan.bytes_needed)

    while True:
        nearest = min(_neighbours(best), key=badness, default=best)
        if badness(nearest) >= badness(best):
            break
        best = nearest
    return plans[describe(best)]


def least_state_bytes(job: Job, devices: int) -> float:
    """Counts bytes a device of parameters, gradients and optimizer on the mesh of `devices` where they are fewest."""
    return min(_state_bytes(job, _mesh(powers)) for powers in _compositions(devices.bit_length() - 1, len(AXES)))


def _neighbours(mesh: Shape) -> Iterator[dict[str, int]]:
    for (giver, taker), factor in itertools.product(itertools.permutations(AXES, 2), (2, 4)):
        if mesh[giver] % factor == 0:
            yield {**mesh, giver: mesh[giver] // factor, taker: mesh[taker] * factor}


def _mesh(powers: Sequence[int]) -> dict[str, int]:
    return {axis: 1 << power for axis, power in zip(AXES, powers, strict=True)}


def _state_bytes(job: Job, shape: Shape) -> float:
    """Counts bytes of the state a device, infinitely many where sizes do not divide."""
    try:
        return sum(sum(part.values()) for part in state_bytes(job, shape).values())
    except ValueError:
        return math.inf


# What is shown


def show(plan: Plan, name: str, lowered: str, console: Console) -> None:
    """Prints the plan of a lowered step as a table, and what binds it."""
    job, limit = plan.job, usable_memory()
    table = Table(
        title=f"{name}, {job.settings.name}, {job.batch_size} × {job.seq_len} tokens a step on {plan.devices} "
        f"H200s, {describe(plan.shape)}"
    )
    table.add_column("one device")
    kinds = [*job.layers, ELSEWHERE]
    for kind in [*(f"{kind} layer" for kind in job.layers), ELSEWHERE, "in total"]:
        table.add_column(kind, justify="right")
    for section, unit, digits, rows in _sections(plan):
        table.add_section()
        table.add_row(f"[bold]{section}")
        for row, parts, total in rows:
            each = [parts.get(kind, 0.0) / job.layers.get(kind, 1) / unit for kind in kinds]
            cells = [f"{value:,.{digits}f}" if value else "" for value in (*each, total / unit)]
            table.add_row(f"  {row}", *cells)
    console.print(table)
    for line in (
        f"Memory: {plan.bytes_needed / GIB:.1f} GiB of the {limit / GIB:.1f} that an H200 gives, "
        f"{plan.bytes_needed / limit:.0%}; {calibration()}.",
        f"Time: compute {plan.compute_seconds:.1f} s and network {plan.network_seconds:.1f} s a step, of which no "
        f"compute hides {plan.exposed_seconds:.1f} s: {plan.binds} binds; {plan.tokens_per_second:,.0f} tokens/s, "
        f"{plan.tokens_per_second / plan.devices:,.0f} a GPU.",
        f"Kept for the backward pass, besides selections: {', '.join(job.settings.keep) or 'nothing'}; moments in "
        f"{_moment_dtypes(job)}.",
        f"The busiest sequence shard has {plan.imbalance:.2%} more than the mean to do.",
        f"Assumed: {NETWORK_BYTES_PER_SECOND / 1e9:.0f} GB/s a GPU between hosts, each way; experts chosen evenly, one "
        "round an exchange; one document a sequence; conditions as in training; kernels, products and exchanges within "
        f"a host at rates measured on an {recorded_rates()['card']}, {recorded_rates()['date']}.",
        f"Lowered for CUDA: {len(lowered) / 2**20:.1f} MiB of StableHLO with {lowered.count('@mosaic_gpu')} kernels.",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def show_keep(nothing: Plan, alone: Mapping[str, Plan], chosen: Plan, budget: float, console: Console) -> None:
    """Prints what each result would take and save if it were kept for the backward pass, and what is chosen."""
    room = (budget - nothing.bytes_needed) / GIB
    table = Table(title=f"Kept for the backward pass, within {room:.1f} GiB")
    table.add_column("result")
    for column in ("GiB more", "s saved", "chosen"):
        table.add_column(column, justify="right")
    keep = chosen.job.settings.keep
    for name, plan in [*alone.items(), ("all that are chosen", chosen)]:
        more, saved = (plan.bytes_needed - nothing.bytes_needed) / GIB, nothing.seconds - plan.seconds
        if plan is chosen:
            table.add_section()
        table.add_row(name, f"{more:,.1f}", f"{saved:,.1f}", "yes" if name in keep else "")
    console.print(table)
    names = json.dumps(list(keep))
    console.print(f"To train so: --set 'phases.{chosen.job.settings.name}.keep={names}'", highlight=False, markup=False)


def _moment_dtypes(job: Job) -> str:
    trained = (getattr(job.settings, group) for group in job.settings.phase.trains)
    return " and ".join(sorted({settings.moment_dtype for settings in trained}))


def _sections(plan: Plan) -> Iterator[tuple[str, float, int, list[tuple[str, ByPart, float]]]]:
    """Yields of each section title, unit, digits, and rows of name, amounts by kind of layer and total."""

    def rows(parts: Mapping[str, ByPart]) -> list[tuple[str, ByPart, float]]:
        return [(name, part, sum(part.values())) for name, part in parts.items()]

    state = {"parameters": plan.parameters, "gradients": plan.gradients, "optimizer state": plan.optimizer}
    other = plan.activations - sum(plan.kept.values())
    activations = [*rows({"kept for the backward": plan.kept}), ("alive at the peak", {}, other)]
    yield "GiB", GIB, 2, [*rows(state), *activations, ("all", {}, plan.bytes_needed)]
    sent = {kind: sum(part.values()) for kind, part in plan.sent.items()}
    yield "GiB sent a step", GIB, 2, [*rows(plan.sent), ("all", {}, sum(sent.values()))]
    done = {kind: sum(part.values()) for kind, part in plan.flops.items()}
    yield "TFLOP a step", 1e12, 1, [*rows(plan.flops), ("all", {}, sum(done.values()))]
