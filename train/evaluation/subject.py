"""What `python -m train evaluate` measures: a run's folder, one of its checkpoints, or a Hugging Face folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dsa_jax import Config
from dsa_jax.hf.convert import load_hf
from train.data import DataConfig
from train.phases import Params, split_groups
from train.saved.checkpoint import load_params
from train.saved.folder import checkpoint_steps, read_model_config, read_run
from train.settings import Stage, read_json
from train.state import abstract_params
from train.watching.watch import read_best

type ReadParams = Callable[[Mesh | None], Params]

HF_SEQ_LEN = 4096  # tokens of a sequence where no run says how many, if the model takes so many


@dataclasses.dataclass(frozen=True)
class Subject:
    """Holds a model to be measured, and how its run read text.

    Args:
      config: the model's.
      weights: reads the parameters of each of its checkpoints that is measured, by name; the last is the one whose
        selections are measured too.
      warmed: reads the parameters after WARMUP, whose indexer is compared; None where there are none.
      tokenizer: the run's, or the one in the folder; None for bytes.
      data: the run's text; None without a run.
      stage: the shape of the run's last batches; None without a run.
    """

    config: Config
    weights: dict[str, ReadParams]
    warmed: ReadParams | None = None
    tokenizer: Path | None = None
    data: Any = None
    stage: Stage | None = None

    @property
    def seq_len(self) -> int:
        """The tokens of a sequence, unless another number is asked for."""
        return min(HF_SEQ_LEN, self.config.max_position_embeddings) if self.stage is None else self.stage.seq_len

    @property
    def batch_size(self) -> int:
        """The sequences of a batch, unless another number is asked for."""
        return 1 if self.stage is None else self.stage.batch_size // self.stage.micro_batches

    def data_config(self) -> DataConfig:
        """Reads what text the run was trained on.

        Raises:
          ValueError: if there is no run, or it had data of its own.
        """
        if self.data is None:
            raise ValueError("text must be given by --data: a Hugging Face folder does not say what was held out")
        try:
            return read_json(DataConfig, self.data, "run.data")
        except ValueError as error:
            raise ValueError(f"text must be given by --data: the run had data of its own: {error}") from error


def find_subject(path: Path) -> Subject:
    """Finds what there is to measure in a folder.

    Raises:
      ValueError: if it is none of those that can be measured.
    """
    if (path / "run.json").is_file():
        return _of_run(path, None)
    if path.name.isdigit() and path.parent.name == "checkpoints" and (path.parents[1] / "run.json").is_file():
        return _of_run(path.parents[1], int(path.name))
    if (path / "config.json").is_file():
        return _of_hugging_face(path)
    raise ValueError(
        "evaluate needs a run's folder (with a run.json), one of its checkpoints (RUN/checkpoints/STEP) or a Hugging "
        f"Face folder (with a config.json), got {path}"
    )


def _of_hugging_face(path: Path) -> Subject:
    config = dataclasses.replace(Config.from_hf(path), dtype="bfloat16", param_dtype="bfloat16")
    tokenizer = path / "tokenizer.json"
    weights: dict[str, ReadParams] = {path.name: lambda mesh: split_groups(load_hf(path, mesh=mesh))[1]}
    return Subject(config, weights, tokenizer=tokenizer if tokenizer.is_file() else None)


def _of_run(folder: Path, step: int | None) -> Subject:
    """Takes the checkpoint of a step, or all that end a phase, the best and the newest."""
    found, run, config = checkpoint_steps(folder), read_run(folder)["run"], read_model_config(folder)
    if not found or (step is not None and step not in found):
        what = "a checkpoint" if step is None else f"the checkpoint {step}"
        raise ValueError(f"{folder} must have {what} that is whole, got {found or 'none'}")
    ends, stage = _phase_ends(run)
    names = {end: f"after {name}" for name, end in ends.items()}
    if step is None and (best := read_best(folder)) is not None:
        names.setdefault(best["step"], f"best of {best['phase']}, step {best['step']}")
    last = found[-1] if step is None else step
    names.setdefault(last, f"step {last}")
    measured = [each for each in found if each in names and (step is None or each == step)]

    def reader(step: int) -> ReadParams:
        return lambda mesh: load_params(folder, abstract_params(config, mesh)[1], step=step)

    warmed, data = ends.get("WARMUP"), run.get("data")
    tokenizer = data.get("tokenizer") if isinstance(data, dict) else None
    return Subject(
        config,
        {names[each]: reader(each) for each in measured},
        warmed=reader(warmed) if warmed is not None and warmed in found and warmed < last else None,
        tokenizer=Path(tokenizer) if isinstance(tokenizer, str) else None,
        data=data,
        stage=stage,
    )


def _phase_ends(run: dict[str, Any]) -> tuple[dict[str, int], Stage]:
    """Reads at which step each phase ends, and the last stage; phases of one's own are known by name alone."""
    ends, step, stage = {}, 0, None
    try:
        for phase in run["phases"]:
            for values in phase["stages"]:
                stage = read_json(Stage, values, "run.phases.stages")
                step += stage.steps
            ends[str(phase["name"])] = step
    except (KeyError, TypeError) as error:
        raise ValueError(f"run.json must list the run's phases and their stages, got {str(error)[:80]}") from error
    if stage is None:
        raise ValueError("run.json must list the run's phases and their stages, got none")
    return ends, stage
