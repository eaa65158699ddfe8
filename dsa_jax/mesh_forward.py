"""The model on a mesh of devices, for inference: whole arrays in natural order in, and out again."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from dsa_jax.key_range import KeyRange
from dsa_jax.layers import Attention
from dsa_jax.model import Output, Transformer
from dsa_jax.parallel.sharding import check_batch, check_model, parameter_specs, shards, spec, zigzag_order


def forward_on_mesh(
    model: Transformer,
    mesh: Mesh,
    tokens: Int[Array, "B T"],
    *,
    keys: KeyRange | None = None,
    positions: Int[Array, "B T"] | None = None,
    attention: Attention = "sparse",
    selected: Int[Array, "layers B T K"] | None = None,
    return_selected: bool = False,
    routed: Int[Array, "moe_layers B T k"] | None = None,
    return_routed: bool = False,
    return_indexer_kl: bool = False,
) -> Output:
    """Runs `model(tokens, …)` on all devices of a mesh; arguments and results in natural order.

    For inference: training differentiates inside, see `train.step`. The parameters should live where
    `parameter_shardings` says, as `load_hf(mesh=…)` leaves them; others are moved there first.

    Args:
      model: the transformer.
      mesh: as `make_mesh` gives it.
      tokens, keys, positions, attention, selected, return_selected, routed, return_routed: as in `Transformer`.
      return_indexer_kl: likewise, but not wanted unless asked for.

    Returns:
      what the model returns, on the mesh.

    Raises:
      ValueError: if the model, the batch or the sequence cannot be split over the mesh.
    """
    tokens = model.check_inputs(tokens, keys, positions, attention, selected, routed, None)
    check_model(mesh, model.config)
    check_batch(mesh, batch_size=tokens.shape[0], seq_len=tokens.shape[1])
    graph, state = nnx.split(model)
    keys = KeyRange.causal(*tokens.shape) if keys is None else keys
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    options: dict[str, Any] = dict(attention=attention, return_selected=return_selected, return_routed=return_routed)
    options |= dict(return_indexer_kl=return_indexer_kl)
    return _forward_on_mesh(graph, mesh, tuple(options.items()), state, (tokens, keys, positions), (selected, routed))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward_on_mesh(graph, mesh, options, state, inputs, imposed):
    order = zigzag_order(inputs[0].shape[1], shards(mesh, "sequence"))
    token, layer = spec("batch", "sequence"), spec(None, "batch", "sequence")

    def run(state, inputs, imposed):
        (tokens, keys, positions), (selected, routed) = inputs, imposed
        model = nnx.merge(graph, state)
        chosen: dict[str, Any] = dict(options) | dict(selected=selected, routed=routed)
        return model(tokens, keys=keys, positions=positions, **chosen)

    arguments = state, jax.tree.map(lambda x: x[:, order], inputs), jax.tree.map(lambda x: x[:, :, order], imposed)
    results: Any = dict(hidden=token, indexer_kl=layer, expert_load=spec(), selected=layer, cache=None, routed=layer)
    specs = parameter_specs(state), token, layer
    out = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=Output(**results), check_vma=False)(*arguments)
    natural = np.argsort(order)
    per_layer = {name: getattr(out, name) for name in ("indexer_kl", "selected", "routed")}
    per_layer = {name: None if x is None else x[:, :, natural] for name, x in per_layer.items()}
    return dataclasses.replace(out, hidden=out.hidden[:, natural], **per_layer)
