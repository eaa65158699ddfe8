"""Runs a model over the best selection there is: in each layer the keys of most attention, in the model run dense."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsa_jax import KeyRange, dense_attention_target, select_topk
from dsa_jax.blockwise import map_queries
from dsa_jax.layers import SharedIndex
from dsa_jax.rope import rotation as rope_rotation
from train.data import Batch
from train.evaluation.kept_mass import MASS_ELEMENTS, attention_lse
from train.phases import Params, merge_groups


def attend_to_oracle(graphdef: nnx.GraphDef, params: Params, batch: Batch) -> Float[Array, "B T D"]:
    """Runs a model in which every layer selects the keys of the most attention in the model run dense.

    The two run abreast, layer by layer, so that no selection outlives its layer.
    """
    model = merge_groups(graphdef, params)
    rotation = rope_rotation(jnp.asarray(batch.positions), model.config)
    dense = sparse = model.embed(jnp.asarray(batch.tokens))
    for layer in model.layers():
        dense, sparse = _run_layer(*nnx.split(layer), dense, sparse, rotation, batch.keys)
    return model.norm(sparse)


@partial(jax.jit, static_argnames="graph")
def _run_layer(graph, state, dense, sparse, rotation, keys: KeyRange):
    layer = nnx.merge(graph, state)
    attention = layer.self_attn
    k_of, scale = attention.config.index_topk, attention.config.softmax_scale
    q, k, reach = attention.queries_and_keys(attention.project(layer.input_layernorm(dense), rotation), keys)
    lse = attention_lse(q, k, reach, scale=scale)

    def select(queries, k, sums):
        q, lse, start, stop = (each[None] for each in queries)
        p = dense_attention_target(q, k[None], lse, KeyRange(start, stop), scale=scale)
        return select_topk(p, k_of, keys=KeyRange(start, stop))[0], sums

    queries = q, lse, reach.start, reach.stop
    selected = map_queries(select, queries, k, block=max(1, MASS_ELEMENTS // k.shape[1]))[0]
    options: dict[str, Any] = {"dense": {"attention": "dense"}, "sparse": {"selected": selected}}
    if attention.indexer is None:
        options = {name: {"shared": SharedIndex(None), **each} for name, each in options.items()}
    return (
        layer(dense, rotation, keys, **options["dense"]).x,
        layer(sparse, rotation, keys, **options["sparse"]).x,
    )
