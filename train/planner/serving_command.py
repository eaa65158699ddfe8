"""The command `python -m train plan --serve`: what serving takes of H200s, and the tokens a second they give."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from dsa_jax.parallel.sharding import AXES, describe
from train.checks import check_integer
from train.planner import serving
from train.planner.command import load_run
from train.planner.estimate import GIB
from train.planner.hardware import NETWORK_BYTES_PER_SECOND, usable_memory
from train.planner.serving import BATCHES, SEQUENCE, Job, Step

POSITIONS = (32768, 131072)  # at which a step is planned, as far as the model's positions reach
WIDTH = 120  # columns where the output is no terminal, which would say its own


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Plans serving: bytes of each H200 of a mesh, tokens of cache that fit, and tokens a second by batch."""

    config: str
    """deepseek_v32 or tiny, a run's run.json, or a Hugging Face folder."""
    serve: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Plan serving, not a training step."""
    weights: str = "fp8"
    """fp8 or bfloat16, of the routed experts and the cache; other weights are bfloat16."""
    gpus: tuple[int, ...] = tuple(serving.MESHES)
    """How many GPUs: 8, 16 or both."""
    drafts: str | None = None
    """mtp or ngram: what proposes three tokens of each sequence for a step to verify, prediction layers or the text."""
    position: tuple[int, ...] | None = None
    """Tokens that each sequence has before a step; without it 32768 and 131072, or the model's most if that is less."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON, with the seconds of a step by part and the sources of the rates."""


def main(arguments: Sequence[str]) -> int:
    """Prints the plan.

    Raises:
      ValueError: if the arguments are no plan, or the model fits on none of the meshes.
    """
    program = "python -m train plan --serve"
    parsed, unknown = tyro.cli(Arguments, prog=program, args=list(arguments), return_unknown_args=True)
    if unknown:
        raise ValueError(f"unknown arguments with --serve: {' '.join(unknown)}; see --serve --help")
    plans = make_plans(parsed)
    if parsed.json:
        print(json.dumps(as_json(parsed, plans), indent=1))
    else:
        console = Console()
        show(parsed, plans, console if console.is_terminal else Console(width=WIDTH))
    return 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds what a job takes, and its steps at all positions; none where the weights do not fit."""

    job: Job
    weights: dict[str, int]  # bytes of a GPU by part, as the next
    workspace: dict[str, int]
    tokens: int  # of cache that a group has room for
    sequence: int  # tokens of a long sequence: SEQUENCE, or the model's most
    sequences: int  # of so many tokens that a group has room for
    steps: tuple[Step, ...]

    @property
    def bytes_needed(self) -> int:
        """The bytes of a GPU without any cache."""
        return sum(self.weights.values()) + sum(self.workspace.values())


def make_plans(arguments: Arguments) -> list[Plan]:
    """Plans every mesh of the numbers of GPUs that are asked for.

    Raises:
      ValueError: for arguments that are no plan, or where no mesh has room for a page of cache.
    """
    config = load_run(arguments.config).model
    if arguments.drafts == "mtp" and arguments.config == "deepseek_v32":
        config = dataclasses.replace(config, num_nextn_predict_layers=1)  # which training leaves out, and it has
    if not arguments.gpus or arguments.position == ():
        raise ValueError(f"{'position' if arguments.gpus else 'gpus'} must be followed by a number, got none")
    for position in arguments.position or ():
        check_integer("position", position, most=config.max_position_embeddings)
    positions = arguments.position or (min(each, config.max_position_embeddings) for each in POSITIONS)
    positions = sorted(set(positions))
    plans = [
        make_plan(job, positions)
        for gpus in sorted(set(arguments.gpus))
        for job in serving.jobs(config, arguments.weights, gpus, arguments.drafts)
    ]
    if not any(plan.tokens for plan in plans):
        least = min(plans, key=lambda plan: plan.bytes_needed)
        raise ValueError(
            f"{arguments.config} in {arguments.weights} needs {least.bytes_needed / GIB:.1f} GiB a GPU without any "
            f"cache on {least.job.gpus} H200s, {describe(least.job.shape)}, of which one gives "
            f"{usable_memory() / GIB:.1f}; {_advice(arguments)}"
        )
    return plans


def _advice(arguments: Arguments) -> str:
    """Says what else to try where nothing fits."""
    if max(arguments.gpus) < max(serving.MESHES):
        return f"try --gpus {max(serving.MESHES)}"
    return "try --weights fp8" if arguments.weights != "fp8" else "it is too large for the meshes that are planned"


def make_plan(job: Job, positions: Sequence[int]) -> Plan:
    """Plans a job at these positions, at `BATCHES` and at the largest batch that fits each position."""
    longest = max(positions)
    room = {position: serving.sequences_that_fit(job, position, longest) for position in positions}
    batches = sorted({*BATCHES, *(most for most in room.values() if 0 < most < max(BATCHES))})
    steps = [
        serving.decode_step(job, batch, position)
        for batch in batches
        for position in positions
        if batch <= room[position]
    ]
    sequence = min(SEQUENCE, job.config.max_position_embeddings)
    return Plan(
        job=job,
        weights=serving.weight_bytes(job),
        workspace=serving.workspace_bytes(job, longest),
        tokens=serving.tokens_that_fit(job, longest),
        sequence=sequence,
        sequences=serving.sequences_that_fit(job, sequence, longest),
        steps=tuple(steps),
    )


# What is shown


def show(arguments: Arguments, plans: Sequence[Plan], console: Console) -> None:
    """Prints for each number of GPUs what fits and how fast it is, and what is assumed."""
    for gpus in dict.fromkeys(plan.job.gpus for plan in plans):
        mine = [plan for plan in plans if plan.job.gpus == gpus]
        console.print(f"[bold]{arguments.config} in {arguments.weights} on {gpus} H200s[/bold]", highlight=False)
        console.print(memory_table(mine))
        if any(plan.steps for plan in mine):
            console.print(speed_table(mine))
    for line in notes(plans[0].job):
        console.print(line, highlight=False)


def memory_table(plans: Sequence[Plan]) -> Table:
    """Makes the table of GiB a GPU, and of the tokens that fit."""
    table = Table()
    table.add_column("mesh", no_wrap=True)
    long = f"sequences of {plans[0].sequence:,}"
    for name in ("GiB of weights", "workspace", "cache", "tokens a group", "tokens in all", long):
        table.add_column(name, justify="right")
    for plan in plans:
        needed = [f"{sum(part.values()) / GIB:.1f}" for part in (plan.weights, plan.workspace)]
        cache, groups = plan.tokens * serving.token_bytes(plan.job) / GIB, plan.job.groups
        counts = [f"{count:,}" for count in (plan.tokens, plan.tokens * groups, plan.sequences * groups)]
        table.add_row(_mesh(plan), *needed, f"{cache:.1f}" if plan.tokens else "no room", *counts)
    return table


def speed_table(plans: Sequence[Plan]) -> Table:
    """Makes the table of milliseconds a step and tokens a second by mesh and batch, blank where the cache is full."""
    drafts = plans[0].job.drafts is not None
    positions = sorted({step.position for plan in plans for step in plan.steps})
    table = Table()
    table.add_column("sequences a group", no_wrap=True)
    table.add_column("in all", justify="right")
    for position in positions:
        table.add_column(f"ms a step at {position:,}", justify="right")
        table.add_column("tokens/s a GPU", justify="right")
        table.add_column("in all", justify="right")
        table.add_column("pays above") if drafts else table.add_column("longest part")
    for plan in (plan for plan in plans if plan.steps):
        steps = {(step.batch, step.position): step for step in plan.steps}
        table.add_section()
        table.add_row(f"[bold]{_mesh(plan)}")
        for batch in sorted({step.batch for step in plan.steps}):
            cells = [cell for position in positions for cell in _cells(steps.get((batch, position)))]
            table.add_row(f"  {batch}", f"{batch * plan.job.groups:,}", *cells)
    return table


def _cells(step: Step | None) -> list[str]:
    if step is None:
        return [""] * 4
    rates = step.tokens_per_second / step.job.gpus, step.tokens_per_second
    last = max(step.seconds_by_part, key=lambda part: step.seconds_by_part[part])
    if step.job.drafts is not None:
        last = f"{step.tokens_to_gain:.2f}"
    return [f"{1e3 * step.seconds:.1f}", *(f"{rate:,.0f}" for rate in rates), last]


def _mesh(plan: Plan) -> str:
    """Writes the axes of a mesh that split anything."""
    shape = plan.job.shape
    return ",".join(f"{axis}={shape[axis]}" for axis in AXES if shape[axis] > 1)


def _without_indexer(job: Job) -> str:
    """Says how many layers have no index keys, if some have none."""
    missing = job.config.num_hidden_layers - job.config.num_index_layers
    return f", the latter in all layers but the {missing} that reuse a selection" if missing else ""


def notes(job: Job) -> list[str]:
    """Says what the tables take for granted, and where the rates are from."""
    rates = serving.recorded_rates()
    kernels = dict.fromkeys(row["source"].split(":")[0] for row in (*rates["attention"], *rates["selection"]))
    return [
        f"A token takes {serving.token_bytes(job):,} bytes of cache: {serving.latent_bytes(job.config, job.weights)} + "
        f"{serving.index_bytes(job.config, job.weights)} a layer{_without_indexer(job)}. A group is the GPUs along "
        "tensor, which share their sequences and each keep all of their cache. Of a GPU's memory "
        f"{usable_memory() / GIB:.1f} GiB are taken to be usable; workspace is for {serving.PREFILL_CHUNK:,} tokens of "
        "prompts at a time.",
        f"Batches of {', '.join(map(str, BATCHES))} sequences a group are shown where the cache has room, and the "
        f"largest batch for which it has. {_tokens_a_step(job)}",
        "Nothing overlaps, which makes speeds too low; launches, latency of exchanges, norms and sampling are left "
        "out, which makes them too high, most at small batches.",
        f"Assumed: {NETWORK_BYTES_PER_SECOND / 1e9:.0f} GB/s a GPU between hosts, each way; experts chosen evenly; "
        f"experts in FP8 read as they are; {serving.rate('memory_bytes') / 1e12:.1f} TB/s from memory, "
        f"{serving.rate('product_flops') / 1e12:.0f} TFLOP/s. Selection and attention: {'; '.join(kernels)}.",
    ]


def _tokens_a_step(job: Job) -> str:
    """Says how many tokens a sequence gets of a step, and with drafts what these take."""
    if job.drafts is None:
        return "A sequence gets a token a step."
    source = serving.recorded_rates()["verification"][0]["source"]
    by = {"mtp": "prediction layers, whose time counts", "ngram": "the host, in no time"}
    return (
        f"A step verifies {job.verified - 1} drafts of each sequence, which gets a token, and one more for each that "
        "is right: tokens/s are of none, and a step pays where it gives a sequence more tokens than the last column "
        f"says. Drafts are made by {by[job.drafts]}; that a step waits for the host is left out. Selection and "
        f"attention of a token and its drafts: {source}."
    )


def as_json(arguments: Arguments, plans: Sequence[Plan]) -> dict[str, Any]:
    """Gathers all that the tables show, unrounded, with the parts of every step and the rates with their sources."""
    return {
        "config": arguments.config,
        "weights": arguments.weights,
        "drafts": arguments.drafts,
        "usable_bytes": usable_memory(),
        "plans": [_plan_json(plan) for plan in plans],
        "rates": serving.recorded_rates(),
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "gpus": plan.job.gpus,
        "mesh": describe(plan.job.shape),
        "groups": plan.job.groups,
        "weight_bytes": plan.weights,
        "workspace_bytes": plan.workspace,
        "token_bytes": serving.token_bytes(plan.job),
        "tokens_a_group": plan.tokens,
        "tokens": plan.tokens * plan.job.groups,
        "sequence_tokens": plan.sequence,
        "sequences": plan.sequences * plan.job.groups,
        "steps": [_step_json(step) for step in plan.steps],
    }


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "position": step.position,
        "batch_a_group": step.batch,
        "sequences": step.sequences,
        "seconds": step.seconds,
        "seconds_by_part": step.seconds_by_part,
        "tokens_per_second": step.tokens_per_second,
        "tokens_per_second_a_gpu": step.tokens_per_second / step.job.gpus,
        **({} if step.job.drafts is None else {"tokens_to_gain": step.tokens_to_gain}),
    }
