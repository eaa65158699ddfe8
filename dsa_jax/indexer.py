"""The lightning indexer: a cheap score of every earlier token for each query (Eq. 1 of DeepSeek-V3.2-Exp)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsa_jax.blockwise import accumulator, contract, join_queries, map_rows, split_queries
from dsa_jax.config import Config
from dsa_jax.key_range import KeyRange, check_keys
from dsa_jax.nn import LayerNorm, new_weight, project, show_arguments
from dsa_jax.pallas_kernels import Implementation, choose_implementation
from dsa_jax.pallas_kernels import index_scores as scores_kernels
from dsa_jax.quantization import hadamard
from dsa_jax.rope import rotate_half_split, rotate_interleaved

# A score's bits must not depend on what is computed beside it, so every product has one shape: these tiles, padded.
QUERY_TILE = 16
KEY_TILE = 512
KEY_NORM_EPS = 1e-6  # of the index key's norm, whatever the config says of the others
INDEX_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, np.float64)


def index_scores(
    q_index: Float[Array, "B T J E"],
    k_index: Float[Array, "B S E"],
    weights: Float[Array, "B T J"],
    keys: KeyRange,
    *,
    k_scale: Float[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T S"]:
    """Scores every reachable key for every query: I[t,s] = k_scale[s] · Σ_j w[t,j] · relu(q[t,j] · k[s])  (Eq. 1).

    The result is T × S: for long sequences use `select_keys`, which keeps no more than a block of it.

    Args:
      q_index: index queries, float32, bfloat16, e4m3 or, by XLA alone, float64.
      k_index: index keys, one a token, shared by the J heads, in the dtype of `q_index`.
      weights: float32 head weights, the scale of an e4m3 query included.
      keys: the keys that each query may reach; the others score -inf. Keys that no query of their row reaches may be
        NaN.
      k_scale: the scale of e4m3 keys, 1 if None.
      implementation: None, "xla" or "pallas".

    Returns:
      float32 scores, products and sums in float32; float64 for float64. The bits of a score depend on its own query,
      key and weights alone.

    Raises:
      ValueError: if shapes or dtypes do not fit together, or "pallas" has no kernel for them.

    References:
      DeepSeek-V3.2-Exp, section 1, Eq. 1.
    """
    q_index, k_index, weights, k_scale = check_index_inputs(q_index, k_index, weights, keys, k_scale)
    arrays = q_index, k_index, weights, keys.start, keys.stop, k_scale
    score = choose_implementation(
        "index_scores",
        implementation,
        scores_kernels.why_not(*arrays),
        xla=_tiled_scores,
        pallas=scores_kernels.index_scores,
    )
    return score(*arrays) if score is _tiled_scores else _with_gradient(score, *arrays)


def _tiled_scores(q_index, k_index, weights, start, stop, k_scale):
    return map_score_tiles(lambda scores: scores, q_index, k_index, weights, KeyRange(start, stop), k_scale)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient(score, *arrays):
    """Scores by a function without a gradient, for which the definition's is taken."""
    return score(*arrays)


_with_gradient.defvjp(
    lambda score, *arrays: (score(*arrays), arrays),
    lambda _, arrays, d_scores: jax.vjp(_tiled_scores, *arrays)[1](d_scores),
)


def check_index_inputs(q_index, k_index, weights, keys, k_scale):
    """Checks shapes and dtypes before any work and fills in a missing `k_scale`; NumPy arrays become JAX arrays."""
    q_index, k_index, weights = jnp.asarray(q_index), jnp.asarray(k_index), jnp.asarray(weights)
    if q_index.ndim != 4:
        raise ValueError(f"q_index must be [B, T, J, E], got shape {q_index.shape}")
    batch, length, heads, dim = q_index.shape
    if k_index.ndim != 3 or k_index.shape[0] != batch or k_index.shape[2] != dim or k_index.shape[1] < 1:
        raise ValueError(f"k_index must be [{batch}, S, {dim}] like q_index {q_index.shape}, got shape {k_index.shape}")
    if k_index.dtype != q_index.dtype or q_index.dtype not in INDEX_DTYPES:
        raise ValueError(
            "q_index and k_index must have one dtype, float32, bfloat16, float8_e4m3fn or float64, "
            f"got {q_index.dtype} and {k_index.dtype}"
        )
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"weights must be floating point, got {weights.dtype}")
    if weights.shape != (batch, length, heads):
        raise ValueError(f"weights must be [{batch}, {length}, {heads}] like q_index, got shape {weights.shape}")
    check_keys(keys, batch, length)
    size = k_index.shape[1]
    k_scale = jnp.ones((batch, size), accumulator(q_index)) if k_scale is None else jnp.asarray(k_scale)
    if not jnp.issubdtype(k_scale.dtype, jnp.floating):
        raise ValueError(f"k_scale must be floating point, got {k_scale.dtype}")
    if k_scale.shape != (batch, size):
        raise ValueError(f"k_scale must be [{batch}, {size}] like k_index, got shape {k_scale.shape}")
    wide = accumulator(q_index)
    return q_index, k_index, weights.astype(wide), k_scale.astype(wide)


def map_score_tiles(fn, q_index, k_index, weights, keys, k_scale):
    """Scores a tile of queries at a time and applies `fn` to its scores [QUERY_TILE, S]; the results are [B, T, …]."""
    size = k_index.shape[1]

    def row(arguments):
        q_index, k_index, weights, start, stop, k_scale = arguments
        key_tiles = _split_key_tiles(k_index, k_scale, KeyRange(start[None], stop[None]).reached(size)[0])
        queries = split_queries((q_index, weights, start, stop), QUERY_TILE)
        return join_queries(jax.lax.map(lambda tile: fn(_score_tile(tile, key_tiles, size)), queries), q_index.shape[0])

    return map_rows(row, (q_index, k_index, weights, keys.start, keys.stop, k_scale))


def _split_key_tiles(k_index, k_scale, reached):
    """Cuts one row's keys into tiles; unreached keys are zeroed first, since relu's gradient at NaN is NaN."""
    k_index = jnp.where(reached[:, None], k_index, 0)
    return split_queries((k_index, jnp.where(reached, k_scale, 0)), KEY_TILE)


def _score_tile(queries, key_tiles, size):
    """Scores one tile of queries against all key tiles of its row: [QUERY_TILE, size], -inf out of reach."""
    q_index, weights, start, stop = queries

    @jax.checkpoint
    def score(tile):
        k_index, k_scale = tile
        # The barrier keeps neighbouring code from being fused in, which could change how the sum over heads rounds.
        return jax.lax.optimization_barrier(head_sum(q_index, k_index, weights) * k_scale)

    scores = jnp.moveaxis(jax.lax.map(score, key_tiles), 0, 1).reshape(q_index.shape[0], -1)[:, :size]
    return jnp.where(KeyRange(start, stop).contains(jnp.arange(size)), scores, -jnp.inf)


def head_sum(q_index, k_index, weights):
    """Sums over index heads, Σ_j w[t,j] · relu(q[t,j] · k), in float32.

    `k_index` is [s, E], or [t, s, E] where each query has keys of its own.
    """
    logits = contract("tje,se->tjs" if k_index.ndim == 2 else "tje,tse->tjs", widen(q_index), widen(k_index))
    return jnp.sum(relu(logits) * weights[..., None], axis=1)


def relu(x):
    """Computes max(x, 0) and keeps NaN: XLA's own maximum may drop it, and hide that a run has diverged."""
    return jnp.where(x <= 0, 0.0, x)


def widen(x):
    """Casts FP8 to float32, where the product of two e4m3 numbers is exact; leaves other types as they are."""
    return x.astype(jnp.float32) if x.dtype.itemsize == 1 else x


@show_arguments
class LightningIndexer(nnx.Module):
    """Makes the index queries, keys and head weights of one layer, as the indexer was corrected in November 2025.

    The rotary columns come first here and last in the attention. Here the two columns of a rotary pair stand half the
    width apart, there side by side: a wrong layout goes unnoticed while all keys are selected, and ruins retrieval.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        heads, dim = config.index_n_heads, config.index_head_dim
        self.config = config
        self.wq_b = new_weight(config, rngs, config.q_lora_rank, heads, dim)
        self.wk = new_weight(config, rngs, config.hidden_size, dim)
        self.k_norm = LayerNorm(dim, KEY_NORM_EPS, config.param_dtype)
        self.weights_proj = new_weight(config, rngs, config.hidden_size, heads)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q_latent: Float[Array, "B T Q"],
        rotation: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    ) -> tuple[Float[Array, "B T J E"], Float[Array, "B T E"], Float[Array, "B T J"]]:
        """Projects hidden states and query latents to the indexer's inputs.

        Args:
          x: normalised hidden states, detached by the caller.
          q_latent: MLA's query latent after its norm, detached by the caller.
          rotation: cosines and sines, from `rope.rotation`.

        Returns:
          q_index and k_index in the dtype of `x`, Hadamard-transformed and so ready to be quantised under `index_fp8`;
          float32 weights, J^-0.5 · E^-0.5 included.
        """
        with jax.named_scope("indexer"):
            q_index = project("btq,qje->btje", q_latent, self.wq_b[...])
            k_index = self.k_norm(checkpoint_name(project("btd,de->bte", x, self.wk[...]), "latents"))
            q_index, k_index = self._rotate(q_index, rotation), self._rotate(k_index, rotation)
            if self.config.index_fp8:
                q_index, k_index = hadamard(q_index), hadamard(k_index)
            q_index = checkpoint_name(q_index, "queries")
            weights = checkpoint_name(project("btd,dj->btj", x.astype(jnp.float32), self.weights_proj[...]), "latents")
            return q_index, k_index, weights * (self.config.index_n_heads * self.config.index_head_dim) ** -0.5

    def _rotate(self, x, rotation):
        rotate = rotate_interleaved if self.config.index_rope_interleave else rotate_half_split
        rope, rest = jnp.split(x, [self.config.qk_rope_head_dim], axis=-1)
        return jnp.concatenate([rotate(rope, *rotation), rest], axis=-1)
