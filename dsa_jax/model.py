"""The DSA transformer: tokens in, hidden states and the indexer's losses out."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from dsa_jax.blockwise import contract
from dsa_jax.cache import AnyCache, Cache, Pages
from dsa_jax.cache_shapes import page_shapes
from dsa_jax.config import Config
from dsa_jax.decoder import DecoderLayer, scan_layers, split_stack, stack_layers
from dsa_jax.key_range import KeyRange, check_keys
from dsa_jax.layers import Attention, AttentionMaps
from dsa_jax.nn import RMSNorm, new_weight, pad_rows, show_arguments
from dsa_jax.parallel.collectives import (
    exchange_columns,
    gather_parameters,
    num_shards,
    shard_index,
    sum_gradients,
    sum_shards,
)
from dsa_jax.prediction import Predicted, scan_predictions, stack_predictions, tokens_ahead
from dsa_jax.remat import check_keep
from dsa_jax.rope import rotation as rope_rotation
from dsa_jax.stacks import KINDS, PREDICTION_LAYERS, StackedLayers, stacked_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Holds the results of a forward pass.

    Attributes:
      hidden: [B, T, D] after the last norm, for `Transformer.unembed`.
      indexer_kl: float32 [layers, B, T], the divergence of the indexer from the attention (Eq. 4, or Eq. 3 if dense),
        if it was asked for.
      expert_load: float32 [moe_layers, X], the number of (token, slot) pairs that each expert got.
      selected: int32 [layers, B, T, K], the selections, if they were asked for.
      cache: the new cache, if one was given.
      routed: int32 [moe_layers, B, T, k], each token's experts, if they were asked for.
      predicted: of the prediction layers, if it was asked for.
    """

    hidden: Array
    indexer_kl: Array | None
    expert_load: Array
    selected: Array | None
    cache: AnyCache | None
    routed: Array | None = None
    predicted: Predicted | None = None


@show_arguments
class Transformer(nnx.Module):
    """A DeepSeek-V3.2 model. Layers of a kind are stacked on a leading axis and scanned, each rematerialised.

    Where layers share selections, what is scanned are periods of that pattern, in as many stacks as
    `stacks.stacked_layers` lists. A stack's indexers are stacked too: there are fewer of them than layers.

    Examples:
      >>> model = Transformer(Config.tiny(), rngs=nnx.Rngs(0))
      >>> output = model(jnp.zeros((1, 8), jnp.int32))
      >>> model.unembed(output.hidden).shape
      (1, 8, 256)
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        vocab, dim = config.vocab_size, config.hidden_size
        self.config = config
        self.embed_tokens = new_weight(config, rngs, vocab, dim)
        stacks = {stacked.name: stack_layers(config, stacked, rngs=rngs) for stacked in stacked_layers(config)}
        none = {name: None for name in KINDS if name != PREDICTION_LAYERS}
        for name, stack in (none | stacks).items():
            setattr(self, name, stack)
        self.norm = RMSNorm(dim, config.rms_norm_eps, config.param_dtype)
        self.lm_head = None if config.tie_word_embeddings else new_weight(config, rngs, dim, vocab)
        # Drawn last: the same random keys give the same model with prediction layers and without.
        self.prediction_layers = stack_predictions(config, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        keys: KeyRange | None = None,
        positions: Int[Array, "B T"] | None = None,
        attention: Attention = "sparse",
        selected: Int[Array, "layers B T K"] | None = None,
        return_selected: bool = False,
        routed: Int[Array, "moe_layers B T k"] | None = None,
        return_routed: bool = False,
        return_indexer_kl: bool = True,
        return_predicted: bool = False,
        cache: AnyCache | None = None,
        keep: tuple[str, ...] = (),
    ) -> Output:
        """Runs the model over T tokens a row.

        Args:
          tokens: ids in [0, vocab); under `jit`, where values are unknown, check them before.
          keys: the keys that each query may reach, causal if None; positions of the cache when there is one. A query
            with an empty range is padding: it does not count in `expert_load`, nor, if last, in the cache's lengths.
          positions: rotary positions, counted from 0 (or from the cache's lengths) if None.
          attention: "sparse" over the selection, or "dense" over all reachable keys.
          selected: a selection to attend to instead of the indexer's own (sparse attention only).
          return_selected: whether `Output.selected` is wanted: what is attended to, or, under dense attention, what the
            indexer would select, to watch a warm-up.
          routed: the experts that tokens go to instead of the routers' own choice, which -1 leaves in place; the gates
            are still the routers'.
          return_routed: whether `Output.routed` is wanted.
          return_indexer_kl: whether `Output.indexer_kl` is wanted; without it nothing of it is computed.
          return_predicted: whether `Output.predicted` is wanted, of all prediction layers, without a cache; without it
            nothing of them is computed. `predict` runs one of them, with a cache.
          cache: keys of earlier tokens, a `Cache` or `Pages`; the new ones are written to it. Of `Pages`, which count
            nothing, keys and positions must be given.
          keep: names of `remat.KEEPABLE`: results that are kept for the backward pass, not computed again.

        Raises:
          ValueError: if shapes, options or, outside `jit`, token ids are wrong, or the tokens do not fit.
        """
        tokens = self.check_inputs(tokens, keys, positions, attention, selected, routed, cache)
        check_keep(keep)
        if return_predicted and (cache is not None or not self.config.num_nextn_predict_layers):
            got = f"num_nextn_predict_layers = {self.config.num_nextn_predict_layers}"
            raise ValueError(
                "return_predicted needs prediction layers and no cache, "
                f"got {got}{'' if cache is None else ' and a cache'}"
            )
        batch, length = tokens.shape
        before = jnp.zeros(batch, jnp.int32) if cache is None or cache.lengths is None else cache.lengths
        keys = KeyRange.causal(batch, length, offset=before) if keys is None else keys
        positions = before[:, None] + jnp.arange(length) if positions is None else positions
        self._check_values(tokens, keys, cache)
        inputs = tokens, keys, positions, selected, routed, cache
        wanted = dict(return_selected=return_selected, return_indexer_kl=return_indexer_kl)
        wanted |= dict(return_routed=return_routed, return_predicted=return_predicted)
        options = dict(attention=attention, keep=keep, **wanted)
        if isinstance(tokens, Tracer):
            return self._run(*inputs, options)
        # Outside `jit` the whole forward is compiled, once a shape: a scan by itself would be compiled at every call.
        graph, state = nnx.split(self)
        return _run_compiled(graph, tuple(options.items()), state, inputs)

    def _run(self, tokens, keys, positions, selected, routed, cache, options) -> Output:
        """Runs the model on what was checked."""
        x, rotation = self.embed(tokens), rope_rotation(positions, self.config)
        results, experts_before, shared = [], 0, None
        for stack, stacked in self.stacks():
            count, first = stacked.count, stacked.first
            stop = experts_before + count if stacked.moe else experts_before
            imposed = (
                None if selected is None else selected[first : first + count],
                routed[experts_before:stop] if routed is not None and stacked.moe else None,
            )
            experts_before = stop
            (x, cache), shared, ys = scan_layers(stack, stacked, (x, cache), shared, imposed, rotation, keys, options)
            results.append(ys)

        kl, load, chosen, experts = zip(*results, strict=True)
        load = [each for each in load if each is not None]
        experts = [each for each in experts if each is not None]
        hidden = _gathered(self.norm)(x)
        return Output(
            hidden=hidden,
            indexer_kl=jnp.concatenate(kl) if options["return_indexer_kl"] else None,
            expert_load=jnp.concatenate(load) if load else jnp.zeros((0, self.config.n_routed_experts), jnp.float32),
            selected=jnp.concatenate(chosen) if options["return_selected"] else None,
            cache=None if cache is None else cache.advance(jnp.sum(keys.nonempty(), axis=1, dtype=jnp.int32)),
            routed=jnp.concatenate(experts) if options["return_routed"] else None,
            predicted=self._predict_all(hidden, tokens, rotation, keys, options),
        )

    def _predict_all(self, hidden, tokens, rotation, keys, options) -> Predicted | None:
        """Runs every prediction layer on the tokens that stand behind each, if that is wanted."""
        if not options["return_predicted"]:
            return None
        depths = self.config.num_nextn_predict_layers
        ids, keys = tokens_ahead(tokens, keys, depths)
        embedded = self.embed(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape, -1)
        with jax.named_scope("prediction"):
            return scan_predictions(self.prediction_layers, hidden, embedded, rotation, keys, options)

    def predict(
        self,
        hidden: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        *,
        keys: KeyRange,
        positions: Int[Array, "B T"],
        depth: int = 1,
        attention: Attention = "sparse",
        cache: AnyCache | None = None,
    ) -> tuple[Float[Array, "B T D"], AnyCache | None]:
        """Runs one prediction layer, as drafting does: each row joins a token to what the depth before knows.

        Args:
          hidden: `Output.hidden`, or what a prediction layer returned: of a row for the token at its position.
          tokens: the token that follows each row, as far as `depth` says.
          keys: the rows that each row may reach, positions of the cache if there is one; none for padding.
          positions: rotary positions of the rows.
          depth: which layer, from 1.
          attention: as in a call.
          cache: with entries of prediction layers. The rows' are written behind its lengths, which stay: they count the
            rows of the model's own layers.

        Returns:
          hidden states, of which `unembed` makes logits of the token behind `tokens`, and the cache.
        """
        config = self.config
        count = config.num_nextn_predict_layers
        if not 1 <= depth <= count:
            raise ValueError(f"depth must be from 1 to the {count} prediction layers, got {depth}")
        graph, state = nnx.split(self.prediction_layers)
        state = gather_parameters(jax.tree.map(lambda x: x[depth - 1], state), dtype=config.dtype)
        layer = config.num_hidden_layers + depth - 1
        indexer = config.num_index_layers + depth - 1 if config.indexer_types else None
        options: dict[str, Any] = dict(attention=attention, cache=cache, layer=layer, indexer=indexer)
        embedded, turn = self.embed(tokens), rope_rotation(positions, config)
        with jax.named_scope("prediction"):
            predicting = nnx.merge(graph, state)
            out = predicting.predict(hidden, embedded, turn, keys, return_indexer_kl=False, **options)
        return out.x, out.cache

    def unembed(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B vocab"]:
        """Computes float32 logits of the next token; at training lengths take them a chunk of tokens at a time.

        Where the vocabulary is sharded they are those of this shard's part of it.
        """
        return self.unembedding()(hidden)

    def unembedding(self) -> Callable[[Float[Array, "*B D"]], Float[Array, "*B vocab"]]:
        """Returns `unembed` with its weight gathered once, to be called for one chunk of tokens after another."""
        name = "embed_tokens" if self.lm_head is None else "lm_head"
        gathered = gather_parameters({name: getattr(self, name)[...]}, dtype=self.config.dtype, wide=True)[name]
        weight = gathered.T if self.lm_head is None else gathered

        def unembed(hidden):
            rows = sum_gradients(hidden.reshape(-1, hidden.shape[-1]), "vocabulary")
            count = rows.shape[0]
            logits = _unembed(pad_rows(rows, axis=0) if count == 1 else rows, weight)[:count]
            return logits.reshape(*hidden.shape[:-1], -1)

        return unembed

    def layers(self) -> Iterator[DecoderLayer]:
        """Yields the layers one by one, unstacked: to look inside, not to train."""
        for stack, stacked in self.stacks():
            parts = split_stack(stack, stacked)
            for place in range(stacked.count):
                graph, states = parts.layer(place)
                yield nnx.merge(graph, *states)

    def attention_maps(
        self,
        tokens: Int[Array, "B T"],
        layer: int,
        *,
        keys: KeyRange | None = None,
        positions: Int[Array, "B T"] | None = None,
        attention: Attention = "sparse",
    ) -> AttentionMaps:
        """Computes one layer's attention weights and index scores over all pairs of tokens, to plot them.

        Args:
          tokens, keys, positions, attention: as in a call; the layers below attend in the same way.
          layer: its number, from 0; negative ones count from the last.

        Raises:
          ValueError: if there is no such layer, or for what a call refuses.

        Examples:
          >>> maps = model.attention_maps(tokens, layer=-1)
          >>> maps.weights.shape, maps.index_scores.shape
          ((1, 2, 8, 8), (1, 8, 8))
        """
        tokens = self.check_inputs(tokens, keys, positions, attention, None, None, None)
        count = self.config.num_hidden_layers
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not -count <= layer < count:
            raise ValueError(f"layer must be an integer from {-count} to {count - 1}, got {layer!r}")
        keys = KeyRange.causal(*tokens.shape) if keys is None else keys
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
        self._check_values(tokens, keys, None)
        x, rotation = self.embed(tokens), rope_rotation(positions, self.config)
        layers, shared = self.layers(), None
        options = ("attention", attention), ("return_selected", bool(self.config.indexer_types))
        for below in itertools.islice(layers, int(layer) % count):
            taken = None if below.self_attn.indexer is not None else shared
            x, made = _run_layer(*nnx.split(below), x, taken, rotation, keys, options)
            shared = made if taken is None else shared
        last = next(layers)
        taken = None if last.self_attn.indexer is not None else shared
        return _map_layer(*nnx.split(last), x, taken, rotation, keys, attention)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up the tokens' embeddings, in the compute dtype; on a mesh, those of this shard's tokens."""
        table = gather_parameters({"embed_tokens": self.embed_tokens[...]}, whole=False)["embed_tokens"]

        def look_up(tokens):
            if num_shards("vocabulary") == 1:
                return table[tokens].astype(self.config.dtype)
            row = tokens - shard_index("vocabulary") * table.shape[0]
            is_local = (row >= 0) & (row < table.shape[0])
            return jnp.where(is_local[..., None], table[jnp.where(is_local, row, 0)], 0.0).astype(self.config.dtype)

        return sum_shards(exchange_columns(look_up, tokens), "vocabulary")

    def stacks(self) -> list[tuple[Any, StackedLayers]]:
        """Lists the layers as they are stored: each stack's module, and which layers it holds."""
        return [(getattr(self, stacked.name), stacked) for stacked in stacked_layers(self.config)]

    def check_inputs(self, tokens, keys, positions, attention, selected, routed, cache) -> Int[Array, "B T"]:
        """Returns the tokens as an array; raises ValueError unless everything fits the model and each other."""
        tokens = _as_tokens(tokens)
        batch, length = tokens.shape
        limit = self.config.max_position_embeddings if cache is None else cache.size
        if length > limit and not isinstance(cache, Pages):
            where = "max_position_embeddings" if cache is None else "the cache"
            raise ValueError(f"tokens must be at most {limit} long to fit {where}, got {length}")
        if attention not in ("sparse", "dense"):
            raise ValueError(f"attention must be 'sparse' or 'dense', got {attention!r}")
        if attention == "dense" and selected is not None:
            raise ValueError("selected needs attention='sparse', got attention='dense'")
        if keys is not None:
            check_keys(keys, batch, length)
        if positions is not None and positions.shape != (batch, length):
            raise ValueError(f"positions must be [{batch}, {length}] like tokens, got shape {positions.shape}")
        if isinstance(cache, Pages):
            if keys is None or positions is None:
                raise ValueError("with Pages, keys and positions must be given: pages do not say where tokens stand")
        elif num_shards("sequence") > 1 and (keys is None or positions is None or cache is not None):
            raise ValueError(
                "where the sequence is sharded, keys and positions must be given, and no cache but Pages: "
                "a shard's tokens say nothing of their places"
            )
        if cache is None and length % num_shards("heads"):
            raise ValueError(
                f"where heads are sharded, a shard's tokens must be a multiple of the {num_shards('heads')} shards "
                f"that share them out, got {length}"
            )
        layers = self.config.num_hidden_layers
        if selected is not None and (selected.ndim != 4 or selected.shape[:3] != (layers, batch, length)):
            raise ValueError(f"selected must be [{layers}, {batch}, {length}, K], got shape {selected.shape}")
        slots = self.config.num_moe_layers, batch, length, self.config.num_experts_per_tok
        if routed is not None and routed.shape != slots:
            raise ValueError(f"routed must be {list(slots)}, got shape {routed.shape}")
        if cache is not None:
            _check_cache(cache, self.config, batch, length)
        return tokens

    def _check_values(self, tokens, keys, cache):
        """Checks token ids and the cache's room where values are known: outside `jit`, on one host."""
        ids = _known(tokens)
        if ids is not None and ids.size and (ids.min() < 0 or ids.max() >= self.config.vocab_size):
            raise ValueError(f"tokens must lie in [0, {self.config.vocab_size}), got {ids.min()} … {ids.max()}")
        if cache is None or cache.lengths is None:
            return
        lengths, real = _known(cache.lengths), _known(keys.nonempty())
        if lengths is not None and real is not None and (lengths + real.sum(1)).max(initial=0) > cache.size:
            raise ValueError(f"the cache holds {cache.size} tokens a row, got {lengths} and {real.sum(1)} more")


@jax.custom_vjp
def _unembed(hidden, weight):
    return contract("td,dv->tv", hidden, weight.astype(hidden.dtype))


def _unembed_backward(residuals, d_logits):
    """Products in the dtype of `hidden`; the transpose would be in float32 throughout, as the logits are."""
    hidden, weight = residuals
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = contract("tv,dv->td", d_logits, weight.astype(hidden.dtype))
    return d_hidden.astype(hidden.dtype), contract("td,tv->dv", hidden, d_logits).astype(weight.dtype)


_unembed.defvjp(lambda hidden, weight: (_unembed(hidden, weight), (hidden, weight)), _unembed_backward)


def _check_cache(cache, config, batch, length):
    """Raises ValueError unless the cache is one of this model, for this many rows."""
    if isinstance(cache, Pages):
        dtype = "fp8" if cache.latents.dtype == jnp.uint8 else str(cache.latents.dtype)
        predicting = cache.latents.shape[0] != config.num_hidden_layers
        latents, index_keys = page_shapes(config, cache.latents.shape[1], dtype, predicting=predicting)
        table = jax.ShapeDtypeStruct((batch, *cache.table.shape[1:]), jnp.int32)
        slots = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        expected = dict(latents=latents, index_keys=index_keys, table=table, slots=slots)
    else:
        predicting = cache.kv.shape[0] != config.num_hidden_layers
        expected = vars(jax.eval_shape(lambda: Cache.empty(config, batch, cache.size, predicting=predicting)))
    for name, wanted in expected.items():
        found = getattr(cache, name)
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"the cache's {name} must be {wanted.dtype} {wanted.shape}, got {found.dtype} {found.shape}: "
                "make it from the model's config"
            )


def _gathered(module):
    """Returns the module with its parameters gathered."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, gather_parameters(state))


def _as_tokens(tokens):
    """Returns token ids as an array [B, T]; lists of lists are taken too.

    Raises:
      ValueError: for anything that is no rectangle of integers.
    """
    if not hasattr(tokens, "ndim"):
        try:
            tokens = np.asarray(tokens)
        except ValueError:  # rows of different lengths
            raise ValueError("tokens must be integers [B, T], got rows of different lengths: pad them") from None
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or not tokens.shape[1]:
        raise ValueError(f"tokens must be integers [B, T], T at least 1, got {tokens.dtype} {tokens.shape}")
    return jnp.asarray(tokens)


def _known(x):
    """Returns an array's value on the host, None where it is traced or spread over hosts."""
    if isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


@functools.partial(jax.jit, static_argnums=(0, 6))
def _run_layer(graph, state, x, shared, rotation, keys, options):
    out = nnx.merge(graph, state)(x, rotation, keys, shared=shared, return_indexer_kl=False, **dict(options))
    return out.x, out.shared


@functools.partial(jax.jit, static_argnums=(0, 6))
def _map_layer(graph, state, x, shared, rotation, keys, attention):
    layer = nnx.merge(graph, state)
    options = dict(shared=shared, attention=attention)
    return layer.self_attn.attention_maps(layer.input_layernorm(x), rotation, keys, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_compiled(graph, options, state, inputs):
    return nnx.merge(graph, state)._run(*inputs, dict(options))
