"""Plans the published recipe at 128K on 64, 256 and 1024 H200s:  python -m benchmarks.plan

No GPU is needed. Takes some minutes, for it traces the step for some hundred meshes; writes
benchmarks/results/plan.json.
"""

import argparse
import dataclasses
from typing import Any

from benchmarks import measure, sharded
from dsa_jax.sharding import describe, parse_mesh
from train.estimate import GIB, PUBLISHED, Job, Plan, calibration, make_plan
from train.optimizer import OptimizerSettings
from train.plan import best_plan, least_state_bytes
from train.presets import PhaseSettings, Stage, load_preset
from train.rates import recorded, usable_memory

OUT = measure.RESULTS / "plan.json"
GPUS = (64, 256, 1024)
LENGTH = 131072
PRESET = "deepseek_v32"


def row(phase: str, gpus: int) -> dict[str, Any]:
    """The best mesh of so many GPUs for a phase; where none fits, of the fewest GPUs on which one does."""
    job = Job.of(load_preset(PRESET), phase, LENGTH, PUBLISHED[phase])
    used, plan = gpus, best_plan(job, gpus)
    while plan is None:
        used *= 2
        plan = best_plan(job, used)
    where = {"phase": phase, "gpus": gpus, "planned_gpus": used, "batch_size": job.batch_size}
    return {**where, "least_state_gib": least_state_bytes(job, gpus) / GIB, **figures(plan)}


def figures(plan: Plan) -> dict[str, Any]:
    """What is worth recording of a plan: GiB a device, GiB sent a device and step by kind, seconds a step."""
    gib = lambda part: sum(part.values()) / GIB  # noqa: E731
    return {
        "mesh": describe(plan.shape),
        "parameters_gib": gib(plan.parameters),
        "gradients_gib": gib(plan.gradients),
        "optimizer_gib": gib(plan.optimizer),
        "activations_gib": plan.activations / GIB,
        "needed_gib": plan.bytes_needed / GIB,
        "sent_gib": {kind: gib(part) for kind, part in plan.sent.items()},
        "compute_seconds": plan.compute_seconds,
        "network_seconds": plan.network_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "binds": plan.binds,
    }


def held_against_runs() -> list[dict[str, Any]]:
    """How far plans of the steps that `benchmarks.sharded` measured are from what they took."""
    rate, rows = OptimizerSettings(learning_rate=7.3e-6), []
    for phase in PUBLISHED:
        settings = PhaseSettings(phase, (Stage(1, 1, LENGTH),), backbone=rate, indexer=rate, bias_rate=1e-3)
        for mesh, measured in zip(sharded.MESHES, recorded("sharded")[phase]["timings"], strict=True):
            plan = make_plan(Job(sharded.WIDTH, settings, 1, LENGTH, 1), parse_mesh(mesh))
            rows.append(
                {
                    "phase": phase,
                    "mesh": describe(plan.shape),
                    "memory_error": plan.bytes_needed / GIB / measured["peak_gib"] - 1,
                    "seconds_error": plan.seconds / measured["seconds"] - 1,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Records the errors on measured steps, the calibration and all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("runs", "plans")
    parser.add_argument(
        "--only", nargs="+", choices=parts, default=parts, metavar="PART", help="of " + ", ".join(parts)
    )
    wanted = parser.parse_args().only
    if "runs" in wanted:
        measure.record(OUT, {"runs": {"rows": held_against_runs()}})
    if "plans" in wanted:
        record_plans()


def record_plans() -> None:
    part: dict[str, Any] = {
        "calibration": dataclasses.asdict(calibration()),
        "usable_gib": usable_memory() / GIB,
        "rows": [],
    }
    for phase in PUBLISHED:
        for gpus in GPUS:
            part["rows"].append(row(phase, gpus))
            print(part["rows"][-1], flush=True)
            measure.record(OUT, {"plans": part})


if __name__ == "__main__":
    main()
