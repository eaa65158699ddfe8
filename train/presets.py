"""What a run is: the model, the phases and their stages, the data. Two presets, and any other from a JSON file."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Self

from dsa_jax import Config
from train.data import DataConfig
from train.optimizer import OptimizerSettings
from train.phases import PHASES, Phase, phase_named


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps of one shape: `batch_size` sequences of `seq_len` tokens, taken through in `micro_batches` parts."""

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
    """One phase of a run: its stages share one schedule and one optimizer state."""

    name: str
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
    def phase(self) -> Phase:
        """What the phase is, beside how it is run here."""
        return phase_named(self.name)

    @property
    def steps(self) -> int:
        """The steps of all stages."""
        return sum(stage.steps for stage in self.stages)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides the numbers of a run."""

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
        """The run of these phases alone, in training order."""
        order = [phase.name for phase in PHASES]
        unknown = [name for name in names if name not in [phase.name for phase in self.phases]]
        if unknown:
            raise ValueError(f"phases must be among {[p.name for p in self.phases]} of the preset, got {unknown}")
        kept = sorted((p for p in self.phases if p.name in names), key=lambda phase: order.index(phase.name))
        return dataclasses.replace(self, phases=tuple(kept))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The run that `to_json` wrote; what is left out takes its default, what is unknown is refused by name."""
        return _build(cls, values, "run")


def deepseek_v32() -> RunConfig:
    """The published recipe of DeepSeek-V3.2-Exp, from its dense checkpoint; betas and decay are DeepSeek-V3's."""
    rate = OptimizerSettings(learning_rate=7.3e-6)
    return RunConfig(
        model=Config.deepseek_v32(),
        phases=(
            PhaseSettings("WARMUP", (Stage(1000, 16, 131072, 16),), indexer=OptimizerSettings(learning_rate=1e-3)),
            PhaseSettings("SPARSE", (Stage(15000, 480, 131072, 480),), backbone=rate, indexer=rate, bias_rate=1e-3),
        ),
    )


def tiny() -> RunConfig:
    """Ends in minutes on two CPU cores; found by measuring, see the report that it writes."""
    matrices = OptimizerSettings(learning_rate=4e-3, muon_learning_rate=0.02, schedule="cosine", weight_decay=0.0)
    plain = OptimizerSettings(learning_rate=5e-4, weight_decay=0.0)
    return RunConfig(
        model=Config.tiny(),
        phases=(
            # A bias rate of 1e-3 left two experts with 90 % of the load after 60 steps; 2e-2 spread it within 40.
            PhaseSettings("BASE", (Stage(220, 16, 128), Stage(150, 4, 512)), backbone=matrices, bias_rate=1e-2),
            PhaseSettings("WARMUP", (Stage(60, 4, 512),), indexer=dataclasses.replace(plain, learning_rate=1e-2)),
            PhaseSettings(
                "SPARSE",
                (Stage(50, 4, 512),),
                backbone=plain,
                indexer=dataclasses.replace(plain, learning_rate=2e-3),
                bias_rate=1e-2,
            ),
        ),
    )


PRESETS = {"tiny": tiny, "deepseek_v32": deepseek_v32}


def load_preset(name: str) -> RunConfig:
    """A preset by name, or the run that a JSON file describes (the `run.json` of any run's folder is one)."""
    if name in PRESETS:
        return PRESETS[name]()
    if not name.endswith(".json"):
        raise ValueError(f"preset must be {' or '.join(PRESETS)} or a .json file, got {name!r}")
    try:
        values = json.loads(Path(name).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"preset must be a readable JSON file, got {name}: {error}") from error
    return RunConfig.from_json(values.get("run", values) if isinstance(values, dict) else values)


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """The names of the values in which two JSON trees differ, each with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = list(dict.fromkeys([*ours, *theirs]))
        return [d for key in keys for d in differences(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [d for i, pair in enumerate(zip(ours, theirs, strict=True)) for d in differences(*pair, f"{name}[{i}]")]
    return [] if ours == theirs else [f"{name} {theirs!r}, here {ours!r}"]


def _build(kind: Any, value: Any, name: str) -> Any:
    """A value of the annotated type `kind` from plain JSON values; `name` is for the messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        return _build(next(a for a in arguments if a is not types.NoneType), value, name)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(_build(arguments[0], part, f"{name}[{i}]") for i, part in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, name)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def _build_dataclass(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object with the fields of {kind.__name__}, got {value!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(value.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{name} has unknown fields {unknown}; {kind.__name__} has {sorted(fields)}")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [field for field in required if field not in value]
    if missing:
        raise ValueError(f"{name} lacks the fields {missing} of {kind.__name__}")
    return kind(**{key: _build(fields[key].type, part, f"{name}.{key}") for key, part in value.items()})
