"""Hugging Face safetensors to parameters and back: one table, in which every name is matched exactly once.

The files are read one tensor at a time into stacked parameters that are updated in place, and written one shard at a
time into a new folder that gets its name when it is complete.
"""

import dataclasses
import functools
import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsa_jax.config import Config, read_json
from dsa_jax.hf_files import BFLOAT16, DTYPES, FLOAT32, FP8, new_folder, read_headers, write_json, write_shards
from dsa_jax.indexer import LightningIndexer
from dsa_jax.model import Transformer
from dsa_jax.quantization import dequantize_blocks

MAX_SHARD_BYTES = 5_000_000_000
FP8_BLOCK = 128
# Parts of paths and names alike. The first are float32 if the file has them so, the last always; none is ever rounded.
FLOAT32_IF_STORED = (".indexer.weights_proj", ".indexer.k_norm")
ALWAYS_FLOAT32 = ".e_score_correction_bias"
# Files that travel with the weights when a checkpoint is converted.
COMPANIONS = ("tokenizer*", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template*")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table: a parameter's path, its tensors' name, and its dimensions.

    A path that starts with "layers." stands for both stacks of layers. `dims` are ours: "Q -> N P+R" is a matrix of Q
    inputs, which the file holds transposed and flattened, [N · (P+R), Q]; without an arrow the file holds what we do.
    """

    path: str
    name: str
    dims: str

    @property
    def stacks(self) -> tuple[str, ...]:
        """The leading names of its paths: stacks of layers, or none."""
        stack = self.path.split(".")[0]
        if stack == "layers":
            return "dense_layers", "moe_layers"
        return (stack,) if stack.endswith("_layers") else ("",)

    @property
    def experts(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.name

    @property
    def inputs(self) -> int | None:
        """How many of our dimensions are inputs of a matrix, None if the file holds the parameter as it is."""
        return len(self.dims.split(" -> ")[0].split()) if "->" in self.dims else None

    @property
    def indexer(self) -> bool:
        """Whether it belongs to the indexer."""
        return ".indexer." in self.path

    @property
    def keeps_float32(self) -> bool:
        """Whether the parameter stays float32 if the file has it so: the index weights and the index key's norm."""
        return any(part in self.path for part in FLOAT32_IF_STORED)

    @property
    def always_float32(self) -> bool:
        """The router's selection bias is float32 whatever `param_dtype`."""
        return ALWAYS_FLOAT32 in self.path

    def shape(self, config: Config) -> tuple[int, ...]:
        """Our shape of one tensor."""
        return tuple(_size(dim, config) for dim in self.dims.replace("->", "").split())

    def file_shape(self, config: Config) -> tuple[int, ...]:
        """The shape that the file gives one tensor."""
        shape = self.shape(config)
        if self.inputs is None:
            return shape
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def to_file(self, x: Any) -> Any:
        """One tensor, from our layout to the file's."""
        return x if self.inputs is None else x.reshape(math.prod(x.shape[: self.inputs]), -1).T


TABLE = (
    Entry("embed_tokens", "model.embed_tokens.weight", "vocab D"),
    Entry("norm.weight", "model.norm.weight", "D"),
    Entry("lm_head", "lm_head.weight", "D -> vocab"),
    *(
        Entry("layers." + path, "model.layers.{layer}." + (name or path + ".weight"), dims)
        for path, name, dims in (
            ("input_layernorm.weight", "input_layernorm.weight", "D"),
            ("post_attention_layernorm.weight", "post_attention_layernorm.weight", "D"),
            ("self_attn.q_a_proj", "", "D -> Q"),
            ("self_attn.q_a_layernorm.weight", "self_attn.q_a_layernorm.weight", "Q"),
            ("self_attn.q_b_proj", "", "Q -> N P+R"),
            ("self_attn.kv_a_proj_with_mqa", "", "D -> C+R"),
            ("self_attn.kv_a_layernorm.weight", "self_attn.kv_a_layernorm.weight", "C"),
            ("self_attn.kv_b_proj", "", "C -> N P+V"),
            ("self_attn.o_proj", "", "N V -> D"),
            ("self_attn.indexer.wq_b", "", "Q -> J E"),
            ("self_attn.indexer.wk", "", "D -> E"),
            ("self_attn.indexer.k_norm.weight", "self_attn.indexer.k_norm.weight", "E"),
            ("self_attn.indexer.k_norm.bias", "self_attn.indexer.k_norm.bias", "E"),
            ("self_attn.indexer.weights_proj", "", "D -> J"),
        )
    ),
    Entry("dense_layers.mlp.gate_proj", "model.layers.{layer}.mlp.gate_proj.weight", "D -> F"),
    Entry("dense_layers.mlp.up_proj", "model.layers.{layer}.mlp.up_proj.weight", "D -> F"),
    Entry("dense_layers.mlp.down_proj", "model.layers.{layer}.mlp.down_proj.weight", "F -> D"),
    Entry("moe_layers.mlp.gate.weight", "model.layers.{layer}.mlp.gate.weight", "D -> X"),
    Entry("moe_layers.mlp.gate.e_score_correction_bias", "model.layers.{layer}.mlp.gate.e_score_correction_bias", "X"),
    *(
        Entry(f"moe_layers.mlp.{part}.{proj}", f"model.layers.{{layer}}.mlp.{part}{expert}.{proj}.weight", dims)
        for part, expert, width in (("experts", ".{expert}", "Fx"), ("shared_experts", "", "Fs"))
        for proj, dims in (
            ("gate_proj", f"D -> {width}"),
            ("up_proj", f"D -> {width}"),
            ("down_proj", f"{width} -> D"),
        )
    ),
)


def _size(dim: str, config: Config) -> int:
    """The size of a dimension in the letters of `config.py`; Fx and Fs are the widths of routed and shared experts."""
    sizes = {
        "vocab": config.vocab_size,
        "D": config.hidden_size,
        "Q": config.q_lora_rank,
        "C": config.kv_lora_rank,
        "N": config.num_attention_heads,
        "P": config.qk_nope_head_dim,
        "R": config.qk_rope_head_dim,
        "V": config.v_head_dim,
        "J": config.index_n_heads,
        "E": config.index_head_dim,
        "X": config.n_routed_experts,
        "F": config.intermediate_size,
        "Fx": config.moe_intermediate_size,
        "Fs": config.moe_intermediate_size * config.n_shared_experts,
    }
    return sum(sizes[letter] for letter in dim.split("+"))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A table's row in one stack of layers: the parameter at `path`, stacked over `layers` layers from `first` on."""

    entry: Entry
    path: tuple[str, ...]
    first: int
    layers: int | None
    experts: int | None

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Its tensors: where each stands in the parameter, and its name in the files."""
        axes = [range(size) for size in (self.layers, self.experts) if size is not None]
        for index in itertools.product(*axes):
            layer = self.first + index[0] if index else None
            yield index, self.entry.name.format(layer=layer, expert=index[-1] if index else None)

    def shape(self, config: Config) -> tuple[int, ...]:
        """The parameter's shape."""
        return *(size for size in (self.layers, self.experts) if size is not None), *self.entry.shape(config)


def leaves(config: Config) -> list[Leaf]:
    """Every parameter of a model of this configuration."""
    counts = {"": None, "dense_layers": config.num_dense_layers, "moe_layers": config.num_moe_layers}
    result = []
    for entry in TABLE:
        absent = entry.path == "lm_head" and config.tie_word_embeddings
        absent |= ".shared_experts." in entry.path and config.n_shared_experts == 0
        for stack in entry.stacks:
            if absent or counts[stack] == 0:
                continue
            first = config.num_dense_layers if stack == "moe_layers" else 0
            experts = config.n_routed_experts if entry.experts else None
            result.append(Leaf(entry, _path(entry, stack), first, counts[stack], experts))
    return result


def _path(entry: Entry, stack: str) -> tuple[str, ...]:
    names = entry.path.split(".")
    return (stack, *names[1:]) if stack else tuple(names)


ROWS = {_path(entry, stack): entry for entry in TABLE for stack in entry.stacks}


def to_hf(state: Any, *, config: Config | None = None) -> Iterator[tuple[str, Any]]:
    """Yields the Hugging Face name and array of each tensor of a state, layer by layer.

    Args:
      state: any subset of a model's state: a module, an `nnx.State` or a nested dict, of parameters, gradients or
        moments.
      config: the model's; needed to number the layers of a state that holds MoE layers but no dense ones, unless
        it holds the embedding too and hence everything.
    """
    if isinstance(state, nnx.Module):
        config = config or getattr(state, "config", None)
        state = nnx.state(state)
    arrays = {_names(path): x for path, x in jax.tree_util.tree_flatten_with_path(state)[0]}
    unknown = [".".join(path) for path in arrays if path not in ROWS]
    if unknown:
        raise ValueError(f"not parameters of a Transformer: {', '.join(sorted(unknown))}")
    dense = _count_dense_layers(arrays, config)
    found = []
    for path, x in arrays.items():
        entry, stacked = ROWS[path], path[0].endswith("_layers")
        axes = stacked + entry.experts
        if x.ndim != axes + len(entry.dims.replace("->", "").split()):
            raise ValueError(f"{'.'.join(path)} must have dimensions {entry.dims!r}, stacked, got shape {x.shape}")
        sizes = [*x.shape[:axes], None, None]
        first = dense if path[0] == "moe_layers" else 0
        leaf = Leaf(entry, path, first, sizes[0] if stacked else None, sizes[1] if entry.experts else None)
        found += [(name, entry, x, index) for index, name in leaf.tensors()]
    for name, entry, x, index in sorted(found, key=lambda each: _layer_of(each[0])):
        yield name, entry.to_file(x[index])


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A leaf's path as names, without the attribute by which a Variable holds its array."""
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def _count_dense_layers(arrays: dict[tuple[str, ...], Any], config: Config | None) -> int:
    if config is not None:
        return config.num_dense_layers
    counts = {x.shape[0] for path, x in arrays.items() if path[0] == "dense_layers"}
    if counts:
        return counts.pop()
    if ("embed_tokens",) in arrays or not any(path[0] == "moe_layers" for path in arrays):
        return 0
    raise ValueError("this state holds MoE layers alone: pass config=, which says how many dense layers precede them")


def _layer_of(name: str) -> float:
    """The number of a tensor's layer; the embedding precedes them all, the last norm and the head follow."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1 if name.startswith("model.embed") else math.inf


class Checkpoint:
    """A checkpoint's files, checked against its configuration; tensors are read one at a time.

    A `deepseek_v3` checkpoint may be without any indexer, which one printed line says. Raises one ValueError that names
    everything missing, unexpected, mis-shaped, of another dtype, or truncated.
    """

    def __init__(self, directory: str | Path):
        """Reads the configuration and every file's header, no tensor."""
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
            print("a dense checkpoint, deepseek_v3 without an indexer: load_hf draws the indexer anew, from its seed")

    def dtype(self, name: str) -> np.dtype:
        """The dtype in which a tensor is read: its own, bfloat16 for FP8."""
        dtype = DTYPES[self.stored[name].dtype]
        return BFLOAT16 if dtype == FP8 else dtype

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor; FP8 comes out as bfloat16."""
        stored = self.stored[name]
        if DTYPES[stored.dtype] != FP8:
            return stored.read()
        scale = self.stored[name + "_scale_inv"].read().astype(np.float32)
        return np.asarray(_dequantize(stored.read(), scale))

    def _check(self, name: str, shape: tuple[int, ...]) -> Iterator[str]:
        stored = self.stored[name]
        if stored.shape != shape:
            yield f"{name} must have shape {list(shape)}, got {list(stored.shape)}"
            return
        if stored.dtype != "F8_E4M3" or len(shape) != 2:
            if stored.dtype not in ("F32", "BF16"):
                yield f"{name} must be F32, BF16 or block-scaled F8_E4M3, got {stored.dtype}"
            return
        scale, expected = self.stored.get(name + "_scale_inv"), [-(-size // FP8_BLOCK) for size in shape]
        if scale is None:
            yield f"{name}_scale_inv is missing, the scales of an F8_E4M3 weight"
        elif list(scale.shape) != expected or scale.dtype not in ("F32", "BF16", "F8_E8M0"):
            yield f"{name}_scale_inv must be F32 {expected}, got {scale.dtype} {list(scale.shape)}"

    def _unexpected(self) -> Iterator[str]:
        """Names what the model has no place for, and prints what is left out on purpose."""
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
            print(f"skipped {len(past)} tensors of {where}, past num_hidden_layers = {self.config.num_hidden_layers}")


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

    A dense `deepseek_v3` checkpoint gets a new indexer, ready for the warm-up, and one printed line says so. Beside the
    parameters at most one of the file's tensors is in memory, and its copy on the device.

    Args:
      directory: the folder with `config.json` and the safetensors.
      dtype: of the computation, "bfloat16" or "float32".
      param_dtype: of the parameters, `dtype` if None. The router's selection bias is float32 always; the index weights
        and the index key's norm are float32 if the file has them so.
      mesh: not supported yet; parameters go to the default device.
      seed: of a dense checkpoint's new indexer.

    Raises:
      ValueError: one that names everything wrong with the files, before anything is built.
    """
    if mesh is not None:
        raise ValueError("load_hf loads to the default device and must get mesh=None")
    dtypes = dict(dtype=_dtype_name(dtype), param_dtype=_dtype_name(param_dtype or dtype))
    checkpoint = Checkpoint(directory)
    config = dataclasses.replace(checkpoint.config, **dtypes)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    wanted, structure = jax.tree_util.tree_flatten_with_path(abstract)
    by_path = {leaf.path: leaf for leaf in leaves(config)}
    if {_names(path): x.shape for path, x in wanted} != {path: leaf.shape(config) for path, leaf in by_path.items()}:
        raise ValueError("the table of dsa_jax.convert does not match the parameters of dsa_jax.Transformer")
    drawn = {} if checkpoint.has_indexer else _draw_indexers(config, seed)
    paths = [_names(path) for path, _ in wanted]
    parameters = [drawn[path] if path in drawn else _fill(by_path[path], checkpoint, config) for path in paths]
    return nnx.merge(graph, jax.tree_util.tree_unflatten(structure, parameters))


def _draw_indexers(config: Config, seed: int) -> dict[tuple[str, ...], jax.Array]:
    """The parameters of new indexers by path, a layer's as `LightningIndexer` initialises them."""

    def make(rngs):
        return LightningIndexer(config, rngs=rngs)

    rngs, drawn = nnx.Rngs(seed), {}
    for stack, count in (("dense_layers", config.num_dense_layers), ("moe_layers", config.num_moe_layers)):
        if count:
            indexers = nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)
            arrays, _ = jax.tree_util.tree_flatten_with_path(nnx.state(indexers))
            drawn |= {(stack, "self_attn", "indexer", *_names(path)): x for path, x in arrays}
    return drawn


def _dtype_name(dtype: Any) -> str:
    try:
        return np.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _fill(leaf: Leaf, checkpoint: Checkpoint, config: Config) -> jax.Array:
    """Reads the tensors of one parameter into place."""
    dtype = np.dtype(config.param_dtype)
    if leaf.entry.always_float32:
        dtype = FLOAT32
    elif leaf.entry.keeps_float32:
        dtype = np.result_type(dtype, *(checkpoint.dtype(name) for _, name in leaf.tensors()))
    x = jnp.zeros(leaf.shape(config), dtype)
    for index, name in leaf.tensors():
        x = _place(x, checkpoint.read(name), index, transposed=leaf.entry.inputs is not None)
        x.block_until_ready()  # reading runs ahead otherwise, and fills the memory with tensors that wait
    return x


@functools.partial(jax.jit, donate_argnums=0, static_argnames="transposed")
def _place(x, tensor, index, *, transposed):
    """Writes a file's tensor at `index` of a stacked parameter, in place: the argument is donated."""
    shape = x.shape[len(index) :]
    block = (tensor.T if transposed else tensor).reshape((1,) * len(index) + shape)
    return jax.lax.dynamic_update_slice(x, block.astype(x.dtype), (*index, *(0 for _ in shape)))


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
      max_shard_bytes: the most that one file holds, unless a single tensor is larger.

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

    One shard is in memory at a time. The tokenizer's files are copied, and `config.json` keeps every key that still
    holds; a dense `deepseek_v3` checkpoint stays one. `track` wraps the list of names, to show progress. Raises as
    `load_hf` and `save_hf` do.
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
        for pattern in COMPANIONS:
            for file in checkpoint.directory.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)


def _cast(x: np.ndarray, dtype: str | None, name: str) -> np.ndarray:
    """A tensor in the dtype in which it is written."""
    if dtype is None:
        return x
    keep = dtype == "bfloat16" and any(part in name for part in (*FLOAT32_IF_STORED, ALWAYS_FLOAT32))
    return x if keep else x.astype(np.dtype(dtype))
