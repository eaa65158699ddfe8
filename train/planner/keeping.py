"""Chooses what a step keeps for its backward pass: what an H200's memory leaves room for, by the seconds it saves."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from dsa_jax.remat import KEEPABLE
from train.planner.estimate import Job, Plan, Shape, make_plan
from train.planner.hardware import usable_memory

CHOICES_TRIED = 8  # of those that should fit, the fastest first


def with_keep(job: Job, keep: tuple[str, ...]) -> Job:
    """Makes the job that keeps these results, names of `dsa_jax.remat.KEEPABLE`, besides what is always kept."""
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, keep=keep))


def keep_plans(job: Job, shape: Shape) -> dict[str, Plan]:
    """Plans the step with each result kept by itself, by its name.

    Raises:
      ValueError: if model or batch cannot be split over the mesh.
    """
    return {name: make_plan(with_keep(job, (name,)), shape) for name in KEEPABLE}


def choose_keep(
    job: Job, shape: Shape, *, budget: float | None = None, alone: Mapping[str, Plan] | None = None
) -> Plan:
    """Plans the step with what is best kept within a budget of memory.

    What several results take and save together is first taken to be the sum. The choices that should fit are planned as
    they are, the fastest first, and the first that does fit is taken. Whatever the job itself keeps is put aside.

    Args:
      job: the step.
      shape: the mesh.
      budget: bytes of a device; without it what an H200 gives.
      alone: the plans of `keep_plans`, if they are made already.

    Returns:
      the plan, whose `job.settings.keep` is the choice. It is of nothing, whether that fits or not, where none of
      `CHOICES_TRIED` does.

    Raises:
      ValueError: if model or batch cannot be split over the mesh.
    """
    budget = usable_memory() if budget is None else budget
    nothing = make_plan(with_keep(job, ()), shape)
    alone = keep_plans(job, shape) if alone is None else alone
    for keep in itertools.islice(_choices(nothing, alone, budget - nothing.bytes_needed), CHOICES_TRIED):
        plan = make_plan(with_keep(job, keep), shape)
        if plan.bytes_needed <= budget:
            return plan
    return nothing


def _choices(nothing: Plan, alone: Mapping[str, Plan], room: float) -> Iterator[tuple[str, ...]]:
    """Yields sets of results whose bytes add up to no more than the room, those that save most seconds first."""
    saved = {name: nothing.seconds - plan.seconds for name, plan in alone.items()}
    needed = {name: plan.bytes_needed - nothing.bytes_needed for name, plan in alone.items()}
    useful = [name for name in alone if saved[name] > 0]
    sets = [keep for count in range(1, len(useful) + 1) for keep in itertools.combinations(useful, count)]
    fitting = [keep for keep in sets if sum(needed[name] for name in keep) <= room]
    yield from sorted(fitting, key=lambda keep: -sum(saved[name] for name in keep))
