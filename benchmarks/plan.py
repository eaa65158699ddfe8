"""Plans the published recipe at 128K on 64, 256 and 1024 H200s:  python -m benchmarks.plan

No GPU is needed. Takes some minutes, for it traces the step for some hundred meshes; writes
benchmarks/results/plan.json.
"""

import dataclasses
import pathlib
from typing import Any

from benchmarks import measure, sharded
from benchmarks.rates import recorded
from dsa_jax.parallel.sharding import describe, parse_mesh
from train.planner import (
    GIB,
    PUBLISHED_BATCH_SIZES,
    Job,
    Plan,
    best_plan,
    calibration,
    choose_keep,
    least_state_bytes,
    make_plan,
    measured_settings,
    nearest_plan,
    usable_memory,
    with_moments,
)
from train.presets import load_preset

OUT = measure.RESULTS / "plan.json"
GPUS = (64, 256, 1024)
MEMORY_GPUS = (128, 256)  # half of what is enough with float32 moments, and that
LENGTH = 131072
PRESET = "deepseek_v32"


def row(phase: str, gpus: int) -> dict[str, Any]:
    """Plans a phase on the best mesh of `gpus`; where none fits, of the fewest GPUs on which one does."""
    job = Job.of(load_preset(PRESET), phase, LENGTH, PUBLISHED_BATCH_SIZES[phase])
    used, plan = gpus, best_plan(job, gpus)
    while plan is None:
        used *= 2
        plan = best_plan(job, used)
    where = {"phase": phase, "gpus": gpus, "planned_gpus": used, "batch_size": job.batch_size}
    return {**where, "least_state_gib": least_state_bytes(job, gpus) / GIB, **figures(plan)}


def figures(plan: Plan) -> dict[str, Any]:
    """Gathers what is recorded of a plan: GiB a device, GiB sent a device and step by kind, seconds a step."""
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
        "exposed_seconds": plan.exposed_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "binds": plan.binds,
    }


def memory_row(gpus: int) -> dict[str, Any]:
    """Plans SPARSE with bfloat16 moments on the best mesh of `gpus`, and then with what is best kept there."""
    job = with_moments(Job.of(load_preset(PRESET), "SPARSE", LENGTH, PUBLISHED_BATCH_SIZES["SPARSE"]), "bfloat16")
    plan = nearest_plan(job, gpus)
    if plan is None or not plan.fits:
        state = least_state_bytes(job, gpus) / GIB
        needed = {"needed_gib": state} if plan is None else figures(plan)
        return {"gpus": gpus, "fits": False, "least_state_gib": state, **needed}
    chosen = choose_keep(job, plan.shape)
    kept = {"keep": list(chosen.job.settings.keep), "keeping": figures(chosen)}
    return {"gpus": gpus, "fits": True, **figures(plan), **kept}


def run_rows() -> list[dict[str, Any]]:
    """Computes how far plans of the steps that `benchmarks.sharded` measured are from what they took."""
    rows = []
    for phase in PUBLISHED_BATCH_SIZES:
        for measured in recorded("sharded")[phase]["timings"]:
            if "failed" in measured:
                continue
            sequences, mesh = measured.get("sequences", 1), measured["mesh"].removeprefix("one GPU")
            settings = measured_settings(phase, LENGTH, sequences=sequences)
            plan = make_plan(Job(sharded.WIDTH, settings, sequences, LENGTH, 1), parse_mesh(mesh))
            errors = {
                "memory_error": plan.bytes_needed / GIB / measured["peak_gib"] - 1,
                "seconds_error": plan.seconds / measured["seconds"] - 1,
            }
            rows.append({"phase": phase, "mesh": describe(plan.shape), **errors})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Records the errors on measured steps, the calibration and all rows."""
    names, out = measure.command_line(__doc__, ("runs", "plans", "memory"), OUT, on_gpu=False)
    if "runs" in names:
        measure.record(out, {"runs": {"rows": run_rows()}})
    if "plans" in names:
        record_plans(out)
    if "memory" in names:
        measure.record(out, {"memory": {"usable_gib": usable_memory() / GIB, "rows": [*map(memory_row, MEMORY_GPUS)]}})


def record_plans(out: pathlib.Path) -> None:
    """Records the calibration, and the rows as they come."""
    part: dict[str, Any] = {
        "calibration": dataclasses.asdict(calibration()),
        "usable_gib": usable_memory() / GIB,
        "rows": [],
    }
    for phase in PUBLISHED_BATCH_SIZES:
        for gpus in GPUS:
            part["rows"].append(row(phase, gpus))
            print(part["rows"][-1], flush=True)
            measure.record(out, {"plans": part})


if __name__ == "__main__":
    main()
