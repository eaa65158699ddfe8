"""Says what a run is: the model, the phases and their stages, the data; as dataclasses and as JSON."""

import dataclasses
import difflib
import functools
import itertools
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import optax

from dsa_jax import Config
from dsa_jax.remat import check_keep
from train.checks import check_integer, check_number, shown
from train.data import DataConfig
from train.losses import prediction_losses
from train.optimizer import OptimizerSettings, stage_scale
from train.phases import PHASES, STREAMS, TRAINABLE, Phase

JSON_NAMES = {"phase": "name"}  # fields that are called otherwise in JSON
MAX_STAGES = 100  # each of a phase draws its batches from a seed of its own
MAX_SEED = 2**32 // (MAX_STAGES * STREAMS) - 2  # seeds of batches are 32 bits
MAX_INTEGER = 2**63 - 1  # in JSON
MAX_DIFFERENCES = 8  # that a message names
MAX_FIELDS = 12  # of a class whose fields a message lists
MAX_NAME = 100  # characters of a name that is compared with others


def stream_seed(seed: int, stream: int, stage: int) -> int:
    """Gives the seed of a stage's batches; streams and stages of one run, and those of other runs, have others."""
    return MAX_STAGES * (STREAMS * seed + stream) + stage


def _check_tuple(name: str, values: Any, kind: type) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{name} must be a tuple of {kind.__name__}, got {shown(values)}")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Describes steps of one shape: `batch_size` sequences of `seq_len` tokens, taken in `micro_batches` parts.

    `rates` are factors on the phase's learning rates at the stage's first and last step, and linear between: with
    `(1.0, 0.03)` the last stage of a phase brings a constant rate down, however long the stages before it are.
    `prediction_weight` is lambda, the weight of the prediction layers' cross-entropy where these train along.
    """

    steps: int
    batch_size: int
    seq_len: int
    micro_batches: int = 1
    rates: tuple[float, ...] = (1.0, 1.0)
    prediction_weight: float = 0.3

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "micro_batches"):
            check_integer(name, getattr(self, name))
        if self.batch_size % self.micro_batches:
            raise ValueError(f"micro_batches must divide batch_size {self.batch_size}, got {self.micro_batches}")
        if not isinstance(self.rates, tuple) or len(self.rates) != 2:
            raise ValueError(
                f"rates must be two factors, at a stage's first step and its last, got {shown(self.rates)}"
            )
        for factor in self.rates:
            check_number("rates", factor, least=0)
        check_number("prediction_weight", self.prediction_weight, least=0)


@dataclasses.dataclass(frozen=True)
class PhaseSettings:
    """Holds a phase of a run: its stages share one schedule and one optimizer state.

    Examples:
      >>> from train.phases import WARMUP
      >>> adamw = OptimizerSettings(learning_rate=1e-3)
      >>> PhaseSettings(WARMUP, (Stage(steps=1000, batch_size=16, seq_len=4096),), indexer=adamw).steps
      1000
    """

    phase: Phase
    stages: tuple[Stage, ...]
    backbone: OptimizerSettings | None = None
    indexer: OptimizerSettings | None = None
    bias_rate: float = 0.0  # the step of the router's bias against the expert load
    keep: tuple[str, ...] = ()  # results kept for the backward pass, names of `dsa_jax.remat.KEEPABLE`
    predictions: bool = False  # whether the model's prediction layers train along; else they stay as they are

    def __post_init__(self):
        if not isinstance(self.phase, Phase):
            raise ValueError(f"phase must be a Phase, like train.phases.BASE, got {shown(self.phase)}")
        _check_tuple("stages", self.stages, Stage)
        if not 1 <= len(self.stages) <= MAX_STAGES:
            raise ValueError(f"phase {self.name} must have from one to {MAX_STAGES} stages, got {len(self.stages)}")
        check_integer(f"the steps of phase {self.name}", self.steps)
        for group in TRAINABLE:
            self._check_optimizer(group)
        check_number("bias_rate", self.bias_rate, least=0)
        check_keep(self.keep)
        if not isinstance(self.predictions, bool):
            raise ValueError(f"predictions must be True or False, got {shown(self.predictions)}")
        if self.predictions and (self.phase.selection is not None or not self._teaches_predictions):
            raise ValueError(
                f"predictions need LM_LOSS or KL_LOSS among the losses, and no imposed selection, got phase {self.name}"
            )

    def _check_optimizer(self, group: str) -> None:
        settings = getattr(self, group)
        if settings is None and group in self.phase.trains:
            raise ValueError(f"phase {self.name} trains the {group}: give its optimizer settings")
        if settings is not None and not isinstance(settings, OptimizerSettings):
            raise ValueError(f"{group} must be OptimizerSettings, got {shown(settings)}")
        if settings is not None and settings.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps of the {group} must be at most the {self.steps} steps of phase {self.name}, "
                f"got {settings.warmup_steps}"
            )

    @property
    def name(self) -> str:
        """The phase's name."""
        return self.phase.name

    @property
    def steps(self) -> int:
        """The steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def _teaches_predictions(self) -> bool:
        return bool(prediction_losses([loss for _, loss in self.phase.losses], depths=1))

    @property
    def prediction_weight(self) -> optax.Schedule:
        """The weight of the prediction layers' cross-entropy at each step: its stage's."""
        ends = itertools.accumulate(stage.steps for stage in self.stages)
        constants = [optax.constant_schedule(stage.prediction_weight) for stage in self.stages]
        return optax.join_schedules(constants, list(ends)[:-1])

    @property
    def rate_scale(self) -> optax.Schedule | None:
        """The factor that the stages put on the learning rates, None where it is 1 throughout."""
        return stage_scale([(stage.steps, stage.rates) for stage in self.stages])


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Holds everything that decides the numbers of a run."""

    model: Config
    phases: tuple[PhaseSettings, ...]
    data: DataConfig = DataConfig()
    seed: int = 0
    checkpoint_every: int = 50
    checkpoint_minutes: float | None = None  # at most between two checkpoints; None: steps alone count
    keep_checkpoints: int = 2  # besides the last of each phase
    evaluation_batches: int = 4  # held-out batches of each kind
    evaluate_every: int = 0  # steps between two measurements of the held-out loss while it trains; 0 for none
    keep_best: bool = False  # the checkpoint of the least of these in the phase that trains

    def __post_init__(self):
        if not isinstance(self.model, Config) or not isinstance(self.data, DataConfig):
            raise ValueError(f"model must be a Config and data a DataConfig, got {shown((self.model, self.data))}")
        if self.model.param_dtype != "float32":
            raise ValueError(f"training keeps its parameters in float32, got param_dtype {self.model.param_dtype!r}")
        if self.model.expert_dtype is not None:
            raise ValueError(f"training needs expert_dtype None, got {self.model.expert_dtype!r}: it has no gradients")
        check_integer("seed", self.seed, least=0, most=MAX_SEED)
        for name in ("checkpoint_every", "keep_checkpoints", "evaluation_batches"):
            check_integer(name, getattr(self, name))
        if self.checkpoint_minutes is not None:
            check_number("checkpoint_minutes", self.checkpoint_minutes, above=0)
        check_integer("evaluate_every", self.evaluate_every, least=0)
        if not isinstance(self.keep_best, bool):
            raise ValueError(f"keep_best must be True or False, got {shown(self.keep_best)}")
        if self.keep_best and not self.evaluate_every:
            raise ValueError("keep_best needs held-out losses to choose by: give evaluate_every")
        _check_tuple("phases", self.phases, PhaseSettings)
        if not self.phases:
            raise ValueError("a run must have at least one phase")
        for phase in self.phases if self.model.baseline == "nsa" else ():
            if phase.phase.attention == "dense" or "indexer" in phase.phase.trains or phase.phase.selection:
                raise ValueError(
                    "a model of baseline 'nsa' has no indexer and no dense attention: its phases must be like NATIVE, "
                    f"got {phase.name}"
                )
        predicting = [phase.name for phase in self.phases if phase.predictions]
        if predicting and not self.model.num_nextn_predict_layers:
            raise ValueError(f"predictions of phase {predicting[0]} need num_nextn_predict_layers above 0, got 0")
        longest = max(stage.seq_len for phase in self.phases for stage in phase.stages)
        if longest > self.model.max_position_embeddings:
            raise ValueError(
                f"seq_len must be at most the model's max_position_embeddings {self.model.max_position_embeddings}, "
                f"got {longest}"
            )

    @property
    def steps(self) -> int:
        """The steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def select(self, names: tuple[str, ...]) -> Self:
        """Takes the phases of these names alone, in the run's order.

        Raises:
          ValueError: if a name is of none of its phases.
        """
        unknown = [name for name in names if name not in [phase.name for phase in self.phases]]
        if unknown:
            raise ValueError(f"phases must be among {[p.name for p in self.phases]} of the preset, got {unknown}")
        return dataclasses.replace(self, phases=tuple(phase for phase in self.phases if phase.name in names))

    def to_json(self) -> dict[str, Any]:
        """Writes the run as plain JSON values; a phase by its name."""
        return as_json(self)

    @classmethod
    def from_json(
        cls,
        values: Any,
        *,
        phases: Mapping[str, Phase] = PHASES,
        data: type[DataConfig] | None = DataConfig,
    ) -> Self:
        """Reads the run that `to_json` wrote; what is left out takes its default.

        Args:
          values: a JSON object.
          phases: what names of phases mean; `PHASES | {"SFT": SFT}` knows one more.
          data: the class of its data settings, for a program that has its own; None leaves them unread.

        Raises:
          ValueError: naming what is unknown, missing or of another type.
        """

        readers: dict[type, Any] = {Phase: functools.partial(_phase_named, phases)}
        if data is not DataConfig:
            readers[DataConfig] = lambda part, where: DataConfig() if data is None else read_json(data, part, where)
        return read_json(cls, values, "run", readers)


def _phase_named(phases: Mapping[str, Phase], name: Any, where: str) -> Phase:
    if not isinstance(name, str) or name not in phases:
        raise ValueError(f"{where} must be one of {', '.join(phases)}, got {shown(name)}")
    return phases[name]


def as_json(settings: Any) -> dict[str, Any]:
    """Writes settings, a dataclass, as plain JSON values."""
    return json.loads(json.dumps(_plain(settings), default=str))


def _plain(value: Any) -> Any:
    """Turns dataclasses into dicts and a phase into its name."""
    if isinstance(value, Phase):
        return value.name
    if dataclasses.is_dataclass(value):
        return {JSON_NAMES.get(f.name, f.name): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def listed(changes: list[str]) -> str:
    """Writes differences as one line; the first of many, and how many more there are."""
    more = len(changes) - MAX_DIFFERENCES
    return "; ".join(changes[:MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


type Readers = Mapping[type, Callable[[Any, str], Any]]


def read_json(kind: Any, value: Any, name: str, readers: Readers = types.MappingProxyType({})) -> Any:
    """Builds a value of the annotated type `kind` from plain JSON values.

    Args:
      kind: a dataclass, a tuple of one type, an optional, a path or a plain type.
      value: the JSON values.
      name: what the value is called in messages.
      readers: functions of a value and its name that read the types they are given for.

    Raises:
      ValueError: naming what is unknown, missing or of another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        return read_json(next(a for a in arguments if a is not types.NoneType), value, name, readers)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, got {shown(value)}")
        return tuple(read_json(arguments[0], part, f"{name}[{i}]", readers) for i, part in enumerate(value))
    if isinstance(kind, type) and (reader := readers.get(kind)) is not None:
        return reader(value, name)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, name, readers)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float:
        check_number(name, value)
        return float(value)
    if isinstance(kind, type) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ValueError(f"{name} must be {kind.__name__}, got {shown(value)}")
    if kind is int:
        check_integer(name, value, least=-MAX_INTEGER, most=MAX_INTEGER)
    return value


def nearest(names: Sequence[str], known: Sequence[str]) -> str:
    """Writes the known names that are spelled most like unknown ones, for the end of a message.

    Examples:
      >>> nearest(["phase", "colour"], ["phases", "seed"])
      '; nearest: phases'
    """
    found = [close[0] for name in names if (close := difflib.get_close_matches(name[:MAX_NAME], known, n=1))]
    return f"; nearest: {', '.join(dict.fromkeys(found))}" if found else ""


def _named(names: list[str]) -> str:
    """Writes names as a list, the first of many."""
    more = f" and {len(names) - MAX_DIFFERENCES} more" if len(names) > MAX_DIFFERENCES else ""
    return f"[{', '.join(map(shown, names[:MAX_DIFFERENCES]))}]{more}"


def _read_dataclass(kind: Any, value: Any, name: str, readers: Readers) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object with the fields of {kind.__name__}, got {shown(value)}")
    fields = {JSON_NAMES.get(field.name, field.name): field for field in dataclasses.fields(kind)}
    unknown = sorted(value.keys() - fields.keys())
    if unknown:
        known = "" if len(fields) > MAX_FIELDS else f"; {kind.__name__} has {sorted(fields)}"
        close = nearest(unknown[:MAX_DIFFERENCES], sorted(fields))
        raise ValueError(f"{name} has unknown fields {_named(unknown)}{close}{known}")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [field for field in required if field not in value]
    if missing:
        raise ValueError(f"{name} lacks the fields {_named(missing)} of {kind.__name__}")
    parts = {key: read_json(fields[key].type, part, f"{name}.{key}", readers) for key, part in value.items()}
    return kind(**{fields[key].name: part for key, part in parts.items()})
