"""The decoder's layers, and the stacks of them: made, taken apart, and scanned a period at a time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsa_jax.baselines import BlockMLA, NativeSparseMLA, WindowMLA
from dsa_jax.config import Config
from dsa_jax.indexer import LightningIndexer
from dsa_jax.key_range import KeyRange
from dsa_jax.layers import MLP, LayerOutput, Rotation, SharedIndex, SparseMLA
from dsa_jax.moe import MoE
from dsa_jax.nn import RMSNorm, show_arguments
from dsa_jax.parallel.collectives import gather_parameters
from dsa_jax.remat import remat_policy
from dsa_jax.stacks import StackedLayers

ATTENTIONS: dict[str, type[SparseMLA]] = {  # by the config's `baseline`
    "none": SparseMLA,
    "blocks": BlockMLA,
    "window": WindowMLA,
    "nsa": NativeSparseMLA,
}


@show_arguments
class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each on the normalised residual stream."""

    def __init__(self, config: Config, *, moe: bool, indexer: bool = True, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.param_dtype)
        self.self_attn = ATTENTIONS[config.baseline](config, indexer=indexer, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.param_dtype)
        self.mlp = MoE(config, rngs=rngs) if moe else MLP(config, config.intermediate_size, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        keys: KeyRange,
        *,
        routed: Int[Array, "B T k"] | None = None,
        **options: Any,
    ) -> LayerOutput:
        """Applies the layer; `routed` are the experts to take, `options` those of `SparseMLA`."""
        attended = self.self_attn(self.input_layernorm(x), rotation, keys, **options)
        x = x + attended.x
        y, load = self.post_attention_layernorm(x), None
        with jax.named_scope("feed_forward"):
            if isinstance(self.mlp, MoE):
                y, load, routed = self.mlp(y, valid=keys.nonempty(), routed=routed)
            else:
                y = self.mlp(y)
        return dataclasses.replace(attended, x=x + y, expert_load=load, routed=routed)


def stack_layers(config: Config, stacked: StackedLayers, *, rngs: nnx.Rngs) -> Any:
    """Makes the layers of a stack, and its indexers, of which there may be fewer."""
    every = len(stacked.indexers) == stacked.count
    stack = stack_modules(
        lambda rngs: DecoderLayer(config, moe=stacked.moe, indexer=every, rngs=rngs), stacked.count, rngs
    )
    if stacked.indexers and not every:
        indexers = stack_modules(lambda rngs: LightningIndexer(config, rngs=rngs), len(stacked.indexers), rngs)
        stack.self_attn.indexer = nnx.data(indexers)
    return stack


def stack_modules(make: Callable[[nnx.Rngs], Any], count: int, rngs: nnx.Rngs) -> Any:
    """Makes so many modules, each from random keys of its own, stacked on a leading axis."""
    return nnx.split_rngs(splits=count)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackParts:
    """Holds a stack's parameters, those of its indexers apart, and the definitions of its two kinds of layers.

    Attributes:
      indexers: the state of the indexers, stacked; empty where there are none.
      others: the state of all else, stacked.
      graphs: the definitions of a layer with an indexer, which takes both states, and of one without.
      period: for each layer of a period whether it has an indexer.
    """

    indexers: nnx.State
    others: nnx.State
    graphs: tuple[Any, Any] = dataclasses.field(metadata=dict(static=True))
    period: tuple[bool, ...] = dataclasses.field(metadata=dict(static=True))

    def definition(self, place: int) -> tuple[Any, int | None]:
        """Gives the definition of the layer at a place of the stack, and the place of its indexer if it has one."""
        turn, slot = divmod(place, len(self.period))
        number = turn * sum(self.period) + sum(self.period[:slot])
        return self.graphs[not self.period[slot]], number if self.period[slot] else None

    def layer(self, place: int) -> tuple[Any, tuple[nnx.State, ...]]:
        """Gives the definition of the layer at a place of the stack, and its states."""
        graph, number = self.definition(place)
        own = jax.tree.map(lambda x: x[place], self.others)
        return graph, (own,) if number is None else (jax.tree.map(lambda x: x[number], self.indexers), own)


def split_stack(stack: Any, stacked: StackedLayers) -> StackParts:
    """Takes a stack of layers apart."""
    graph, indexers, others = nnx.split(stack, lambda path, _: "indexer" in path, ...)
    without = nnx.merge(graph, indexers, others)
    without.self_attn.indexer = None
    return StackParts(indexers, others, (graph, nnx.split(without)[0]), stacked.period)


def scan_layers(stack: Any, stacked: StackedLayers, carry, shared, imposed, rotation, keys, options):
    """Runs the layers of a stack, a whole period in each turn of the scan, every layer rematerialised by itself.

    `shared` is what the layer before hands on, if the stack begins with one that takes it. Returns (x, cache), what the
    stack hands on in its turn, and the results by layer.
    """
    parts, period, config = split_stack(stack, stacked), stacked.period, stack.self_attn.config
    numbers = stacked.first + jnp.arange(stacked.count)
    indexers = None
    if config.indexer_types:
        indexers = stacked.first_indexer - 1 + np.cumsum(period * stacked.repeats)
        indexers = jnp.asarray(indexers, numbers.dtype)

    def body(carry, scanned):
        (own_indexers, others, by_layer), within, results = scanned, shared, []
        for slot, has_indexer in enumerate(period):
            states = (_take(others, len(period), slot),)
            if has_indexer:
                within, states = None, (_take(own_indexers, sum(period), sum(period[:slot])), *states)
            run = functools.partial(_run_in_scan, parts.graphs[not has_indexer], config, options)
            run = jax.checkpoint(run, policy=remat_policy(options["keep"]))
            if not has_any:
                within = SharedIndex(None, shared.index)
            carry, made, result = run(carry, rotation, within, states, *_take(by_layer, len(period), slot))
            within = made if has_indexer else within
            results.append(result)
        results = results[0] if len(period) == 1 else jax.tree.map(lambda *each: jnp.stack(each), *results)
        return carry, (results, within if stacked.hands_on and has_any else None)

    has_any = any(period)
    by_layer = numbers, indexers, imposed
    scanned = _fold(parts.indexers, sum(period)), _fold(parts.others, len(period)), _fold(by_layer, len(period))
    # The key range is carried though it never changes: of a constant, differentiation would compute and keep all masks,
    # T × S of them, ahead of the loop. So is a selection from outside: masks of gathered rows are T × K × (C + R).
    from_outside = None if has_any else shared.selected
    (x, cache, *_), (ys, made) = jax.lax.scan(body, (*carry, keys, from_outside), scanned)
    if len(period) > 1:
        ys = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), ys)
    # A stack that hands on what it made has one period, see `stacks`.
    return (x, cache), jax.tree.map(lambda leaf: leaf[0], made) if has_any else shared, ys


def _run_in_scan(graph, config, options, carry, rotation, shared, states, layer, indexer, imposed):
    """Runs one layer; returns the carry, what it hands on, and its results: KL, load, selection, experts.

    The carry is (x, cache, keys) and the selection of a layer outside of the scan, or None.
    """
    wanted = {name: options[name] for name in ("attention", "return_selected", "return_indexer_kl")}
    (x, cache, keys, from_outside), (selected, routed) = carry, imposed
    if from_outside is not None:
        shared = SharedIndex(from_outside, shared.index)
    states = [gather_parameters(state, dtype=config.dtype) for state in states]
    choices = dict(selected=selected, shared=shared, routed=routed, cache=cache, layer=layer, indexer=indexer)
    out = nnx.merge(graph, *states)(x, rotation, keys, **choices, **wanted)
    kl, made = out.indexer_kl, out.shared
    if kl is None and options["return_indexer_kl"]:  # its indexer does not learn from this layer
        kl = jnp.zeros(x.shape[:2], jnp.float32)
    learns = options["return_indexer_kl"] and config.index_share_kl == "mean"
    made = SharedIndex(made.selected, made.index if learns else None) if config.indexer_types else None
    chosen = out.selected if options["return_selected"] else None
    routed = out.routed if options["return_routed"] else None
    return (out.x, out.cache, keys, from_outside), made, (kl, out.expert_load, chosen, routed)


def _fold(tree, size):
    """Folds the leading axis of layers into periods, [layers / size, size, …]; a period of one stays as it is."""
    return tree if size <= 1 else jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), tree)


def _take(tree, size, slot):
    """Takes the layer at a place of a period out of what `_fold` made."""
    return tree if size <= 1 else jax.tree.map(lambda leaf: leaf[slot], tree)
