"""Converts Hugging Face safetensors to parameters and back, by the table of `dsa_jax.hf.table`.

The files are read one tensor at a time into stacked parameters that are updated in place, on one device or on a mesh,
and written one file at a time into a new folder that gets its name when it is complete.

`load_hf` and `save_hf` are the two ways, `convert_hf` goes from folder to folder without a model, `to_hf` names the
tensors of any part of a state, and `Checkpoint` is a folder whose files are checked.
"""

import dataclasses
import functools
import logging
import math
import operator
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsa_jax.config import Config
from dsa_jax.config_hf import read_json
from dsa_jax.hf.files import BFLOAT16, DTYPES, FLOAT32, FP8, new_folder, read_headers, write_json, write_shards
from dsa_jax.hf.stacked import Part, Piece, Stack, is_sharded, tensor_at
from dsa_jax.hf.table import ALWAYS_FLOAT32, FLOAT32_IF_STORED, ROWS, Entry, Leaf, leaves
from dsa_jax.indexer import LightningIndexer
from dsa_jax.model import Transformer
from dsa_jax.parallel.sharding import check_model, parameter_shardings, path_names
from dsa_jax.quantization import dequantize_blocks

MAX_SHARD_BYTES = 5_000_000_000  # of one file, as transformers writes them
FP8_BLOCK_SIZE = 128  # rows and columns of a block of e4m3 weights that has one scale

# Files that travel with the weights when a checkpoint is converted.
COMPANION_FILES = (
    "tokenizer*",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)

logger = logging.getLogger(__name__)


def to_hf(state: Any, *, config: Config | None = None) -> Iterator[tuple[str, Any]]:
    """Yields the Hugging Face name and array of each tensor of a state, layer by layer.

    A tensor of a state that is sharded over a mesh is put together on the host when its turn comes.

    Args:
      state: any subset of a model's state: a module, an `nnx.State` or a nested dict, of parameters, gradients or
        moments.
      config: the model's; needed to number the layers of a state that holds MoE layers but no dense ones, unless
        it holds the embedding too and hence everything.

    Raises:
      ValueError: if something is no parameter of a Transformer, or has shards in other processes.

    Examples:
      >>> [(name, x.shape) for name, x in to_hf({"norm": {"weight": jnp.ones(128)}})]
      [('model.norm.weight', (128,))]
    """
    if isinstance(state, nnx.Module):
        config = config or getattr(state, "config", None)
        state = nnx.state(state)
    arrays = {path_names(path): x for path, x in jax.tree_util.tree_flatten_with_path(state)[0]}
    unknown = [".".join(path) for path in arrays if path not in ROWS]
    if unknown:
        raise ValueError(f"not parameters of a Transformer: {', '.join(sorted(unknown))}")
    num_dense_layers = _count_dense_layers(arrays, config)
    tensors = []
    for path, x in arrays.items():
        entry, stacked = ROWS[path], path[0].endswith("_layers")
        if is_sharded(x) and not x.is_fully_addressable:
            raise ValueError(
                f"to_hf and save_hf must have every shard in their own process, and {'.'.join(path)} has shards in "
                "others: save a checkpoint of the run and export that from a single process"
            )
        axes = stacked + entry.experts
        if x.ndim != axes + len(entry.dims.replace("->", "").split()):
            raise ValueError(f"{'.'.join(path)} must have dimensions {entry.dims!r}, stacked, got shape {x.shape}")
        sizes = [*x.shape[:axes], None, None]
        first = num_dense_layers if path[0] == "moe_layers" else 0
        leaf = Leaf(entry, path, first, sizes[0] if stacked else None, sizes[1] if entry.experts else None)
        tensors += [(name, entry, x, index) for index, name in leaf.tensors()]
    for name, entry, x, index in sorted(tensors, key=lambda tensor: _layer_of(tensor[0])):
        yield name, entry.to_file(tensor_at(x, index))


def _count_dense_layers(arrays: dict[tuple[str, ...], Any], config: Config | None) -> int:
    """Counts the dense layers of the model to which a part of its state belongs."""
    if config is not None:
        return config.num_dense_layers
    counts = {x.shape[0] for path, x in arrays.items() if path[0] == "dense_layers"}
    if counts:
        return counts.pop()
    if ("embed_tokens",) in arrays or not any(path[0] == "moe_layers" for path in arrays):
        return 0
    raise ValueError("this state holds MoE layers alone: pass config=, which says how many dense layers precede them")


def _layer_of(name: str) -> float:
    """Reads a tensor's layer number off its name; the embedding comes before all layers, norm and head after them."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1 if name.startswith("model.embed") else math.inf


class Checkpoint:
    """A checkpoint's folder, its files checked against its configuration; tensors are read one at a time.

    Making one reads the configuration and every file's header, but no tensor. Two things are no errors but are logged
    as warnings: layers past the last, which prediction layers are, and a `deepseek_v3` checkpoint without any indexer.

    Attributes:
      directory: the folder.
      config_json: the contents of its `config.json`.
      config: the same as a `Config`.
      stored: the tensors that the files hold, by name.
      expected: the table's rows of the tensors that the model needs, by name.
      has_indexer: whether the files hold one.

    Raises:
      ValueError: one that names everything missing, unexpected, mis-shaped, of another dtype, or truncated.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.config_json = read_json(self.directory)
        self.config = Config.from_hf(self.config_json)
        self.stored, unread, problems = read_headers(self.directory)
        self.expected: dict[str, Entry] = {}
        for leaf in leaves(self.config):
            self.expected |= {name: leaf.entry for _, name in leaf.tensors()}
        indexer = {name for name, entry in self.expected.items() if entry.indexer}
        present = indexer & (self.stored.keys() | unread)
        self.has_indexer = self.config_json["model_type"] != "deepseek_v3" or bool(present)
        if not self.has_indexer:
            self.expected = {name: entry for name, entry in self.expected.items() if not entry.indexer}
        for name, entry in self.expected.items():
            if name in self.stored:
                problems += self._check(name, entry.file_shape(self.config))
            elif name not in unread:
                problems.append(f"{name} is missing")
        problems += self._unexpected()
        if problems:
            raise ValueError(f"{self.directory} does not hold the model of its config.json: " + "; ".join(problems))
        if not self.has_indexer:
            logger.warning(
                "a dense checkpoint, deepseek_v3 without an indexer: load_hf draws the indexer anew, from its seed"
            )

    def dtype(self, name: str) -> np.dtype:
        """Gives the dtype in which `read` returns a tensor: its own, bfloat16 for FP8."""
        dtype = DTYPES[self.stored[name].dtype]
        return BFLOAT16 if dtype == FP8 else dtype

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor as the file has it; FP8 comes out as bfloat16."""
        stored = self.stored[name]
        if DTYPES[stored.dtype] != FP8:
            return stored.read()
        scale = self.stored[name + "_scale_inv"].read().astype(np.float32)
        return np.asarray(_dequantize(stored.read(), scale))

    def read_part(self, name: str, part: Part) -> Piece:
        """Reads a part of a tensor, given by slices of the parameter's dimensions; FP8 stays FP8, beside its scales."""
        entry, stored = self.expected[name], self.stored[name]
        sizes, part = entry.in_file(entry.shape(self.config)), entry.in_file(part)
        values = stored.read(sizes, part)
        if values.dtype != FP8:
            return Piece(values)
        rows = len(sizes) - (entry.inputs or 1)
        scale = self.stored[name + "_scale_inv"].read().astype(np.float32)
        return Piece(values, scale, _blocks(sizes[:rows], part[:rows]), _blocks(sizes[rows:], part[rows:]))

    def _check(self, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        """Names what is wrong with a stored tensor that should have this shape in the file."""
        stored = self.stored[name]
        if stored.shape != shape:
            yield f"{name} must have shape {list(shape)}, got {list(stored.shape)}"
            return
        if stored.dtype != "F8_E4M3" or len(shape) != 2:
            if stored.dtype not in ("F32", "BF16"):
                yield f"{name} must be F32, BF16 or block-scaled F8_E4M3, got {stored.dtype}"
            return
        scale, expected = self.stored.get(name + "_scale_inv"), [-(-size // FP8_BLOCK_SIZE) for size in shape]
        if scale is None:
            yield f"{name}_scale_inv is missing, the scales of an F8_E4M3 weight"
        elif list(scale.shape) != expected or scale.dtype not in ("F32", "BF16", "F8_E8M0"):
            yield f"{name}_scale_inv must be F32 {expected}, got {scale.dtype} {list(scale.shape)}"

    def _unexpected(self) -> Iterator[str]:
        """Names what the model has no place for, and logs what is left out on purpose."""
        past = []
        for name in self.stored:
            weight = name.removesuffix("_scale_inv")
            if name in self.expected or (weight in self.expected and self.stored[weight].dtype == "F8_E4M3"):
                continue
            layer = _layer_of(name)
            if math.isfinite(layer) and layer >= self.config.num_hidden_layers:
                past.append(int(layer))
            else:
                yield f"{name} is unexpected"
        if past:
            where = f"layer {past[0]}" if len(set(past)) == 1 else f"layers {min(past)} to {max(past)}"
            last = self.config.num_hidden_layers
            logger.warning("skipped %d tensors of %s, past num_hidden_layers = %d", len(past), where, last)


def _blocks(sizes: tuple[int, ...], part: Part) -> np.ndarray:
    """Finds the FP8 block of each row, or column, of a part; `sizes` are the dimensions that make up the rows."""
    return np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes)[part].reshape(-1) // FP8_BLOCK_SIZE


@jax.jit
def _dequantize(weight, scale):
    return dequantize_blocks(weight, scale).astype(jnp.bfloat16)


def load_hf(
    directory: str | Path,
    *,
    dtype: Any = "bfloat16",
    param_dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    seed: int = 0,
) -> Transformer:
    """Loads a Hugging Face checkpoint, `deepseek_v32` or `glm_moe_dsa`, single-file or sharded, FP8 or not.

    A dense `deepseek_v3` checkpoint gets a new indexer, ready for the warm-up, and a logged warning says so. Beside the
    parameters at most one of the file's tensors is in memory, and its copy on one device. On a mesh these are the parts
    that a shard holds, and each of several processes reads what its own devices hold.

    Args:
      directory: the folder with `config.json` and the safetensors.
      dtype: of the computation, "bfloat16" or "float32".
      param_dtype: of the parameters, `dtype` if None. The router's selection bias is float32 always; the index weights
        and the index key's norm are float32 if the file has them so.
      mesh: the devices over which the parameters are sharded, by the table of `parallel.sharding`; the default device
        if None.
      seed: of a dense checkpoint's new indexer.

    Raises:
      ValueError: one that names everything wrong with the files, or a mesh over which the model cannot be sharded,
        before any tensor is read.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_hf(Transformer(Config.tiny(), rngs=nnx.Rngs(0)), folder)
      ...     model = load_hf(folder, dtype="float32")
      >>> model.config == Config.tiny()
      True
    """
    dtypes = dict(dtype=_dtype_name(dtype), param_dtype=_dtype_name(param_dtype or dtype))
    checkpoint = Checkpoint(directory)
    config = dataclasses.replace(checkpoint.config, **dtypes)
    if mesh is not None:
        check_model(mesh, config)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    with_paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    paths = [path_names(path) for path, _ in with_paths]
    by_path = {leaf.path: leaf for leaf in leaves(config)}
    shapes = {path: x.shape for path, (_, x) in zip(paths, with_paths, strict=True)}
    if shapes != {path: leaf.shape(config) for path, leaf in by_path.items()}:
        raise ValueError("the table of dsa_jax.hf.table does not match the parameters of dsa_jax.Transformer")
    shardings: list[Any] = [None] * len(paths)
    if mesh is not None:
        shardings = jax.tree.leaves(parameter_shardings(abstract, mesh))
    sharding_of = dict(zip(paths, shardings, strict=True))
    drawn = {} if checkpoint.has_indexer else _draw_indexers(config, seed, sharding_of)
    parameters = [
        drawn[path] if path in drawn else _fill(by_path[path], checkpoint, config, sharding)
        for path, sharding in sharding_of.items()
    ]
    return nnx.merge(graph, jax.tree_util.tree_unflatten(structure, parameters))


def _draw_indexers(
    config: Config, seed: int, shardings: dict[tuple[str, ...], Any]
) -> dict[tuple[str, ...], jax.Array]:
    """Draws the parameters of new indexers, by path, a layer's as `LightningIndexer` initialises them."""
    rngs, drawn = nnx.Rngs(seed), {}
    for name, count in (("dense_layers", config.num_dense_layers), ("moe_layers", config.num_moe_layers)):
        if count == 0:
            continue
        with nnx.split_rngs(rngs, splits=count):
            graph, keys = nnx.split(rngs)
            rngs_of_layers = [nnx.merge(graph, jax.tree.map(operator.itemgetter(i), keys)) for i in range(count)]
        for layer, layer_rngs in enumerate(rngs_of_layers):
            indexer = nnx.state(LightningIndexer(config, rngs=layer_rngs))
            for names, x in jax.tree_util.tree_flatten_with_path(indexer)[0]:
                path = (name, "self_attn", "indexer", *path_names(names))
                if layer == 0:
                    drawn[path] = Stack((count, *x.shape), x.dtype, shardings[path])
                drawn[path].place((layer,), functools.partial(_piece, np.asarray(x)))
    return {path: stack.array() for path, stack in drawn.items()}


def _piece(x: np.ndarray, part: Part) -> Piece:
    """Takes a part of a tensor that is in memory."""
    return Piece(x[part])


def _dtype_name(dtype: Any) -> str:
    """Names a dtype; what is none keeps its text, for the message of the error."""
    try:
        return np.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _fill(leaf: Leaf, checkpoint: Checkpoint, config: Config, sharding: Any) -> jax.Array:
    """Reads the tensors of one parameter into place."""
    dtype = np.dtype(config.param_dtype)
    if leaf.entry.always_float32:
        dtype = FLOAT32
    elif leaf.entry.keeps_float32:
        dtype = np.result_type(dtype, *(checkpoint.dtype(name) for _, name in leaf.tensors()))
    stack = Stack(leaf.shape(config), dtype, sharding)
    for index, name in leaf.tensors():
        stack.place(index, functools.partial(checkpoint.read_part, name), inputs=leaf.entry.inputs or 0)
    return stack.array()


def save_hf(
    model: Transformer,
    directory: str | Path,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint that transformers and `load_hf` read: safetensors, their index if several, `config.json`.

    The folder appears under its name when everything is on the disk; after a failure nothing is left of it.

    Args:
      model: the model.
      directory: a folder that does not exist, or is empty.
      dtype: of the written tensors, that of each parameter if None. The router's selection bias is never rounded, nor
        are the index weights and the index key's norm.
      max_shard_bytes: the most bytes that one file holds, unless a single tensor is larger.

    Raises:
      ValueError: if there is something at `directory`.
      OSError: if the disk is full or may not be written.
    """
    config = dataclasses.replace(model.config, param_dtype=_dtype_name(dtype or model.config.param_dtype))
    tensors = ((name, np.asarray(x)) for name, x in to_hf(model))
    tensors = ((name, _cast(x, dtype and config.param_dtype, name)) for name, x in tensors)
    with new_folder(Path(directory)) as folder:
        write_json(folder / "config.json", config.to_hf())
        write_shards(folder, tensors, max_shard_bytes)


def convert_hf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> None:
    """Writes a Hugging Face checkpoint anew: sharded, FP8 as bfloat16, cast to `dtype` if given.

    One file is in memory at a time. The tokenizer's files are copied, and `config.json` keeps every key that still
    holds; a dense `deepseek_v3` checkpoint stays one.

    Args:
      source: the folder to read.
      target: the folder to write, which does not exist or is empty.
      dtype: of the written tensors, as for `save_hf`; their own if None, bfloat16 for FP8.
      max_shard_bytes: the most bytes that one file holds, unless a single tensor is larger.
      track: wraps the list of names, to show progress.

    Raises:
      ValueError: as `load_hf` and `save_hf` do.
      OSError: as `save_hf` does.
    """
    name_of_dtype = dtype and Config(dtype=_dtype_name(dtype)).dtype
    checkpoint = Checkpoint(source)
    data = {key: value for key, value in checkpoint.config_json.items() if key != "quantization_config"}
    stored = {str(checkpoint.dtype(name)) for name, entry in checkpoint.expected.items() if not entry.always_float32}
    data["dtype" if "dtype" in data else "torch_dtype"] = name_of_dtype or min(stored)
    if "num_nextn_predict_layers" in data:
        data["num_nextn_predict_layers"] = 0
    names = sorted(checkpoint.expected, key=_layer_of)
    with new_folder(Path(target)) as folder:
        write_json(folder / "config.json", data)
        tensors = ((name, _cast(checkpoint.read(name), name_of_dtype, name)) for name in track(names))
        write_shards(folder, tensors, max_shard_bytes)
        for pattern in COMPANION_FILES:
            for file in checkpoint.directory.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)


def _cast(x: np.ndarray, dtype: str | None, name: str) -> np.ndarray:
    """Casts a tensor to the dtype in which it is written, but for those that are never rounded."""
    if dtype is None:
        return x
    keep = dtype == "bfloat16" and any(part in name for part in (*FLOAT32_IF_STORED, ALWAYS_FLOAT32))
    return x if keep else x.astype(np.dtype(dtype))
