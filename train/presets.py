"""The recipes: a small model that trains in minutes on a CPU, and the published one; any other is a JSON file."""

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsa_jax import Config
from train.checks import shown
from train.commands.command import parse
from train.data import DataConfig
from train.files import read_json_file
from train.optimizer import OptimizerSettings
from train.phases import BASE, SFT, SPARSE, WARMUP
from train.settings import PhaseSettings, RunConfig, Stage, as_json, listed, read_json


def deepseek_v32() -> RunConfig:
    """Makes the published recipe of DeepSeek-V3.2-Exp, from its dense checkpoint.

    References:
      DeepSeek-V3.2-Exp's technical report for lengths and rates; DeepSeek-V3's for betas and decay.
    """
    rate = OptimizerSettings(learning_rate=7.3e-6)
    return RunConfig(
        model=Config.deepseek_v32(),
        phases=(
            PhaseSettings(WARMUP, (Stage(1000, 16, 131072, 16),), indexer=OptimizerSettings(learning_rate=1e-3)),
            PhaseSettings(SPARSE, (Stage(15000, 480, 131072, 480),), backbone=rate, indexer=rate, bias_rate=1e-3),
        ),
    )


def tiny() -> RunConfig:
    """Makes a run that ends in minutes on two CPU cores; its numbers were found by measuring (`studies/tiny`)."""
    matrices = OptimizerSettings(learning_rate=4e-3, muon_learning_rate=0.02, schedule="cosine", weight_decay=0.0)
    plain = OptimizerSettings(learning_rate=5e-4, weight_decay=0.0)
    return RunConfig(
        model=Config.tiny(),
        phases=(
            # A bias rate of 1e-3 left two experts with 90 % of the load after 60 steps; 2e-2 spread it within 40.
            PhaseSettings(BASE, (Stage(220, 16, 128), Stage(150, 4, 512)), backbone=matrices, bias_rate=1e-2),
            PhaseSettings(WARMUP, (Stage(60, 4, 512),), indexer=dataclasses.replace(plain, learning_rate=1e-2)),
            PhaseSettings(
                SPARSE,
                (Stage(50, 4, 512),),
                backbone=plain,
                indexer=dataclasses.replace(plain, learning_rate=2e-3),
                bias_rate=1e-2,
            ),
        ),
    )


def sft() -> RunConfig:
    """Makes supervised fine-tuning on conversations, from a checkpoint and through sparse attention.

    Its length and rates are a beginning for small checkpoints: `--set`, `--steps` and `--learning-rate` change them.
    """
    backbone = OptimizerSettings(learning_rate=1e-5, schedule="cosine", warmup_steps=10, weight_decay=0.0)
    indexer = OptimizerSettings(learning_rate=1e-4, weight_decay=0.0)
    return RunConfig(
        model=Config.tiny(),
        phases=(PhaseSettings(SFT, (Stage(200, 8, 1024),), backbone=backbone, indexer=indexer),),
        data=DataConfig(pack="best_fit"),
    )


PRESETS = {"tiny": tiny, "sft": sft, "deepseek_v32": deepseek_v32}


def load_preset(name: str, *, model: Config | None = None, free: Collection[str] = ()) -> RunConfig:
    """Makes the preset of that name, or reads the run of a JSON file, such as the `run.json` of a run's folder.

    Args:
      name: of a preset, or a path that ends in .json.
      model: the model of the weights that the run begins with, if there are any. It replaces that of a preset by name;
        a file may leave its model out, or name some fields of it.
      free: the fields in which a file's model may be another than that.

    Raises:
      ValueError: if there is no such preset, the file does not describe a run, or its model is not that of the weights.
    """
    if name in PRESETS:
        made = PRESETS[name]()
        return made if model is None else dataclasses.replace(made, model=model)
    if not name.endswith(".json"):
        raise ValueError(f"preset must be {' or '.join(PRESETS)} or a .json file, got {shown(name)}")
    values = read_preset(Path(name))
    if isinstance(values, dict) and model is not None:
        values = {**values, "model": merge_model(values.get("model", {}), model, free)}
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    if isinstance(values, dict) and values and values.keys() <= fields - {"model"}:
        raise ValueError(f"{name} has no model: describe it there, or give the weights to begin with by --init")
    return RunConfig.from_json(values)


def merge_model(given: Any, model: Config, free: Collection[str]) -> dict[str, Any]:
    """Completes the fields that a preset gives of its model from the weights' own.

    Raises:
      ValueError: naming every field that is given otherwise though the weights decide it.
    """
    whole = as_json(model)
    if not isinstance(given, dict):
        raise ValueError(f"run.model must be an object with fields of Config, got {shown(given)}")
    asked = as_json(read_json(Config, {**whole, **given}, "run.model"))
    names = [name for name in given if asked[name] != whole[name] and name not in free]
    wrong = [f"{name} {shown(whole[name])}, here {shown(asked[name])}" for name in names]
    if names:
        raise ValueError(
            f"the preset's model must be that of the weights it begins with: {listed(wrong)}; it may leave fields out, "
            f"and choose {', '.join(sorted(free))}"
        )
    return asked


def read_preset(path: Path) -> Any:
    """Reads the JSON values of a run from a file; of a `run.json` those under "run".

    Raises:
      ValueError: if the file cannot be read as JSON.
    """
    values = read_json_file(path, "preset")
    return values.get("run", values) if isinstance(values, dict) else values


def main(arguments: Sequence[str]) -> None:
    """Prints a preset as a file that `--preset` takes, with every field; see `PresetArguments`."""
    parsed = parse(PresetArguments, arguments, "python -m train preset")
    if parsed.post:
        from train.post import presets  # a room above this one

        made: Any = presets.load_preset(parsed.name)
    else:
        made = load_preset(parsed.name)
    print(json.dumps(made.to_json(), indent=2))


@dataclasses.dataclass(frozen=True)
class PresetArguments:
    """Prints a preset as JSON, to be changed and given as --preset."""

    name: tyro.conf.Positional[str]
    """tiny, sft, deepseek_v32, or a .json file, whose left-out fields are filled in."""
    post: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A preset of post-training: tiny, controls, post, grpo, or a .json file."""
