"""Keeps what was measured of one seed: each measurement in a file of its own while it runs, all in one at the end."""

import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax

from studies.needle.inside import Inside
from studies.needle.maps import Maps
from studies.needle.questions import Cell
from train.evaluation.evaluate import Evaluation
from train.evaluation.kept_mass import KeptMass
from train.files import replace_text
from train.processes.stopping import StoppedError, Stopping

FOLDER = "measured"


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Measures each thing once, whoever asks again: so a study that was cut goes on where it was.

    Attributes:
      folder: of the files.
      step: the last of the run, for whom it stops.
      stopping: signals and the clock.
      say: told what is measured.
    """

    folder: Path
    step: int
    stopping: Stopping | None = None
    say: Callable[[str], object] = lambda text: None

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Gives what `measure` gave, as JSON keeps it, and measures only if no file has it.

        Raises:
          StoppedError: if the time is over before it begins.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            if self.stopping is not None and self.stopping.due is not None:
                raise StoppedError(self.step, self.stopping.due)
            began = time.monotonic()
            self.say(f"measuring {name}")
            found = measure()
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = {"seconds": round(time.monotonic() - began, 2), "found": found}
            replace_text(path, json.dumps(kept, indent=1) + "\n")
        return json.loads(path.read_text())["found"]

    def seconds(self) -> float:
        """Adds up what all measurements took."""
        return sum(json.loads(path.read_text())["seconds"] for path in self.folder.glob("*.json"))


@dataclasses.dataclass(frozen=True)
class Selected:
    """Holds what selections keep of one model's attention, and its losses over them; see `measure_selections`."""

    kept: KeptMass
    losses: dict[str, dict[str, float | None]]

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Reads what JSON has kept."""
        return cls(KeptMass(**values["kept"]), values["losses"])


@dataclasses.dataclass(frozen=True)
class Found:
    """Holds all that was measured of one seed.

    Attributes:
      seed: of the run.
      setup: the run's description, as shown.
      corpus: the record of the text.
      circumstances: date, device and version, and `beside`: what else the device did meanwhile.
      losses: held-out losses by weights and part.
      warmed: of the weights after WARMUP.
      final: of those at the end.
      agreement: the share of equal likeliest tokens, by pair and part.
      inside: of the weights at the end, by the kind of queries.
      answers: what share of questions is right.
      generated: questions answered through pages of an FP8 cache, and the same questions by the forward pass.
      curves: the numbers of every step, by phase.
      seconds: wall time of each phase, and of measuring.
      waited: the share of the training time in which the device had no data.
    """

    seed: int
    setup: dict[str, Any]
    corpus: dict[str, Any]
    circumstances: dict[str, Any]
    losses: dict[str, dict[str, float | None]]
    warmed: Selected
    final: Selected
    agreement: dict[str, dict[str, float]]
    inside: dict[str, Inside]
    answers: Maps
    generated: dict[str, Cell]
    curves: dict[str, dict[str, list[Any]]]
    seconds: dict[str, float]
    waited: float

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation that the general report shows."""
        return Evaluation(self.losses, self.final.losses, self.final.kept)

    def save(self, path: Path) -> None:
        """Writes one JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(self) | {"answers": self.answers.to_json()}
        replace_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
          ValueError: if it is not there, or is no such file.
        """
        try:
            values = json.loads(path.read_text())
            values |= {
                "warmed": Selected.of(values["warmed"]),
                "final": Selected.of(values["final"]),
                "inside": {name: Inside.of(each) for name, each in values["inside"].items()},
                "answers": Maps.from_json(values["answers"]),
                "generated": {name: Cell(**each) for name, each in values["generated"].items()},
            }
            return cls(**values)
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} must hold what was measured of a seed: {type(error).__name__}: {error}"
            ) from error


def circumstances(beside: str | None = None) -> dict[str, str]:
    """Says when and on what something is measured, and beside which other work on the same device, if any."""
    today, device = datetime.date.today().isoformat(), jax.devices()[0].device_kind
    return {"date": today, "device": device, "jax": jax.__version__} | ({"beside": beside} if beside else {})


def gaps_by_position(found: Found, ours: str, theirs: str) -> dict[str, float]:
    """Gives (loss of ours) / (loss of theirs) - 1 by the ranges of positions."""
    mine, other = found.losses[ours], found.losses[theirs]
    pairs = {name: (mine[name], other.get(name)) for name in mine if name.startswith("positions")}
    return {name: a / b - 1 for name, (a, b) in pairs.items() if a is not None and b is not None}
