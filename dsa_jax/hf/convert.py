"""Converts Hugging Face safetensors to parameters and back, by the table of `dsa_jax.hf.table`.

The files are read one tensor at a time into stacked parameters that are updated in place, on one device or on a mesh,
and written one file at a time into a new folder that gets its name when it is complete.

`load_hf` and `save_hf` are the two ways, `convert_hf` goes from folder to folder without a model, and `to_hf` names the
tensors of any part of a state.
"""

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from dsa_jax.config import Config
from dsa_jax.config_hf import fp8_experts
from dsa_jax.hf.checkpoint import Checkpoint, layer_of
from dsa_jax.hf.files import BFLOAT16, FLOAT32, FP8, copy_companions, new_folder, write_json, write_shards
from dsa_jax.hf.stacked import Part, Piece, Stack, is_sharded, tensor_at
from dsa_jax.hf.table import ALWAYS_FLOAT32, EXPERTS, FLOAT32_IF_STORED, SCALE_SUFFIX, Leaf, layers_of, leaves, row_of
from dsa_jax.indexer import LightningIndexer
from dsa_jax.model import Transformer
from dsa_jax.parallel.sharding import check_model, parameter_shardings, path_names
from dsa_jax.quantization import quantize_blocks
from dsa_jax.stacks import all_stacks, is_stack
from dsa_jax.strict_json import shown_path

MAX_SHARD_BYTES = 5_000_000_000  # of one file, as transformers writes them

logger = logging.getLogger(__name__)


def to_hf(state: Any, *, config: Config | None = None) -> Iterator[tuple[str, Any]]:
    """Yields the Hugging Face name and array of each tensor of a state, layer by layer.

    A tensor of a state that is sharded over a mesh is put together on the host when its turn comes.

    Args:
      state: any subset of a model's state: a module, an `nnx.State` or a nested dict, of parameters, gradients or
        moments.
      config: the model's; needed to number the layers of a state that holds MoE layers but no dense ones, unless
        it holds the embedding too and hence everything, and of any state of a model whose layers share selections.

    Raises:
      ValueError: if something is no parameter of a Transformer, or has shards in other processes.

    Examples:
      >>> [(name, x.shape) for name, x in to_hf({"norm": {"weight": jnp.ones(128)}})]
      [('model.norm.weight', (128,))]
    """
    if isinstance(state, nnx.Module):
        config = config or getattr(state, "config", None)
    arrays = _arrays(state)
    unknown = [".".join(path) for path in arrays if row_of(path) is None]
    if unknown:
        raise ValueError(f"not parameters of a Transformer: {', '.join(sorted(unknown))}")
    numbers = _layer_numbers(arrays, config)
    tensors = []
    for path, x in arrays.items():
        entry, stacked = row_of(path), is_stack(path[0])
        assert entry is not None
        if is_sharded(x) and not x.is_fully_addressable:
            raise ValueError(
                f"to_hf and save_hf must have every shard in their own process, and {'.'.join(path)} has shards in "
                "others: save a checkpoint of the run and export that from a single process"
            )
        axes = stacked + entry.experts
        if x.ndim != axes + len(entry.dims.replace("->", "").split()):
            raise ValueError(f"{'.'.join(path)} must have dimensions {entry.dims!r}, stacked, got shape {x.shape}")
        layers = numbers(entry, path[0], x.shape[0]) if stacked else None
        leaf = Leaf(entry, path, layers, x.shape[1] if entry.experts else None)
        tensors += [(name, entry, x, index) for index, name in leaf.tensors()]
    for name, entry, x, index in sorted(tensors, key=lambda tensor: layer_of(tensor[0])):
        yield name, entry.to_file(tensor_at(x, index))


def _arrays(state: Any) -> dict[tuple[str, ...], Any]:
    """Lists the arrays of a state by the names on their paths."""
    state = nnx.state(state) if isinstance(state, nnx.Module) else state
    return {path_names(path): x for path, x in jax.tree_util.tree_flatten_with_path(state)[0]}


def _layer_numbers(arrays: dict[tuple[str, ...], Any], config: Config | None) -> Callable[..., tuple[int, ...]]:
    """Makes the function of a row, a stack's name and its number of layers that lists the layers' numbers.

    Raises:
      ValueError: if nothing says how many dense layers there are, or, when called, for another number of layers than
        the configuration gives the stack.
    """
    if config is None:
        first = {"dense_layers": 0, "moe_layers": _count_dense_layers(arrays)}

        def count_on(entry, name, count):
            if name not in first:
                raise ValueError(f"this state holds {name}, of layers that it does not number: pass config=")
            return tuple(range(first[name], first[name] + count))

        return count_on
    stacks = {stack.name: stack for stack in all_stacks(config)}

    def look_up(entry, name, count):
        layers = layers_of(entry, stacks[name]) if name in stacks else ()
        if len(layers) != count:
            raise ValueError(f"{name} must hold {len(layers)} of {entry.path}, by its configuration, got {count}")
        return layers

    return look_up


def _count_dense_layers(arrays: dict[tuple[str, ...], Any]) -> int:
    """Counts the dense layers of the model to which a part of its state belongs."""
    counts = {x.shape[0] for path, x in arrays.items() if path[0] == "dense_layers"}
    if len(counts) > 1:
        raise ValueError("this state is of a model whose layers share selections: pass config=")
    if counts:
        return counts.pop()
    if ("embed_tokens",) in arrays or not any(path[0] == "moe_layers" for path in arrays):
        return 0
    raise ValueError("this state holds MoE layers alone: pass config=, which says how many dense layers precede them")


def load_hf(
    directory: str | Path,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    expert_dtype: Literal["fp8"] | None = None,
    config: Config | None = None,
    mesh: jax.sharding.Mesh | None = None,
    copies: bool = False,
    seed: int = 0,
    prediction_layers: bool = True,
) -> Transformer:
    """Loads a Hugging Face checkpoint, `deepseek_v32` or `glm_moe_dsa`, single-file or sharded, FP8 or not.

    A dense `deepseek_v3` checkpoint gets a new indexer, ready for the warm-up, and a logged warning says so. Beside the
    parameters at most one of the file's tensors is in memory, and its copy on one device. On a mesh these are the parts
    that a shard holds, and each of several processes reads what its own devices hold.

    Args:
      directory: the folder with `config.json` and the safetensors.
      dtype: of the computation, "bfloat16" or "float32"; if None, the dtype in which most parameters are stored, FP8
        counted as bfloat16. A warning is logged if that rounds others.
      param_dtype: of the parameters, `dtype` if None. The router's selection bias is float32 always; the router, the
        index weights and the index key's norm are float32 if the file has them so.
      expert_dtype: of the routed experts' weights, for inference: "fp8" keeps them in memory as an FP8 checkpoint has
        them, with their scales, and results have the same bits. If None, `config` says, or it is `param_dtype`.
      config: what to use instead of the checkpoint's configuration, dtypes among it. All tensors that the files hold
        must have the same shapes in both; another K, another scaling of RoPE, or another size of the indexer that a
        dense checkpoint lacks may be chosen, or no prediction layers.
      mesh: the devices over which the parameters are sharded, by the table of `parallel.sharding`; the default device
        if None.
      copies: whether every shard of `data` gets the parameters whole, as generation has them, rather than in parts, as
        training does.
      seed: of a dense checkpoint's new indexer.
      prediction_layers: whether those that the checkpoint holds are loaded; else a logged warning counts what is left
        out. Their copies of embedding and head are compared with the model's own, and not kept.

    Raises:
      ValueError: one line that names everything wrong with the files, or a `config` or a mesh that does not fit them,
        before any tensor is loaded.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_hf(Transformer(Config.tiny(), rngs=nnx.Rngs(0)), folder)
      ...     model = load_hf(folder)
      >>> model.config == Config.tiny()
      True
    """
    taken = prediction_layers and (config is None or config.num_nextn_predict_layers > 0)
    checkpoint = Checkpoint(directory, prediction_layers=taken)
    if config is not None and not checkpoint.config.num_nextn_predict_layers:
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    if dtype is None and config is None:
        dtype = checkpoint.most_common_dtype
        if np.dtype(dtype if param_dtype is None else param_dtype) == BFLOAT16:
            _warn_of_rounding(checkpoint)
    config = _choose_config(checkpoint, config, dtype, param_dtype, expert_dtype)
    if config.expert_dtype == "fp8":
        checkpoint.check_experts_in_fp8()
    checkpoint.check_scales()
    checkpoint.check_copies()
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
        shardings = jax.tree.leaves(parameter_shardings(abstract, mesh, copies=copies))
    sharding_of = dict(zip(paths, shardings, strict=True))
    drawn = {} if checkpoint.has_indexer else _draw_indexers(config, seed, sharding_of)
    parameters = [
        drawn[path] if path in drawn else _fill(by_path[path], checkpoint, config, sharding)
        for path, sharding in sharding_of.items()
    ]
    return nnx.merge(graph, jax.tree_util.tree_unflatten(structure, parameters))


def _choose_config(
    checkpoint: Checkpoint, config: Config | None, dtype: Any, param_dtype: Any, expert_dtype: Any
) -> Config:
    """Takes a checkpoint's configuration, or the one given if the files' tensors have the same shapes in it.

    Raises:
      ValueError: naming a tensor that has another shape, or is in one of them alone.
    """
    if config is not None:
        ours, theirs = (_file_shapes(each, indexer=checkpoint.has_indexer) for each in (config, checkpoint.config))
        wrong = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if wrong:
            raise ValueError(
                f"config must give the tensors of {shown_path(checkpoint.directory)} their shapes, got {wrong[0]} of "
                f"shape {ours.get(wrong[0])} instead of {theirs.get(wrong[0])}, one of {len(wrong):,} tensors"
            )
    chosen = checkpoint.config if config is None else config
    compute = chosen.dtype if dtype is None else dtype
    if param_dtype is None:
        param_dtype = compute if config is None else config.param_dtype
    experts = chosen.expert_dtype if expert_dtype is None else expert_dtype
    return dataclasses.replace(chosen, dtype=compute, param_dtype=param_dtype, expert_dtype=experts)


def _file_shapes(config: Config, *, indexer: bool) -> dict[str, tuple[int, ...]]:
    """Lists the shapes of a model's weights by name, those of its indexer among them or not."""
    kept = [leaf for leaf in leaves(config) if not leaf.entry.scale and (indexer or not leaf.entry.indexer)]
    return {name: leaf.entry.file_shape(config) for leaf in kept for _, name in leaf.tensors()}


def _draw_indexers(
    config: Config, seed: int, shardings: dict[tuple[str, ...], Any]
) -> dict[tuple[str, ...], jax.Array]:
    """Draws the parameters of new indexers, by path, a layer's as `LightningIndexer` initialises them."""
    rngs, drawn = nnx.Rngs(seed), {}
    for stack in all_stacks(config):
        name, count = stack.name, len(stack.indexers)
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


def _warn_of_rounding(checkpoint: Checkpoint) -> None:
    """Logs how many tensors are rounded though nobody asked for a dtype."""
    kept = [name for name, entry in checkpoint.expected.items() if entry.always_float32 or entry.keeps_float32]
    rounded = [name for name in checkpoint.expected.keys() - kept if checkpoint.dtype(name) == FLOAT32]
    if rounded:
        logger.warning(
            "rounded %d float32 tensors, such as %s, to bfloat16, which most parameters have: choose with dtype=",
            len(rounded),
            min(rounded),
        )


def _fill(leaf: Leaf, checkpoint: Checkpoint, config: Config, sharding: Any) -> jax.Array:
    """Reads the tensors of one parameter into place."""
    dtype, read = np.dtype(config.param_dtype), checkpoint.read_part
    if leaf.entry.experts and config.expert_dtype == "fp8":
        dtype, read = FP8, functools.partial(checkpoint.read_as_stored, entry=leaf.entry)
    if leaf.entry.always_float32:
        dtype = FLOAT32
    elif leaf.entry.keeps_float32:
        dtype = np.result_type(dtype, *(checkpoint.dtype(name) for _, name in leaf.tensors()))
    stack = Stack(leaf.shape(config), dtype, sharding)
    for index, name in leaf.tensors():
        stack.place(index, functools.partial(read, name), inputs=leaf.entry.inputs or 0)
    return stack.array()


def save_hf(
    model: Transformer,
    directory: str | Path,
    *,
    dtype: Any = None,
    expert_dtype: Literal["fp8"] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    companions: str | Path | None = None,
) -> None:
    """Writes a checkpoint that transformers and `load_hf` read: safetensors, their index if several, `config.json`.

    The folder appears under its name when everything is on the disk; after a failure nothing is left of it. The token
    ids are in `config.json`; the tokenizer and the settings of generation are files of the checkpoint that the model
    was loaded from, its companions.

    Args:
      model: the model.
      directory: a folder that does not exist, or is empty.
      dtype: of the written tensors, that of each parameter if None. The router and its selection bias are never
        rounded, nor are the index weights and the index key's norm; experts that the model holds in FP8 stay in FP8.
      expert_dtype: "fp8" rounds the routed experts to FP8, scale = max |weight| / 448 of each block of 128 × 128; if
        None they are written as the model holds them.
      max_shard_bytes: the most bytes that one file holds, unless a single tensor is larger.
      companions: a checkpoint's folder, whose tokenizer and generation settings are copied.

    Raises:
      ValueError: if there is something at `directory`, `companions` is no folder, or an expert to be rounded to FP8
        holds NaN or an infinity.
      OSError: if the disk is full or may not be written.
    """
    if companions is not None and not Path(companions).is_dir():
        raise ValueError(f"companions must be a checkpoint's folder, got {companions}")
    with new_folder(Path(directory)) as folder:
        if companions is not None:
            copy_companions(Path(companions), folder)
        options: dict[str, Any] = dict(dtype=dtype, expert_dtype=expert_dtype, max_shard_bytes=max_shard_bytes)
        write_checkpoint(folder, model, model.config, **options)


def write_checkpoint(
    folder: Path,
    state: Any,
    config: Config,
    *,
    dtype: Any = None,
    expert_dtype: Literal["fp8"] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the configuration and the tensors of a model's whole state into a folder.

    Args:
      folder: where.
      state: a module, an `nnx.State` or a nested dict of parameters.
      config: the model's.
      dtype: of the written tensors, as for `save_hf`.
      expert_dtype: of the routed experts, as for `save_hf`.
      max_shard_bytes: the most bytes that one file holds, unless a single tensor is larger.

    Raises:
      ValueError: naming a tensor that the state lacks, or has too many, or in another shape, or as `save_hf` does.
      OSError: as `save_hf` does.
    """
    config = config if dtype is None else dataclasses.replace(config, param_dtype=dtype)
    written = config if expert_dtype is None else dataclasses.replace(config, expert_dtype=expert_dtype)
    values = written.to_hf()  # a model that has no place there is refused by its name, not by its tensors
    shapes = {names: x.shape for names, x in _arrays(state).items()}
    expected = {leaf.path: leaf.shape(config) for leaf in leaves(config)}
    wrong = [names for names in expected | shapes if expected.get(names) != shapes.get(names)]
    if wrong:
        raise ValueError(
            f"the state must be the whole of its configuration's model, got {'.'.join(wrong[0])} of shape "
            f"{shapes.get(wrong[0])} instead of {expected.get(wrong[0])}, one of {len(wrong)} parameters"
        )
    write_json(folder / "config.json", values)
    tensors = ((name, np.asarray(x)) for name, x in to_hf(state, config=config))
    tensors = tensors if expert_dtype is None else _round_experts(tensors)
    tensors = ((name, _cast(x, None if dtype is None else config.param_dtype, name)) for name, x in tensors)
    write_shards(folder, tensors, max_shard_bytes)


def convert_hf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: Any = None,
    expert_dtype: Literal["fp8"] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    prediction_layers: bool = True,
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> None:
    """Writes a Hugging Face checkpoint anew: sharded, FP8 as bfloat16 or the experts as FP8, cast to `dtype` if given.

    One file is in memory at a time. The files of the tokenizer and of generation are copied, and `config.json` keeps
    every key that still holds; code that a checkpoint names (`auto_map`) is never run nor carried along. A dense
    `deepseek_v3` checkpoint stays one.

    Args:
      source: the folder to read.
      target: the folder to write, which does not exist or is empty.
      dtype: of the written tensors, as for `save_hf`; their own if None, bfloat16 for FP8.
      expert_dtype: "fp8" writes the routed experts in FP8: as they are where they are stored so, else rounded as by
        `save_hf`.
      max_shard_bytes: the most bytes that one file holds, unless a single tensor is larger.
      prediction_layers: whether these are written too, as for `load_hf`; their copies of embedding and head are not.
      track: wraps the list of names, to show progress.

    Raises:
      ValueError: as `load_hf` and `save_hf` do.
      OSError: as `save_hf` does.
    """
    name_of_dtype = None if dtype is None else Config(dtype=dtype).dtype
    Config(expert_dtype=expert_dtype)
    checkpoint = Checkpoint(source, prediction_layers=prediction_layers)
    checkpoint.check_scales()
    checkpoint.check_copies()
    dropped = ("quantization_config", "auto_map")
    data = {key: value for key, value in checkpoint.config_json.items() if key not in dropped}
    data["dtype" if "dtype" in data else "torch_dtype"] = name_of_dtype or checkpoint.most_common_dtype
    if "num_nextn_predict_layers" in data:
        data["num_nextn_predict_layers"] = checkpoint.config.num_nextn_predict_layers
    if expert_dtype == "fp8":
        data["quantization_config"] = fp8_experts(checkpoint.config)
    names = sorted(checkpoint.expected, key=layer_of)
    with new_folder(Path(target)) as folder:
        write_json(folder / "config.json", data)
        tensors = _read_tensors(checkpoint, track(names), keep_experts=expert_dtype == "fp8")
        tensors = tensors if expert_dtype is None else _round_experts(tensors)
        tensors = ((name, _cast(x, name_of_dtype, name)) for name, x in tensors)
        write_shards(folder, tensors, max_shard_bytes)
        copy_companions(checkpoint.directory, folder)


def _read_tensors(
    checkpoint: Checkpoint, names: Iterable[str], *, keep_experts: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads tensors, FP8 as bfloat16; experts that are stored in FP8 may stay so, each with its scales behind it."""
    for name in names:
        if keep_experts and checkpoint.expected[name].experts and checkpoint.is_fp8(name):
            yield name, checkpoint.stored[name].read()
            yield name + SCALE_SUFFIX, checkpoint.read_scale(name)
        else:
            yield name, checkpoint.read(name)


def _round_experts(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Rounds the routed experts among tensors to FP8, each with its scales behind it; those in FP8 pass."""
    for name, x in tensors:
        if EXPERTS not in name or name.endswith(SCALE_SUFFIX) or x.dtype == FP8:
            yield name, x
            continue
        if not np.isfinite(x).all():
            raise ValueError(f"{name} must be finite to be written in FP8, got NaN or infinity")
        rounded = quantize_blocks(x)
        yield name, np.asarray(rounded.values)
        yield name + SCALE_SUFFIX, np.asarray(rounded.scale)


def _cast(x: np.ndarray, dtype: str | None, name: str) -> np.ndarray:
    """Casts a tensor to the dtype in which it is written, but for FP8, and for those that are never rounded."""
    if dtype is None or x.dtype == FP8 or name.endswith(SCALE_SUFFIX):
        return x
    keep = dtype == "bfloat16" and any(part in name for part in (*FLOAT32_IF_STORED, ALWAYS_FLOAT32))
    return x if keep else x.astype(np.dtype(dtype))
