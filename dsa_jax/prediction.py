"""Multi-token prediction: layers past the last, each of which predicts a token further ahead than the one before.

Layer k (from 1) joins what the depth before knows of token i with the token k places behind it:

    h'_k[i] = W_k [RMSNorm_e(embed(t[i + k])); RMSNorm_h(h_{k-1}[i])],   h_k[i] = RMSNorm_k(Block_k(h'_k)[i])

where h_0 is `Output.hidden` and the block a decoder layer with an indexer of its own. The model's unembedding makes of
h_k[i] the logits of t[i + k + 1]. Published checkpoints join the embedding first and the hidden state second, and hand
on hidden states after the norm, which the paper leaves open.

References:
  DeepSeek-V3, arXiv:2412.19437, section 2.2 (Eqs. 21–25); arXiv:2404.19737 (prediction of several tokens).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsa_jax.config import Config
from dsa_jax.decoder import DecoderLayer, stack_modules
from dsa_jax.key_range import KeyRange
from dsa_jax.layers import LayerOutput, Rotation
from dsa_jax.nn import RMSNorm, new_weight, project, show_arguments
from dsa_jax.parallel.collectives import gather_parameters, gather_sequence, take_sequence
from dsa_jax.remat import remat_policy
from dsa_jax.stacks import prediction_stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predicted:
    """Holds the results of n prediction layers, of which layer k, from 1, predicts the token k + 1 places ahead.

    Attributes:
      hidden: [n, B, T, D] after each layer's norm, for `Transformer.unembed`.
      valid: bool [n, B, T]: the token k places ahead is there, and of the same document.
      indexer_kl: float32 [n, B, T], if it was asked for; 0 where not `valid`.
      expert_load: float32 [n, X], or [0, X] if the layers have no experts; of what is `valid`.
    """

    hidden: Array
    valid: Array
    indexer_kl: Array | None
    expert_load: Array


@show_arguments
class PredictionLayer(DecoderLayer):
    """A decoder layer on the joined embedding of a token and hidden state of an earlier one."""

    def __init__(self, config: Config, *, moe: bool, rngs: nnx.Rngs):
        dim, eps, dtype = config.hidden_size, config.rms_norm_eps, config.param_dtype
        super().__init__(config, moe=moe, rngs=rngs)
        self.enorm, self.hnorm = RMSNorm(dim, eps, dtype), RMSNorm(dim, eps, dtype)
        self.eh_proj = new_weight(config, rngs, 2 * dim, dim)
        self.norm = RMSNorm(dim, eps, dtype)

    def predict(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        rotation: Rotation,
        keys: KeyRange,
        **options: Any,
    ) -> LayerOutput:
        """Applies the layer.

        Args:
          hidden: of the depth before.
          embedded: the embedding of the token that each row joins to it.
          rotation, keys, options: as `DecoderLayer` takes them.

        Returns:
          a `LayerOutput`, `x` after the norm.
        """
        with jax.named_scope("join"):
            joined = jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1)
            x = project("bte,ed->btd", joined, self.eh_proj[...])
        out = self(x, rotation, keys, **options)
        return dataclasses.replace(out, x=self.norm(out.x))


def stack_predictions(config: Config, *, rngs: nnx.Rngs) -> Any:
    """Makes the stacked prediction layers of a model, None if it has none."""
    stacked = prediction_stack(config)
    if stacked is None:
        return None
    return stack_modules(lambda rngs: PredictionLayer(config, moe=stacked.moe, rngs=rngs), stacked.count, rngs)


def tokens_ahead(tokens: Int[Array, "B T"], keys: KeyRange, depths: int) -> tuple[Int[Array, "n B T"], KeyRange]:
    """Takes for each depth k, from 1, the token k places behind each, and the keys that a query then may reach.

    Where there is none in the same document, which is where query i + k does not reach key i, the range is empty and
    the token 0. On a mesh tokens are this shard's, as are the results.

    Args:
      tokens: ids.
      keys: causal ranges of the tokens themselves, with no cache before them.
      depths: n.

    Examples:
      >>> ids, keys = tokens_ahead(jnp.array([[5, 6, 7, 8]]), KeyRange.packed(jnp.array([[0, 0, 0, 1]])), 2)
      >>> ids.tolist(), keys.nonempty().tolist()
      ([[[6, 7, 0, 0]], [[7, 0, 0, 0]]], [[[True, True, False, False]], [[True, False, False, False]]])
    """
    tokens, start, stop = (gather_sequence(x) for x in (tokens, keys.start, keys.stop))
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    found = []
    for depth in range(1, depths + 1):
        ahead = [_shift(x, depth) for x in (tokens, start, stop)]
        valid = (start < stop) & (ahead[1] <= column) & (column < ahead[2])
        found.append((jnp.where(valid, ahead[0], 0), start, jnp.where(valid, stop, start)))
    ids, start, stop = (jnp.stack([take_sequence(x) for x in each]) for each in zip(*found, strict=True))
    return ids, KeyRange(start, stop)


def shift_tokens(x: Array, count: int) -> Array:
    """Takes for each token what the one `count` places behind it has, [B, T] of this shard; 0 past the last."""
    return take_sequence(_shift(gather_sequence(x), count))


def _shift(x, count):
    """Moves the columns of whole sequences to the left."""
    count = min(count, x.shape[1])
    return jnp.pad(x[:, count:], ((0, 0), (0, count)))


def scan_predictions(stack: Any, hidden, embedded, rotation, keys: KeyRange, options: dict[str, Any]) -> Predicted:
    """Runs the prediction layers one after the other, each rematerialised: of `embedded` and `keys` one a layer."""
    graph, state = nnx.split(stack)
    config = stack.self_attn.config
    wanted = {name: options[name] for name in ("attention", "return_indexer_kl")}

    def run(hidden, state, embedded, keys):
        layer = nnx.merge(graph, gather_parameters(state, dtype=config.dtype))
        out = layer.predict(hidden, embedded, rotation, keys, **wanted)
        return out.x, (out.x, out.indexer_kl, out.expert_load)

    run = jax.checkpoint(run, policy=remat_policy(options["keep"]))
    _, (hidden, kl, load) = jax.lax.scan(lambda x, layer: run(x, *layer), hidden, (state, embedded, keys))
    if load is None:
        load = jnp.zeros((0, config.n_routed_experts), jnp.float32)
    return Predicted(hidden, keys.nonempty(), kl, load)
