"""Says what a run is: the model, the phases and their stages, the data; as dataclasses and as JSON."""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from dsa_jax import Config
from train.data import DataConfig
from train.optimizer import OptimizerSettings
from train.phases import PHASES, Phase

JSON_NAMES = {"phase": "name"}  # fields that are called otherwise in JSON


@dataclasses.dataclass(frozen=True)
class Stage:
    """Describes steps of one shape: `batch_size` sequences of `seq_len` tokens, taken in `micro_batches` parts."""

    steps: int
    batch_size: int
    seq_len: int
    micro_batches: int = 1

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.micro_batches:
            raise ValueError(f"micro_batches must divide batch_size {self.batch_size}, got {self.micro_batches}")


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

    def __post_init__(self):
        for group in self.phase.trains:
            if getattr(self, group) is None:
                raise ValueError(f"phase {self.name} trains the {group}: give its optimizer settings")
        if not self.stages:
            raise ValueError(f"phase {self.name} must have at least one stage")

    @property
    def name(self) -> str:
        """The phase's name."""
        return self.phase.name

    @property
    def steps(self) -> int:
        """The steps of all stages."""
        return sum(stage.steps for stage in self.stages)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Holds everything that decides the numbers of a run."""

    model: Config
    phases: tuple[PhaseSettings, ...]
    data: DataConfig = DataConfig()
    seed: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2  # besides the last of each phase
    evaluation_batches: int = 4  # held-out batches of each kind

    def __post_init__(self):
        if self.model.param_dtype != "float32":
            raise ValueError(f"training keeps its parameters in float32, got param_dtype {self.model.param_dtype!r}")
        for name in ("checkpoint_every", "keep_checkpoints", "evaluation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.phases:
            raise ValueError("a run must have at least one phase")
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
        return json.loads(json.dumps(_plain(self), default=str))

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
        raise ValueError(f"{where} must be one of {', '.join(phases)}, got {name!r}")
    return phases[name]


def _plain(value: Any) -> Any:
    """Turns dataclasses into dicts and a phase into its name."""
    if isinstance(value, Phase):
        return value.name
    if dataclasses.is_dataclass(value):
        return {JSON_NAMES.get(f.name, f.name): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Names the values in which two JSON trees differ, each with both values.

    Examples:
      >>> differences({"model": {"index_topk": 5}}, {"model": {"index_topk": 4}})
      ['model.index_topk 4, here 5']
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = list(dict.fromkeys([*ours, *theirs]))
        return [d for key in keys for d in differences(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [d for i, pair in enumerate(zip(ours, theirs, strict=True)) for d in differences(*pair, f"{name}[{i}]")]
    return [] if ours == theirs else [f"{name} {theirs!r}, here {ours!r}"]


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
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(read_json(arguments[0], part, f"{name}[{i}]", readers) for i, part in enumerate(value))
    if isinstance(kind, type) and (reader := readers.get(kind)) is not None:
        return reader(value, name)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, name, readers)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def _read_dataclass(kind: Any, value: Any, name: str, readers: Readers) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object with the fields of {kind.__name__}, got {value!r}")
    fields = {JSON_NAMES.get(field.name, field.name): field for field in dataclasses.fields(kind)}
    unknown = sorted(value.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{name} has unknown fields {unknown}; {kind.__name__} has {sorted(fields)}")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [field for field in required if field not in value]
    if missing:
        raise ValueError(f"{name} lacks the fields {missing} of {kind.__name__}")
    parts = {key: read_json(fields[key].type, part, f"{name}.{key}", readers) for key, part in value.items()}
    return kind(**{fields[key].name: part for key, part in parts.items()})
