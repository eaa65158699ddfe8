"""The recipes: a small model that trains in minutes on a CPU, and the published one; any other is a JSON file."""

import dataclasses
from pathlib import Path
from typing import Any

from dsa_jax import Config
from train.checks import shown
from train.files import read_json_file
from train.optimizer import OptimizerSettings
from train.phases import BASE, SPARSE, WARMUP
from train.settings import PhaseSettings, RunConfig, Stage


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


PRESETS = {"tiny": tiny, "deepseek_v32": deepseek_v32}


def load_preset(name: str) -> RunConfig:
    """Makes the preset of that name, or reads the run of a JSON file, such as the `run.json` of a run's folder.

    Raises:
      ValueError: if there is no such preset, or the file does not describe a run.
    """
    if name in PRESETS:
        return PRESETS[name]()
    if not name.endswith(".json"):
        raise ValueError(f"preset must be {' or '.join(PRESETS)} or a .json file, got {shown(name)}")
    return RunConfig.from_json(read_preset(Path(name)))


def read_preset(path: Path) -> Any:
    """Reads the JSON values of a run from a file; of a `run.json` those under "run".

    Raises:
      ValueError: if the file cannot be read as JSON.
    """
    values = read_json_file(path, "preset")
    return values.get("run", values) if isinstance(values, dict) else values
