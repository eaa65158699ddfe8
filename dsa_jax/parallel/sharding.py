"""Decides where arrays live on a mesh of devices: the mesh, ONE table from logical to mesh axes, the sequence's order.

The mesh has the axes `data`, `context`, `expert` and `tensor`, of any sizes. Every dimension of every array has a
logical axis (or none), and `RULES` alone says over which mesh axes that is split. `PARAMETERS` says which logical axes
each parameter has. No other file names a mesh axis; `dsa_jax.parallel.collectives` speaks of logical axes too.

A sequence over n shards is cut into 2n chunks, of which shard i owns numbers i and 2n - 1 - i (zigzag): late queries
reach more keys than early ones, and so all shards have the same work.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from dsa_jax.config import Config
from dsa_jax.quantization import WEIGHT_BLOCK

# The mesh axes, in the order of the devices. `tensor` is last: its neighbours talk most, and so stand in one host.
AXES = ("data", "context", "expert", "tensor")

# The table: over which mesh axes a logical axis is split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data",),
    "sequence": ("context", "expert"),  # shards of experts hold different tokens, or they would repeat all other work
    "heads": ("tensor",),
    "width": ("tensor",),  # of the feed-forward, of each expert too
    "vocabulary": ("tensor",),
    "experts": ("expert",),
    "rows": ("data", "expert"),  # sequences that are served: shards of experts have sequences of their own
    "pages": ("context",),  # of one sequence that is served
    "pool": ("data", "expert", "context"),  # pages of all of them
    "fsdp": ("data",),  # the dimension along which a parameter and its optimizer state are fully sharded
}
RULES["tokens"] = RULES["batch"] + RULES["sequence"]

# Logical axes of each parameter, by the end of its path. Stacked layers stand in front of them and are never split;
# parameters that are not listed (norms, the router's bias) are on every device.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": ("vocabulary", "fsdp"),
    "lm_head": ("fsdp", "vocabulary"),
    "eh_proj": ("fsdp", None),
    "q_a_proj": ("fsdp", None),
    "q_b_proj": ("fsdp", "heads", None),
    "kv_a_proj_with_mqa": ("fsdp", None),
    "kv_b_proj": ("fsdp", "heads", None),
    "o_proj": ("heads", None, "fsdp"),
    "indexer.wq_b": ("fsdp", None, None),
    "indexer.wk": ("fsdp", None),
    "indexer.weights_proj": ("fsdp", None),
    "gate.weight": ("fsdp", None),
    "gate_proj": ("fsdp", "width"),
    "up_proj": ("fsdp", "width"),
    "down_proj": ("width", "fsdp"),
    "experts.gate_proj": ("experts", "fsdp", "width"),
    "experts.up_proj": ("experts", "fsdp", "width"),
    "experts.down_proj": ("experts", "width", "fsdp"),
    "experts.gate_proj_scale": ("experts", "fsdp", "width"),  # of FP8, one a block: shards have whole blocks
    "experts.up_proj_scale": ("experts", "fsdp", "width"),
    "experts.down_proj_scale": ("experts", "width", "fsdp"),
}


# The mesh.


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh of the given axis sizes; an axis that is not given has size 1.

    Args:
      sizes: devices along each axis, by its name in `AXES`.
      devices: the devices to use, all of this job if None.

    Raises:
      ValueError: if an axis is unknown, a size is below 1, or the sizes do not multiply to the number of devices.

    Examples:
      >>> describe(make_mesh({"data": 1}, jax.devices()[:1]).shape)
      'data=1,context=1,expert=1,tensor=1'
    """
    shape = _full_shape(sizes)
    num_devices = len(jax.devices() if devices is None else devices)
    if math.prod(shape.values()) != num_devices:
        raise ValueError(
            f"the mesh's sizes must multiply to the {num_devices} devices, got {describe(shape)} = "
            f"{math.prod(shape.values())}; nearest: {describe(_nearest_shape(shape, num_devices))}"
        )
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the size of every mesh axis from text such as "data=2,context=4".

    Raises:
      ValueError: if the text reads otherwise, or names an unknown axis or a size below 1.

    Examples:
      >>> parse_mesh("data=2,context=4")
      {'data': 2, 'context': 4, 'expert': 1, 'tensor': 1}
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if match is None or match[1] in sizes:
            raise ValueError(f"mesh must read like data=2,context=4, each axis once, got {text!r}")
        sizes[match[1]] = int(match[2])
    return _full_shape(sizes)


def describe(shape: Mapping[str, int]) -> str:
    """Writes a mesh's shape as `parse_mesh` reads it.

    Examples:
      >>> describe(parse_mesh("tensor=2"))
      'data=1,context=1,expert=1,tensor=2'
    """
    return ",".join(f"{axis}={shape[axis]}" for axis in AXES)


def _full_shape(sizes: Mapping[str, int]) -> dict[str, int]:
    """Checks axis sizes and adds those that are not given."""
    unknown = [axis for axis in sizes if axis not in AXES]
    if unknown:
        raise ValueError(f"mesh axes must be among {', '.join(AXES)}, got {', '.join(unknown)}")
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    for axis, size in shape.items():
        if size < 1:
            raise ValueError(f"mesh axis {axis} must be at least 1, got {size}")
    return shape


def _nearest_shape(shape: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Finds a shape of `num_devices` that keeps what it can of the axes other than `data`, the last ones first."""
    nearest = {}
    for axis in reversed(AXES[1:]):
        nearest[axis] = math.gcd(shape[axis], num_devices)
        num_devices //= nearest[axis]
    return {AXES[0]: num_devices} | nearest


def shards(mesh: Mesh | AbstractMesh | None, name: str) -> int:
    """Counts the shards into which a mesh splits a logical axis of `RULES`, 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES[name])


# Checks before anything is traced.


def check_model(mesh: Mesh | AbstractMesh, config: Config) -> None:
    """Checks that a model's parameters can be split over a mesh.

    Raises:
      ValueError: if the mesh has other axes than `AXES`, or a mesh size does not divide a dimension that it splits;
        the message names the nearest size that does. For baseline "nsa" if it has more than one device.
    """
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(f"the mesh must have the axes {AXES}, as `make_mesh` gives it, got {mesh.axis_names}")
    if config.baseline == "nsa" and mesh.size > 1:
        raise ValueError(f"a model of baseline 'nsa' must be on one device, got {describe(mesh.shape)}")
    dimensions = list(_split_dimensions(config))
    for name, field, size in dimensions:
        # What the same mesh axes split must have a divisor in common, so that is what the message proposes.
        common = math.gcd(*(other for rule, _, other in dimensions if RULES[rule] == RULES[name]))
        _check_divides(mesh, name, field, size, common)


def check_batch(mesh: Mesh | AbstractMesh, *, batch_size: int, seq_len: int) -> None:
    """Checks that a batch [batch_size, seq_len] can be split over a mesh.

    Raises:
      ValueError: if it cannot; the message says why and names the nearest batch size or length that can.
    """
    _check_divides(mesh, "batch", "the batch size", batch_size, batch_size)
    sequence_shards, head_shards = shards(mesh, "sequence"), shards(mesh, "heads")
    unit = sequence_shards * math.lcm(2 if sequence_shards > 1 else 1, head_shards)
    if seq_len % unit:
        nearest = max(unit, round(seq_len / unit) * unit)
        chunks = f"two chunks for each of the {_sizes(mesh, 'sequence')} shards" if sequence_shards > 1 else ""
        slices = f"{_sizes(mesh, 'heads')} shares out a shard's tokens" if head_shards > 1 else ""
        why = "; ".join(filter(None, (chunks, slices)))
        raise ValueError(f"the sequence length must be a multiple of {unit} ({why}), got {seq_len}; nearest: {nearest}")


def _split_dimensions(config: Config) -> Iterable[tuple[str, str, int]]:
    """Lists (logical axis, field of the config, size) of every dimension of the parameters that a mesh may split."""
    sizes = {
        ("heads", "num_attention_heads"): config.num_attention_heads,
        ("vocabulary", "vocab_size"): config.vocab_size,
        ("fsdp", "hidden_size"): config.hidden_size,
        ("fsdp", "q_lora_rank"): config.q_lora_rank,
        ("fsdp", "kv_lora_rank"): config.kv_lora_rank,
    }
    if config.num_dense_layers:
        sizes["width", "intermediate_size"] = config.intermediate_size
    if config.num_moe_layers:
        sizes["width", "moe_intermediate_size"] = config.moe_intermediate_size
        sizes["experts", "n_routed_experts"] = config.n_routed_experts
    if config.num_moe_layers and config.expert_dtype == "fp8":
        for name, field in (("width", "moe_intermediate_size"), ("fsdp", "hidden_size")):
            size = getattr(config, field)
            blocks = size // WEIGHT_BLOCK if size % WEIGHT_BLOCK == 0 else 1  # a broken block is not split off
            sizes[name, f"{field} {size} in whole FP8 blocks of {WEIGHT_BLOCK}:"] = blocks
    return ((name, field, size) for (name, field), size in sizes.items())


def _check_divides(mesh, name, field, size, common):
    """Checks that a logical axis's shards divide `size`; `common` divides all that the same mesh axes split."""
    num_shards = shards(mesh, name)
    if size % num_shards:
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        nearest = min(divisors, key=lambda d: abs(math.log(d / num_shards)))
        raise ValueError(f"{_sizes(mesh, name)} must divide {field} {size}; nearest that does: {nearest}")


def _sizes(mesh, name):
    return " × ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES[name])


# Partitions of arrays and parameters.


def spec(*names: str | None) -> PartitionSpec:
    """Gives the partition of an array whose dimensions have these logical axes, None for one that is not split.

    Examples:
      >>> spec("batch", "sequence", None) == PartitionSpec(("data",), ("context", "expert"))
      True
    """
    while names and names[-1] is None:
        names = names[:-1]
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def path_names(path: Iterable[Any]) -> tuple[str, ...]:
    """Lists the names along a path of `jax.tree_util`, in a module's state or in a tree that holds such names."""
    return tuple(str(key.key) for key in path if hasattr(key, "key"))


def parameter_axes(names: Sequence[str], ndim: int) -> tuple[str | None, ...]:
    """Looks up the logical axes of a parameter.

    Args:
      names: the names on its path, of which the last one or two count.
      ndim: its number of dimensions; those in front of the table's are of stacked layers.

    Returns:
      One logical axis a dimension, None for those that are not split.

    Examples:
      >>> parameter_axes(("moe_layers", "self_attn", "o_proj"), 4)
      (None, 'heads', None, 'fsdp')
    """
    axes = PARAMETERS.get(".".join(names[-2:])) or PARAMETERS.get(names[-1] if names else "") or ()
    return (None,) * (ndim - len(axes)) + axes if len(axes) <= ndim else (None,) * ndim


def parameter_specs(tree: Any, *, copies: bool = False) -> Any:
    """Gives the partition of every array in a tree whose paths end as a model's state's do.

    Such are the parameters themselves, gradients, and an optimizer's moments.

    Args:
      tree: of arrays, or of their shapes.
      copies: whether every shard of `data` has parameters whole, as decoding wants, which would gather them anew for
        each token; else they are fully sharded, as training has room for them.
    """

    def partition(path, x):
        axes = parameter_axes(path_names(path), x.ndim)
        return spec(*(None if copies and name == "fsdp" else name for name in axes))

    return jax.tree_util.tree_map_with_path(partition, tree)


def parameter_shardings(tree: Any, mesh: Mesh | AbstractMesh, *, copies: bool = False) -> Any:
    """Gives the sharding on a mesh of every array in a tree, by `parameter_specs`: what `jax.device_put` takes."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(tree, copies=copies))


def place_copies(state: Any, mesh: Mesh | None) -> Any:
    """Puts parameters of one device where a mesh has them for decoding, and leaves those that are there.

    Raises:
      ValueError: if they are on another mesh.
    """
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(state))
    for found in {x.mesh for x in shardings if isinstance(x, NamedSharding) and x.mesh.size > 1}:
        if found != mesh:
            found, wanted = describe_mesh(found), describe_mesh(mesh)
            raise ValueError(f"the cache must be on the model's mesh, {found}, got {wanted}")
    return state if mesh is None else jax.device_put(state, parameter_shardings(state, mesh, copies=True))


def describe_mesh(mesh: Any) -> str:
    """Names a mesh's axes and their sizes, for messages."""
    return "no mesh" if mesh is None else ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())


# The sequence.


def zigzag_order(length: int, count: int) -> Int[np.ndarray, " T"]:
    """Lists the natural positions of a sequence in the order in which shards hold them.

    Args:
      length: the number of tokens, a multiple of 2 · count where there are several shards.
      count: the number of shards; shard i holds chunks i and 2 · count - 1 - i.

    Returns:
      The positions, those of the first shard first. `np.argsort` of it takes results back to natural order.

    Examples:
      >>> zigzag_order(8, 2).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]
    """
    chunks = np.arange(length, dtype=np.int32).reshape(2 * count, -1) if count > 1 else np.arange(length)[None]
    return np.concatenate([c for i in range(count) for c in (chunks[i], chunks[-1 - i])]) if count > 1 else chunks[0]


def imbalance(start: Int[np.ndarray, "B T"], stop: Int[np.ndarray, "B T"], count: int) -> float:
    """Computes how much more the busiest of `count` sequence shards has to do than the mean: 0 for even work.

    Work is the number of (query, key) pairs in reach, which the indexer scores and dense attention attends to.

    Args:
      start: the first key that each query reaches, queries in natural order.
      stop: the end of the keys that each query reaches.
      count: the number of shards.

    Examples:
      >>> stop = np.arange(1, 9)[None]  # causal: the zigzag makes it even
      >>> imbalance(np.zeros_like(stop), stop, 2)
      0.0
    """
    pairs = np.maximum(np.asarray(stop, np.int64) - np.asarray(start, np.int64), 0)
    work = pairs[:, zigzag_order(pairs.shape[1], count)].reshape(len(pairs), count, -1).sum(axis=(0, 2))
    return float(work.max() / work.mean() - 1) if work.any() else 0.0


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch onto its shards, in zigzag order.

    Args:
      batch: a tree of arrays [B, T] in natural order, whole on every process.
      mesh: the devices, each of which gets its rows' part of the sequence.

    Returns:
      The tree with arrays [B, T] that are sharded by batch and sequence.
    """
    order = zigzag_order(jax.tree.leaves(batch)[0].shape[1], shards(mesh, "sequence"))
    sharding = NamedSharding(mesh, spec("batch", "sequence"))

    def place(x):
        x = np.asarray(x)[:, order]
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)
