"""The stages of post-training as data: what each begins from, trains on and by which settings."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from dsa_jax import Config
from train.checks import check_integer, shown
from train.data import DataConfig
from train.phases import ON_POLICY, PHASES, POLICY_PHASES, Phase, policy_phase
from train.post.environment import Task
from train.post.policy import PolicySettings
from train.settings import PhaseSettings, RunConfig, as_json, read_json

KEPT_SAMPLES = ("all", "best")

# What ends the name of a stage that is the control of another: with dense attention, and without a length penalty. The
# task of the latter has the same name, for its rewards are others.
DENSE, FREE = "-dense", "-free"


@dataclasses.dataclass(frozen=True)
class PostStage:
    """Describes one stage: a run in a folder of its own, which begins with the weights of another's.

    Which source its batches have is told by what is given: `policy` says that the model samples episodes,
    `samples_of` that other stages' models do, once, before the stage begins; with neither its batches are
    demonstrations of the tasks.

    Args:
      name: of the stage and of its folder.
      phases: of its run, one alone where the model samples.
      begins: the name of the stage whose last weights it begins with; "": the weights that the whole begins with.
      tasks: names of the tasks, each once, or as often as it counts; none: all.
      policy: the settings of SPECIALIST, MIXED and ON_POLICY.
      samples_of: stages whose samples DISTILL learns from, each on its own tasks.
      samples: episodes of each of those tasks.
      keep_samples: "all", or "best": those whose reward is the greatest that was seen for their problem, if any differ,
        and at least half of the greatest of the task.
      teachers: stages that score the tokens of ON_POLICY, each on its own tasks.

    Raises:
      ValueError: naming settings that contradict each other.
    """

    name: str
    phases: tuple[PhaseSettings, ...]
    begins: str = ""
    tasks: tuple[str, ...] = ()
    policy: PolicySettings | None = None
    samples_of: tuple[str, ...] = ()
    samples: int = 0
    keep_samples: Literal["all", "best"] = "best"
    teachers: tuple[str, ...] = ()

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.name):
            raise ValueError(f"the name of a stage must be letters, digits, - and _ alone, got {shown(self.name)}")
        if not self.phases:
            raise ValueError(f"stage {self.name} must have a phase")
        check_integer(f"samples of stage {self.name}", self.samples, least=0)
        if self.keep_samples not in KEPT_SAMPLES:
            raise ValueError(f"keep_samples must be one of {', '.join(KEPT_SAMPLES)}, got {shown(self.keep_samples)}")
        samples = [phase.name for phase in self.phases if phase.name in _names(POLICY_PHASES)]
        if samples and (len(self.phases) > 1 or self.policy is None):
            raise ValueError(f"stage {self.name}: {samples[0]} must be its only phase and have policy settings")
        if self.policy is not None and not samples:
            raise ValueError(
                f"stage {self.name} has policy settings: its phase must be one of {', '.join(_names(POLICY_PHASES))}"
            )
        if self.policy is not None and self.samples_of:
            raise ValueError(f"stage {self.name} must have policy or samples_of, got both")
        if bool(self.samples_of) != bool(self.samples):
            raise ValueError(f"stage {self.name} must have samples and samples_of together, or neither")
        self._check_policy()

    def _check_policy(self) -> None:
        is_on_policy = self.phases[0].name == ON_POLICY.name
        if bool(self.teachers) != is_on_policy:
            raise ValueError(f"stage {self.name}: ON_POLICY needs teachers, and no other phase has them")
        if self.policy is None:
            return
        if is_on_policy and (self.policy.scale_rewards or self.policy.beta):
            raise ValueError(
                f"stage {self.name}: ON_POLICY has no rewards to scale, and its teachers for reference: "
                "set scale_rewards false and beta 0"
            )
        if not is_on_policy and self.policy.num_generations < 2:
            raise ValueError(f"stage {self.name}: num_generations must be at least 2, got 1: rewards are compared")
        for each in self.phases[0].stages:
            self.policy.check_shape(each.batch_size, each.seq_len)
        for group in self.run_phases()[0].phase.trains:
            if getattr(self.phases[0], group) is None:
                raise ValueError(f"stage {self.name} trains the {group}: give its optimizer settings")

    def run_phases(self) -> tuple[PhaseSettings, ...]:
        """Gives the phases of its run, with the settings of its policy."""
        if self.policy is None:
            return self.phases
        settings = self.phases[0]
        return (dataclasses.replace(settings, phase=policy_phase(settings.phase, self.policy)),)

    @property
    def seq_len(self) -> int:
        """The longest rows of the stage."""
        return max(stage.seq_len for phase in self.phases for stage in phase.stages)


@dataclasses.dataclass(frozen=True)
class StageData(DataConfig):
    """Is the data of a stage's run, by which its `run.json` tells all that decides its numbers."""

    stage: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class PostConfig:
    """Holds a whole post-training: a model and its stages in their order.

    Args:
      model: of the weights that the whole begins with.
      stages: in the order in which they are trained.
      seed: of everything that is drawn.
      tokenizer: a Hugging Face tokenizer.json; none: bytes are the tokens, or what stands beside the weights.
      end_of_turn: the text, one token of the tokenizer, by which the model ends its turn.
      evaluation_prompts: held-out problems of each task that a stage is measured on, once each; 0: none.
      checkpoint_every: steps between two checkpoints.
      keep_checkpoints: how many of the newest are kept.
    """

    model: Config
    stages: tuple[PostStage, ...]
    seed: int = 0
    tokenizer: Path | None = None
    end_of_turn: str = "\n"
    evaluation_prompts: int = 0
    checkpoint_every: int = 10
    keep_checkpoints: int = 2

    def __post_init__(self):
        check_integer("evaluation_prompts", self.evaluation_prompts, least=0)
        if not self.stages:
            raise ValueError("post-training must have at least one stage")
        if not isinstance(self.end_of_turn, str) or not self.end_of_turn:
            raise ValueError(f"end_of_turn must be a text, got {shown(self.end_of_turn)}")
        before: list[str] = []
        for stage in self.stages:
            if stage.name in before:
                raise ValueError(f"stages must have names of their own, got {stage.name} twice")
            for kind in ("samples_of", "teachers"):
                _check_earlier(stage, kind, getattr(stage, kind), before)
            _check_earlier(stage, "begins", (stage.begins,) if stage.begins else (), before)
            self.run_config(stage)  # which checks the rest
            before.append(stage.name)

    def stage(self, name: str) -> PostStage:
        """Finds a stage by its name."""
        return next(stage for stage in self.stages if stage.name == name)

    def sampling(self, stage: PostStage) -> PolicySettings:
        """Gives the settings by which a stage is measured: its own, those of the next that has some, or plain ones."""
        later = self.stages[self.stages.index(stage) :]
        found = [each.policy for each in (*later, *self.stages) if each.policy is not None]
        return found[0] if found else PolicySettings(2, max(1, stage.seq_len // 2), None)

    def run_config(self, stage: PostStage) -> RunConfig:
        """Makes the configuration of a stage's run."""
        return RunConfig(
            model=self.model,
            phases=stage.run_phases(),
            data=StageData(tokenizer=self.tokenizer, stage=as_json(stage)),
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )

    def to_json(self) -> dict[str, Any]:
        """Writes it as plain JSON values; a phase by its name."""
        return as_json(self)

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Reads what `to_json` wrote; what is left out takes its default.

        Raises:
          ValueError: naming what is unknown, missing or of another type.
        """
        return read_json(cls, values, "post", {Phase: _phase_named})


def _phase_named(name: Any, where: str) -> Phase:
    if not isinstance(name, str) or name not in PHASES:
        raise ValueError(f"{where} must be one of {', '.join(PHASES)}, got {shown(name)}")
    return PHASES[name]


def _names(phases: Sequence[Phase]) -> list[str]:
    return [phase.name for phase in phases]


def _check_earlier(stage: PostStage, kind: str, names: Sequence[str], before: Sequence[str]) -> None:
    """Checks that a stage builds on stages before it."""
    unknown = [name for name in names if name not in before]
    if unknown:
        raise ValueError(
            f"{kind} of stage {stage.name} must be stages before it, {', '.join(before) or 'none'}, got {unknown[0]}"
        )


def tasks_of(stage: PostStage, tasks: Mapping[str, Task]) -> list[Task]:
    """Finds the tasks of a stage, in its order.

    Raises:
      ValueError: if there is no such task, or none of a stage of demonstrations has any.
    """
    unknown = [name for name in stage.tasks if name not in tasks]
    if unknown:
        raise ValueError(f"stage {stage.name} names the task {unknown[0]!r}; there are {', '.join(tasks) or 'none'}")
    found = [tasks[name] for name in stage.tasks] or list(tasks.values())
    if stage.policy is None and not stage.samples_of:
        silent = [task.name for task in found if task.demonstrate is None]
        if silent:
            raise ValueError(f"stage {stage.name} learns from demonstrations, of which task {silent[0]} has none")
    return found
