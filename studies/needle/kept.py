"""Keeps a dense model in 8 bits, in files of a few megabytes, and makes of them a checkpoint to begin with again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from dsa_jax import Transformer, to_hf
from train.files import replace_text

FILE_BYTES = 15 * 2**20  # of one file at most, but for a tensor that is larger
SCALE = ".scale"  # behind the name of a tensor: what its rows are multiplied by
WEIGHTS, CONFIG = "kept-{}.safetensors", "config.json"


def keep(model: Transformer, folder: Path) -> None:
    """Writes a model's tensors without its indexers: matrices as int8 with a float32 scale a row, vectors in float32.

    Args:
      model: the model, dense.
      folder: a new folder.

    Raises:
      FileExistsError: if there is something.
    """
    folder.mkdir(parents=True)
    part: dict[str, np.ndarray] = {}
    number = 0
    for name, array in _quantized(model):
        if part and sum(each.nbytes for each in part.values()) + array.nbytes > FILE_BYTES:
            save_file(part, folder / WEIGHTS.format(number))
            part, number = {}, number + 1
        part[name] = array
    save_file(part, folder / WEIGHTS.format(number))
    # What has no indexer is a model of the kind before.
    replace_text(folder / CONFIG, json.dumps({**model.config.to_hf(), "model_type": "deepseek_v3"}, indent=1) + "\n")


def _quantized(model: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in to_hf(model):
        if ".indexer." in name:
            continue
        values = np.ascontiguousarray(array, np.float32)  # safetensors writes memory as it lies
        if values.ndim < 2:
            yield name, values
            continue
        scale = np.maximum(np.abs(values).max(-1, keepdims=True), 1e-30) / 127
        yield name, np.rint(values / scale).astype(np.int8)
        yield name + SCALE, scale.astype(np.float32)


def restore(kept: Path, folder: Path) -> Path:
    """Writes the checkpoint of a dense model that `keep` kept, in bfloat16; gives its folder.

    Args:
      kept: the folder of `keep`.
      folder: where the checkpoint goes; one that is there already stays.

    Raises:
      ValueError: if nothing is kept there, or a scale is missing.
    """
    if (folder / CONFIG).exists():
        return folder
    files = sorted(kept.glob(WEIGHTS.format("*")))
    if not files or not (kept / CONFIG).exists():
        raise ValueError(f"base must be a folder with {CONFIG} and {WEIGHTS.format(0)}, got {kept}")
    found: dict[str, Any] = {}
    for path in files:
        with safe_open(path, "np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    tensors = {}
    for name, array in found.items():
        if name.endswith(SCALE):
            continue
        if array.dtype == np.int8:
            if name + SCALE not in found:
                raise ValueError(f"{kept} must have the scale of every matrix, got none of {name}")
            array = array.astype(np.float32) * found[name + SCALE]
        tensors[name] = array.astype(ml_dtypes.bfloat16) if array.ndim > 1 else array
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    replace_text(folder / CONFIG, (kept / CONFIG).read_text())  # last: its being there says that all is
    return folder
