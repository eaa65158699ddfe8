"""Says what a training step takes of each GPU of a mesh, before there is one: bytes, exchanges, seconds, what binds it.

`trace` makes the step of one device a list of operations, `costs` adds up what they take, `hardware` times them at the
rates of an H200 in `rates.json`, `estimate` makes a plan of it, `keeping` chooses what it keeps for the backward pass,
and `command` is `python -m train plan`. `serving` plans serving by the rates in `serving_rates.json`, and
`serving_command` is `python -m train plan --serve`. None of these imports the training loop.
"""

from train.planner.command import best_plan, least_state_bytes, load_run, main, nearest_plan, with_moments
from train.planner.estimate import (
    GIB,
    PUBLISHED_BATCH_SIZES,
    SLICE,
    Calibration,
    Job,
    Plan,
    calibration,
    make_plan,
    measured_settings,
    state_bytes,
)
from train.planner.hardware import usable_memory
from train.planner.keeping import choose_keep, keep_plans, with_keep
from train.planner.serving_command import main as serving_main

__all__ = [
    "GIB",
    "PUBLISHED_BATCH_SIZES",
    "SLICE",
    "Calibration",
    "Job",
    "Plan",
    "best_plan",
    "calibration",
    "choose_keep",
    "keep_plans",
    "least_state_bytes",
    "load_run",
    "main",
    "make_plan",
    "measured_settings",
    "nearest_plan",
    "serving_main",
    "state_bytes",
    "usable_memory",
    "with_keep",
    "with_moments",
]
