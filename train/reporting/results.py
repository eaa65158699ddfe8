"""Keeps a run's findings: everything that a report says, and its file `results.json`."""

import dataclasses
import itertools
import json
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from train.evaluation.evaluate import Evaluation
from train.evaluation.kept_mass import KeptMass
from train.files import replace_text

RETIRED = ("limit_seconds", "limit_rss")  # of older files: limits are goals, which are the caller's

type Curve = dict[str, list[float]]  # "step" counted over the run, and "lm_loss" or "kl" at each


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """Holds what one seed found."""

    seed: int
    evaluation: Evaluation
    curves: dict[str, Curve]
    """By phase, in the order trained; see `read_curves`."""
    seconds: dict[str, float]
    """Wall time of each phase and of the evaluation."""


@dataclasses.dataclass(frozen=True)
class Results:
    """Holds all that the report says.

    Raises:
      ValueError: without a seed.
    """

    name: str
    setup: dict[str, str | int | float]
    """The run's description, as shown: model, sequence length, K, steps."""
    seeds: list[SeedResult]
    seconds: float
    """Wall time of everything."""
    max_rss: int | None
    """Peak resident memory in bytes, if it is of the process that trained."""
    sample: str | None = None
    """A sampled continuation."""

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("results must hold at least one seed, got none")

    def save(self, folder: Path) -> None:
        """Writes `results.json`."""
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        replace_text(folder / "results.json", text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
          ValueError: if it is not there or not whole.
        """
        path = folder / "results.json"
        try:
            values = json.loads(path.read_text())
            seeds = [_seed_result(seed) for seed in values.pop("seeds")]
            return cls(seeds=seeds, **{name: value for name, value in values.items() if name not in RETIRED})
        except OSError as error:
            raise ValueError(f"a finished run must have {path}: {error.strerror}") from error
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} must hold the results of a run, got {type(error).__name__}: {str(error)[:300]}"
            ) from error


def _seed_result(values: dict[str, Any]) -> SeedResult:
    evaluation = values.pop("evaluation")
    kept = KeptMass(**evaluation.pop("kept"))
    return SeedResult(evaluation=Evaluation(kept=kept, **evaluation), **values)


def read_curves(
    records: Iterable[Mapping[str, Any]], names: Sequence[str] = ("step", "lm_loss", "kl")
) -> dict[str, dict[str, list[Any]]]:
    """Gathers the curves of these names of each phase from the lines of `metrics.jsonl`."""
    curves: dict[str, dict[str, list[Any]]] = {}
    for record in records:
        curve = curves.setdefault(record["phase"], {})
        for name in names:
            if name in record:
                curve.setdefault(name, []).append(record[name])
    return curves


def read_seconds(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Adds up what the steps of each phase took, from the lines of `metrics.jsonl`."""
    seconds: dict[str, float] = {}
    for record in records:
        seconds[record["phase"]] = seconds.get(record["phase"], 0.0) + record["seconds"]
    return seconds


def first_rise(points: Iterable[tuple[float, float]]) -> float | None:
    """Interpolates where values first rise from below 0 to it or beyond, on straight lines; None where they do not.

    Args:
      points: places and values, by rising place.

    Examples:
      >>> first_rise([(0.0, 1.0), (1.0, -1.0), (3.0, 3.0)])
      1.5
    """
    for (left, before), (right, behind) in itertools.pairwise(points):
        if before < 0 <= behind:
            return left + (right - left) * before / (before - behind)
    return None


def max_rss() -> int:
    """Asks for this process's peak resident memory so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def mean(values: Iterable[float | None]) -> float | None:
    """Averages what is there; None if nothing is."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def as_text(values: Sequence[float | None], digits: int = 3) -> str:
    """Writes the mean over seeds, and each seed's own in brackets if there are several.

    Examples:
      >>> as_text([0.75, 0.375])
      '0.562 (0.750, 0.375)'
    """
    average = mean(values)
    if average is None or len(values) == 1:
        return "–" if average is None else f"{average:.{digits}f}"
    each = ", ".join("–" if value is None else f"{value:.{digits}f}" for value in values)
    return f"{average:.{digits}f} ({each})"
