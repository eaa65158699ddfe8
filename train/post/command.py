"""The command `python -m train post`: takes a model through the stages of post-training."""

import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import tyro
from rich.console import Console

from dsa_jax.parallel.sharding import make_mesh, parse_mesh
from train.checks import shown
from train.commands.command import parse
from train.compiling import keep_compiled
from train.files import read_json_file
from train.post.environment import Task
from train.post.pipeline import CONFIG_FILE, PostTraining
from train.post.presets import PRESETS, load_preset
from train.post.report import write_report
from train.post.stages import PostConfig
from train.post.tasks import load_tasks
from train.processes import ending
from train.processes.stopping import Stopping
from train.saved.initial import InitialParams


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Takes a model through supervised fine-tuning, specialists by reinforcement learning, distillation and a mix."""

    preset: str | None = None
    """tiny, controls, post, grpo, or a .json like the post.json of any folder; without it what --resume continues."""
    task: Path | None = None
    """A Python file that defines TASK or TASKS; without it the preset's own."""
    init: Path | None = None
    """Weights to begin with: a Hugging Face folder or a run's folder. They decide the model."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; without it that beside --init, or bytes."""
    out: Path | None = None
    """Folder of all stages; without it runs/post-PRESET."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue what the folder holds."""
    seed: int | None = None
    """Of everything that is drawn; without it as the preset says."""
    steps: tuple[str, ...] = ()
    """Steps of a stage, like mixed=40."""
    evaluation_prompts: int | None = None
    """Held-out problems of each task that a stage is measured on; 0: none."""
    mesh: str | None = None
    """Devices to train and to sample on, like data=2,context=4,expert=1,tensor=1; without it one device. The folder may
    be continued on another mesh."""
    stop_after: str | None = None
    """Save and stop after this time, like 9m, with exit status 75."""
    compile_cache: Path | None = None
    """Folder where compiled programs are kept; without it JAX_COMPILATION_CACHE_DIR says."""

    @property
    def folder(self) -> Path:
        """The folder of all stages."""
        return self.out or Path("runs") / f"post-{Path(self.preset or 'tiny').stem}"

    @property
    def recorded(self) -> dict[str, Any]:
        """Reads what `post.json` says, if the folder is to be continued and has one.

        Raises:
          ValueError: if it cannot be read.
        """
        path = self.folder / CONFIG_FILE
        values = read_json_file(path, CONFIG_FILE) if self.resume and path.exists() else {}
        if not isinstance(values, dict) or not isinstance(values.get("command", {}), dict):
            raise ValueError(f"{path} must hold a post-training, got {shown(values)}")
        return values

    def completed(self) -> Self:
        """Takes what is not given from the command that began the folder, if that is continued."""
        begun = {name: value for name, value in self.recorded.get("command", {}).items() if value is not None}
        paths = {name: Path(begun[name]) for name in ("task", "init", "tokenizer") if name in begun}
        missing = {name: value for name, value in paths.items() if getattr(self, name) is None}
        return dataclasses.replace(self, mesh=self.mesh or begun.get("mesh"), **missing)

    def command(self) -> dict[str, str | None]:
        """Gathers what a command that goes on needs to know of this one."""
        preset = self.preset if self.preset in PRESETS else self.recorded.get("command", {}).get("preset")
        paths = {name: getattr(self, name) for name in ("task", "init", "tokenizer")}
        return {"preset": preset, "mesh": self.mesh} | {
            name: None if x is None else str(x.absolute()) for name, x in paths.items()
        }

    def resume_command(self) -> str:
        """Writes the command that goes on."""
        command = ["python", "-m", "train", "post", "--resume", "--out", str(self.folder)]
        values = {"stop-after": self.stop_after, "compile-cache": self.compile_cache}
        command += [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
        return shlex.join(command)

    def config(self, init: InitialParams | None) -> PostConfig:
        """Makes the post-training that is meant.

        Raises:
          ValueError: if the arguments do not go together.
        """
        recorded = self.recorded
        if self.preset is None and "post" not in recorded:
            raise ValueError(f"give --preset, or --resume with a folder that holds {CONFIG_FILE}, got {self.folder}")
        if self.preset is None:
            config = PostConfig.from_json(recorded["post"])
        else:
            config = load_preset(self.preset, None if init is None else init.config("bfloat16"))
        changes = {
            "seed": self.seed,
            "evaluation_prompts": self.evaluation_prompts,
            "tokenizer": self._tokenizer(config),
        }
        config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
        return set_steps(config, self.steps)

    def _tokenizer(self, config: PostConfig) -> Path | None:
        beside = None if self.init is None else self.init / "tokenizer.json"
        return self.tokenizer or config.tokenizer or (beside if beside is not None and beside.is_file() else None)

    def tasks(self) -> Mapping[str, Task]:
        """Finds the tasks: the file's, or the preset's."""
        if self.task is not None:
            return load_tasks(self.task)
        name = self.command()["preset"]
        found = PRESETS[name].tasks() if name in PRESETS else {}
        if not found:
            raise ValueError(f"preset {name or self.preset} has no tasks of its own: give --task")
        return found


def set_steps(config: PostConfig, texts: Sequence[str]) -> PostConfig:
    """Sets the steps of stages, of their last phase.

    Raises:
      ValueError: if there is no such stage, or no such number.
    """
    for text in texts:
        name, _, number = text.partition("=")
        names = [stage.name for stage in config.stages]
        if name not in names or not number.isdigit():
            raise ValueError(f"steps must be like {names[-1]}=40, of a stage of {', '.join(names)}, got {text!r}")
        stage = config.stage(name)
        last = stage.phases[-1]
        last = dataclasses.replace(
            last, stages=(*last.stages[:-1], dataclasses.replace(last.stages[-1], steps=int(number)))
        )
        changed = dataclasses.replace(stage, phases=(*stage.phases[:-1], last))
        config = dataclasses.replace(
            config, stages=tuple(changed if each.name == name else each for each in config.stages)
        )
    return config


def main(arguments: Sequence[str]) -> None:
    """Trains by the arguments of a command line, and reports."""
    parsed = parse(Arguments, arguments, "python -m train post").completed()
    began, stops = time.monotonic(), Stopping.within(parsed.stop_after)
    ending.resume_with(parsed.resume_command())
    with stops as stopping:
        keep_compiled(parsed.compile_cache)
        console, init = Console(), None if parsed.init is None else InitialParams(parsed.init)
        mesh = None if parsed.mesh is None else make_mesh(parse_mesh(parsed.mesh))
        training = PostTraining(
            parsed.config(init), parsed.folder, parsed.tasks(), init, parsed.command(), stopping, console, mesh
        )
        training.run(resume=parsed.resume)
        path = write_report(training.config, parsed.folder, seconds=time.monotonic() - began)
        console.print(f"Report: {path}", markup=False, highlight=False, soft_wrap=True)
