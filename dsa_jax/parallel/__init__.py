"""Spreads a model over a mesh of devices: where arrays live, and what the shards tell each other.

`sharding` makes the mesh and holds the ONE table that says which dimension is split over which mesh axis, checks that a
model and a batch fit a mesh, and puts batches on it in zigzag order. `collectives` has the exchanges that layers make
inside `jax.shard_map`, each with its gradient, and each the identity on one device. `expert_parallel` sends tokens to
the shards of their experts and back. All of it is one plan: data, context, expert and tensor parallelism, parameters
fully sharded.

`dsa_jax.load_hf(folder, mesh=make_mesh({"data": 8}))` loads a model onto eight devices.
"""

from dsa_jax.parallel.collectives import (
    combine_attention,
    exchange_columns,
    gather_candidates,
    gather_head_weights,
    gather_parameters,
    gather_sequence,
    gather_tokens,
    heads_to_tokens,
    max_statistics,
    mesh_axes,
    num_shards,
    shard_index,
    slice_tokens,
    sum_gradients,
    sum_shards,
    sum_statistics,
    tokens_to_heads,
)
from dsa_jax.parallel.expert_parallel import (
    CAPACITY_FACTOR,
    GPUS_PER_HOST,
    expert_parallel_ffn,
    has_ragged_exchange,
    ragged_slices,
)
from dsa_jax.parallel.sharding import (
    AXES,
    RULES,
    check_batch,
    check_model,
    describe,
    imbalance,
    make_mesh,
    parameter_axes,
    parameter_shardings,
    parameter_specs,
    parse_mesh,
    path_names,
    place_batch,
    shards,
    spec,
    zigzag_order,
)

__all__ = [
    "AXES",
    "CAPACITY_FACTOR",
    "GPUS_PER_HOST",
    "RULES",
    "check_batch",
    "check_model",
    "combine_attention",
    "describe",
    "exchange_columns",
    "expert_parallel_ffn",
    "gather_candidates",
    "gather_head_weights",
    "gather_parameters",
    "gather_sequence",
    "gather_tokens",
    "has_ragged_exchange",
    "heads_to_tokens",
    "imbalance",
    "make_mesh",
    "max_statistics",
    "mesh_axes",
    "num_shards",
    "parameter_axes",
    "parameter_shardings",
    "parameter_specs",
    "parse_mesh",
    "path_names",
    "place_batch",
    "ragged_slices",
    "shard_index",
    "shards",
    "slice_tokens",
    "spec",
    "sum_gradients",
    "sum_shards",
    "sum_statistics",
    "tokens_to_heads",
    "zigzag_order",
]
