"""Exports a run of `train` as a checkpoint in Hugging Face's layout: weights, tokenizer, and settings of generation.

Of the run's folder it reads what stands there for others: `run.json`, the parameters of a checkpoint, and `tokenizer/`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tokenizers import Tokenizer

from dsa_jax.chat.template import read_tokenizer_config, token_text
from dsa_jax.config import Config
from dsa_jax.hf.convert import MAX_SHARD_BYTES, write_checkpoint
from dsa_jax.hf.files import copy_companions, new_folder, write_json
from dsa_jax.inference.tokenizer import BYTES, byte_tokenizer, find_tokenizer
from dsa_jax.nsa_sizes import NSASizes
from dsa_jax.parallel.sharding import path_names
from dsa_jax.strict_json import read_object, shown, shown_path
from dsa_jax.yarn import YaRN

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_run(
    run: str | Path,
    target: str | Path,
    *,
    step: int | None = None,
    dtype: Literal["bfloat16", "float32"] | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes what a run has trained as a checkpoint that transformers, `load_hf` and `dsa-jax chat` read.

    The folder appears under its name when everything is on the disk; after a failure nothing is left of it. All
    parameters are in memory once. What a `config.json` has no key for, `index_fp8` and the dtype of the computation, is
    chosen where the checkpoint is loaded.

    Args:
      run: the run's folder.
      target: a folder that does not exist, or is empty.
      step: of the checkpoint; the newest if None.
      dtype: of the weights, float32 as they were trained if None; the router is never rounded.
      tokenizer: a folder with a tokenizer.json and what goes with it; that of the run if None.
      max_shard_bytes: the most bytes that one file holds, unless a single tensor is larger.

    Raises:
      ValueError: if the folder holds no run or no such checkpoint, there is something at `target`, or the tokenizer is
        not to be found or does not fit the model.
      OSError: if the disk is full or may not be written.
    """
    run = Path(run)
    config, data = read_run(run)
    folder = _tokenizer_folder(run, config, data, tokenizer)
    path = find_checkpoint(run, step)
    with new_folder(Path(target)) as whole:
        config = _write_tokenizer(folder, whole, config)
        write_checkpoint(whole, read_params(path), config, dtype=dtype, max_shard_bytes=max_shard_bytes)


def read_run(run: Path) -> tuple[Config, Mapping[str, Any]]:
    """Reads from a run's `run.json` the model's configuration, and what it says of the data.

    Raises:
      ValueError: if that is no run's folder.
    """
    path = run / "run.json"
    if not path.is_file():
        raise ValueError(f"expected a run's folder, with its run.json, got {shown_path(run)}")
    values = read_object(path).get("run")
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(model, dict):
        raise ValueError(f"{shown_path(path)} must say what the run's model is, got {shown(values)}")
    try:
        kinds = {"rope_scaling": YaRN, "nsa": NSASizes}
        nested = {name: kind(**model[name]) for name, kind in kinds.items() if isinstance(model.get(name), dict)}
        fields: dict[str, Any] = model | nested
        config = Config(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{shown_path(path)} must describe a model: {error}") from None
    data = values.get("data")
    return config, data if isinstance(data, dict) else {}


def find_checkpoint(run: Path, step: int | None) -> Path:
    """Finds the checkpoint of a step, or the newest.

    Raises:
      ValueError: if there is none.
    """
    folder = run / "checkpoints"
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
    if not steps or step not in (None, *steps):
        wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise ValueError(f"{shown_path(run)} must hold {wanted}, got {shown(steps) if steps else 'none'}")
    return folder.absolute() / str(steps[-1] if step is None else step)


def read_params(checkpoint: Path) -> dict[str, Any]:
    """Reads the parameters of a checkpoint into the host's memory, as one tree whatever groups they trained in.

    Raises:
      ValueError: if they cannot be read.
    """
    import orbax.checkpoint as ocp  # takes seconds, and the other commands have no need of it

    path: Any = checkpoint / "params"
    try:
        metadata = ocp.StandardCheckpointHandler().metadata(path)
        tree = getattr(metadata, "tree", metadata)
        like = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree)
        with ocp.StandardCheckpointer() as checkpointer:
            groups = checkpointer.restore(path, like)
    except Exception as error:  # of any type, by what is damaged
        raise ValueError(f"{shown_path(path)} must hold a run's parameters: {str(error)[:300]}") from error
    state: dict[str, Any] = {}
    for keys, x in jax.tree_util.tree_flatten_with_path(list(groups.values()))[0]:
        *parents, name = path_names(keys[1:])
        inside = state
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[name] = x
    return state


def _tokenizer_folder(run: Path, config: Config, data: Mapping[str, Any], given: str | Path | None) -> Path | None:
    """Finds the folder of the run's tokenizer: the one given, the run's own copy, or where it was; None for bytes.

    Raises:
      ValueError: if there is none.
    """
    named = data.get("tokenizer")
    if given is None and named is None and config.vocab_size == BYTES:
        return None
    places = [Path(given)] if given is not None else [run / "tokenizer"]
    if given is None and isinstance(named, str) and Path(named).name == "tokenizer.json":
        places.append(Path(named).parent)
    for folder in places:
        if (folder / "tokenizer.json").is_file():
            return folder
    raise ValueError(f"{shown_path(places[-1])} must hold the run's tokenizer.json, got none: give --tokenizer FOLDER")


def _write_tokenizer(source: Path | None, target: Path, config: Config) -> Config:
    """Writes the tokenizer, its settings and those of generation; gives the configuration its end tokens."""
    if source is None:
        tokenizer = byte_tokenizer()
        tokenizer.save(str(target / "tokenizer.json"))
    else:
        copy_companions(source, target)
        tokenizer = find_tokenizer(target, config.vocab_size)
        assert tokenizer is not None
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings}
    settings |= read_tokenizer_config(target)
    write_json(target / "tokenizer_config.json", settings)
    config = _with_token_ids(config, tokenizer, settings)
    if not (target / "generation_config.json").exists():
        ids = {name: getattr(config, name) for name in TOKEN_IDS}
        write_json(target / "generation_config.json", {name: x for name, x in ids.items() if x not in (None, ())})
    return config


def _with_token_ids(config: Config, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Config:
    """Takes the token ids that the configuration lacks from the tokenizer's settings."""
    found = {name: token_text(settings.get(name.removesuffix("_id"))) for name in TOKEN_IDS}
    ids = {name: tokenizer.token_to_id(token) for name, token in found.items() if token is not None}
    lacking = {name: x for name, x in ids.items() if x is not None and getattr(config, name) in (None, ())}
    return dataclasses.replace(config, **lacking)
