"""What a run says when it is continued: where it goes on, what has changed, and what that does to its rates."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optax

from train.optimizer import OptimizerSettings, make_schedule, stage_scale
from train.saved.changes import OPTIMIZERS, Position
from train.saved.folder import Opened
from train.settings import PhaseSettings, RunConfig, read_json

RATES = ("learning_rate", "muon_learning_rate")


def describe_resumption(folder: Path, config: RunConfig, opened: Opened) -> list[str]:
    """Says where a run goes on and with what changes, a line each; nothing where it begins."""
    position = opened.position
    if position is None:
        return []
    settings = config.phases[position.phase]
    where = f"{settings.name} {position.phase_step}/{settings.steps}, step {position.step} of {config.steps}"
    if position.step == config.steps:
        return [f"{folder} has done all its steps: {where}"]
    lines = [f"resuming {folder} at {where}"]
    lines += [f"changed from step {position.step + 1} on: {change}" for change in opened.changes]
    lines += [f"the data begin at their start at step {position.step + 1}"] if opened.new_data else []
    return lines + [*_rates(opened.saved, settings, position)]


def _rates(saved: Mapping[str, Any], settings: PhaseSettings, position: Position) -> Iterator[str]:
    """Says which rate of the phase is another at the next step than it would have been.

    A schedule spans its phase from its first step to its last. With another number of steps a cosine is thus at another
    place, and a rate may jump.
    """
    before = saved.get("phases", [])
    before = before[position.phase] if position.phase < len(before) else {}
    stages = [(stage["steps"], stage.get("rates", (1.0, 1.0))) for stage in before.get("stages", ())]
    steps, scale = sum(count for count, _ in stages), stage_scale(stages)
    for group in OPTIMIZERS:
        ours, theirs = getattr(settings, group), before.get(group)
        if ours is None or theirs is None or position.phase_step == settings.steps:
            continue
        theirs = read_json(OptimizerSettings, theirs, group)
        for name in RATES:
            rate = _rate(theirs, name, steps, scale, position.phase_step)
            new_rate = _rate(ours, name, settings.steps, settings.rate_scale, position.phase_step)
            if rate != new_rate:
                yield f"{name} of the {group} at step {position.step + 1}: {rate:.4g} → {new_rate:.4g}"


def _rate(settings: OptimizerSettings, name: str, steps: int, scale: optax.Schedule | None, step: int) -> float:
    """Computes a rate of a phase of `steps` steps behind `step` of them; 0 where there is none."""
    peak = getattr(settings, name)
    return 0.0 if peak is None else np.asarray(make_schedule(peak, settings, steps, scale)(step)).item()
