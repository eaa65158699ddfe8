"""Where arrays live on a mesh of devices: the mesh, one table from logical to mesh axes, and the order of the sequence.

The mesh has the axes `data`, `context`, `expert` and `tensor`, of any sizes. Every array dimension has a logical axis,
and `RULES` alone says over which axes of the mesh that is split. Collectives are in `dsa_jax.parallel.collectives`.

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

AXES = ("data", "context", "expert", "tensor")  # `tensor` last: its neighbours talk most, and stand in one host

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data",),
    "sequence": ("context", "expert"),
    "heads": ("tensor",),
    "width": ("tensor",),  # of the feed-forward, of each expert too
    "vocabulary": ("tensor",),
    "experts": ("expert",),
    "fsdp": ("data",),  # the dimension along which a parameter and its optimizer state are fully sharded
}
RULES["tokens"] = RULES["batch"] + RULES["sequence"]

# Logical axes of the parameters, by the end of their path; stacked layers stand in front. Others are on every device.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": ("vocabulary", "fsdp"),
    "lm_head": ("fsdp", "vocabulary"),
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
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the given axis sizes, 1 where none is given, over `devices` (all of them if None).

    Raises:
      ValueError: if an axis is unknown, a size is below 1, or the sizes do not multiply to the number of devices.
    """
    shape = _full_shape(sizes)
    count = len(jax.devices() if devices is None else devices)
    if math.prod(shape.values()) != count:
        raise ValueError(
            f"the mesh's sizes must multiply to the {count} devices, got {describe(shape)} = "
            f"{math.prod(shape.values())}; nearest: {describe(_nearest(shape, count))}"
        )
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parse_mesh(text: str) -> dict[str, int]:
    """The axis sizes in "data=2,context=4"; ValueError for anything else."""
    sizes = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if match is None or match[1] in sizes:
            raise ValueError(f"mesh must read like data=2,context=4, each axis once, got {text!r}")
        sizes[match[1]] = int(match[2])
    return _full_shape(sizes)


def describe(shape: Mapping[str, int]) -> str:
    """A mesh's shape as `parse_mesh` reads it."""
    return ",".join(f"{axis}={shape[axis]}" for axis in AXES)


def _full_shape(sizes: Mapping[str, int]) -> dict[str, int]:
    unknown = [axis for axis in sizes if axis not in AXES]
    if unknown:
        raise ValueError(f"mesh axes must be among {', '.join(AXES)}, got {', '.join(unknown)}")
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    for axis, size in shape.items():
        if size < 1:
            raise ValueError(f"mesh axis {axis} must be at least 1, got {size}")
    return shape


def _nearest(shape: Mapping[str, int], count: int) -> dict[str, int]:
    """A shape of `count` devices that keeps what it can of the axes other than `data`, the last ones first."""
    nearest = {}
    for axis in reversed(AXES[1:]):
        nearest[axis] = math.gcd(shape[axis], count)
        count //= nearest[axis]
    return {AXES[0]: count} | nearest


def shards(mesh: Mesh | AbstractMesh, name: str) -> int:
    """Over how many shards a logical axis is split."""
    return math.prod(mesh.shape[axis] for axis in RULES[name])


def check_model(mesh: Mesh | AbstractMesh, config: Config) -> None:
    """Raises ValueError unless the model's parameters can be split over the mesh."""
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(f"the mesh must have the axes {AXES}, as `make_mesh` gives it, got {mesh.axis_names}")
    sizes = list(_split_sizes(config))
    for name, what, size in sizes:
        together = math.gcd(*(other for rule, _, other in sizes if RULES[rule] == RULES[name]))
        _check_divides(mesh, name, what, size, together)


def check_batch(mesh: Mesh | AbstractMesh, *, batch_size: int, seq_len: int) -> None:
    """Raises ValueError unless a batch of this shape can be split over the mesh."""
    _check_divides(mesh, "batch", "the batch size", batch_size, batch_size)
    count, heads = shards(mesh, "sequence"), shards(mesh, "heads")
    unit = count * math.lcm(2 if count > 1 else 1, heads)
    if seq_len % unit:
        nearest = max(unit, round(seq_len / unit) * unit)
        halves = f"two chunks for each of the {_sizes(mesh, 'sequence')} shards" if count > 1 else ""
        parts = f"{_sizes(mesh, 'heads')} shares out a shard's tokens" if heads > 1 else ""
        why = "; ".join(filter(None, (halves, parts)))
        raise ValueError(f"the sequence length must be a multiple of {unit} ({why}), got {seq_len}; nearest: {nearest}")


def _split_sizes(config: Config) -> Iterable[tuple[str, str, int]]:
    """Logical axis, name and size of every dimension of the model's parameters that is split."""
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
    return ((name, what, size) for (name, what), size in sizes.items())


def _check_divides(mesh, name, what, size, together):
    """`together` is the greatest number that divides all that is split alike."""
    count = shards(mesh, name)
    if size % count:
        divisors = [d for d in range(1, together + 1) if together % d == 0]
        nearest = min(divisors, key=lambda d: abs(math.log(d / count)))
        raise ValueError(f"{_sizes(mesh, name)} must divide {what} {size}; nearest that does: {nearest}")


def _sizes(mesh, name):
    return " × ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES[name])


def spec(*names: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes."""
    while names and names[-1] is None:
        names = names[:-1]
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def path_names(path: Iterable[Any]) -> tuple[str, ...]:
    """The names along a path of `jax.tree_util`, those of a module's state or of a tree that holds such names."""
    return tuple(str(key.key) for key in path if hasattr(key, "key"))


def parameter_axes(names: Sequence[str], ndim: int) -> tuple[str | None, ...]:
    """The logical axes of a parameter of `ndim` dimensions by the names on its path."""
    axes = PARAMETERS.get(".".join(names[-2:])) or PARAMETERS.get(names[-1] if names else "") or ()
    return (None,) * (ndim - len(axes)) + axes if len(axes) <= ndim else (None,) * ndim


def parameter_specs(tree: Any) -> Any:
    """The partition of every array in a tree whose paths end like a model's state: parameters, gradients, moments."""
    return jax.tree_util.tree_map_with_path(lambda path, x: spec(*parameter_axes(path_names(path), x.ndim)), tree)


def parameter_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`parameter_specs` on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(tree))


def zigzag_order(length: int, count: int) -> Int[np.ndarray, " T"]:
    """The natural positions in the order in which `count` shards hold them, one shard after the other."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * count, -1) if count > 1 else np.arange(length)[None]
    return np.concatenate([c for i in range(count) for c in (chunks[i], chunks[-1 - i])]) if count > 1 else chunks[0]


def imbalance(start: Int[np.ndarray, "B T"], stop: Int[np.ndarray, "B T"], count: int) -> float:
    """How much more the busiest of `count` sequence shards has to do than the mean: 0 for even work.

    Work is the number of (query, key) pairs in reach, which the indexer scores and dense attention attends to.
    """
    pairs = np.maximum(np.asarray(stop, np.int64) - np.asarray(start, np.int64), 0)
    work = pairs[:, zigzag_order(pairs.shape[1], count)].reshape(len(pairs), count, -1).sum(axis=(0, 2))
    return float(work.max() / work.mean() - 1) if work.any() else 0.0


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts arrays [B, T] in natural order, whole on every process, onto their shards, in zigzag order."""
    order = zigzag_order(jax.tree.leaves(batch)[0].shape[1], shards(mesh, "sequence"))
    sharding = NamedSharding(mesh, spec("batch", "sequence"))

    def place(x):
        x = np.asarray(x)[:, order]
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)
