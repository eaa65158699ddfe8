"""The lightning indexer: which earlier tokens matter to a query, scored cheaply (Eq. 1 of DeepSeek-V3.2-Exp)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsa_jax.blockwise import contract, join_queries, map_rows, project, split_queries
from dsa_jax.config import Config
from dsa_jax.key_range import KeyRange
from dsa_jax.pallas_kernels.dispatch import choose_implementation
from dsa_jax.pallas_kernels.index_scores import forward as scores_kernel
from dsa_jax.quantization import hadamard
from dsa_jax.rope import rotate_half_split, rotate_interleaved

# A score's bits must not depend on what is computed beside it, so every product has one shape: these tiles, padded.
QUERY_TILE = 16
KEY_TILE = 512
NORM_EPS = 1e-6
INDEX_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn)


def index_scores(
    q_index: Float[Array, "B T J E"],
    k_index: Float[Array, "B S E"],
    weights: Float[Array, "B T J"],
    keys: KeyRange,
    *,
    k_scale: Float[Array, "B S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T S"]:
    """Scores every reachable key for every query: I[t,s] = k_scale[s] · Σ_j w[t,j] · relu(q[t,j] · k[s])  (Eq. 1).

    The result is T × S: for long sequences use `select_keys`, which keeps no more than a block of it.

    Args:
      q_index: index queries, float32, bfloat16 or e4m3.
      k_index: index keys, one a token, shared by the J heads.
      weights: float32 head weights, the scale of an e4m3 query included.
      keys: which keys each query may reach; the others score -inf. Keys that no query of their row reaches may be NaN.
      k_scale: the scale of e4m3 keys.
      implementation: None, "xla" or "pallas".

    Returns:
      float32 scores, products and sums in float32. The bits of a score depend on its own query, key and weights alone.
    """
    q_index, k_index, weights, k_scale = check_index_inputs(q_index, k_index, weights, keys, k_scale)
    arrays = q_index, k_index, weights, keys.start, keys.stop, k_scale
    score = choose_implementation(
        "index_scores",
        implementation,
        scores_kernel.why_not(*arrays),
        xla=_tiled_scores,
        pallas=scores_kernel.index_scores,
    )
    return score(*arrays) if score is _tiled_scores else _with_gradient(score, *arrays)


def _tiled_scores(q_index, k_index, weights, start, stop, k_scale):
    return map_score_tiles(lambda scores: scores, q_index, k_index, weights, KeyRange(start, stop), k_scale)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient(score, *arrays):
    """Scores by a function that knows no gradient; the definition's is taken."""
    return score(*arrays)


_with_gradient.defvjp(
    lambda score, *arrays: (score(*arrays), arrays),
    lambda _, arrays, d_scores: jax.vjp(_tiled_scores, *arrays)[1](d_scores),
)


def check_index_inputs(q_index, k_index, weights, keys, k_scale):
    """Compares shapes before any work and fills in a missing `k_scale`; NumPy arrays become JAX arrays."""
    q_index, k_index, weights = jnp.asarray(q_index), jnp.asarray(k_index), jnp.asarray(weights)
    if q_index.ndim != 4:
        raise ValueError(f"q_index must be [B, T, J, E], got shape {q_index.shape}")
    batch, length, heads, dim = q_index.shape
    if k_index.ndim != 3 or k_index.shape[0] != batch or k_index.shape[2] != dim or k_index.shape[1] < 1:
        raise ValueError(f"k_index must be [{batch}, S, {dim}] like q_index {q_index.shape}, got shape {k_index.shape}")
    if k_index.dtype != q_index.dtype or q_index.dtype not in INDEX_DTYPES:
        raise ValueError(
            "q_index and k_index must have one dtype, float32, bfloat16 or float8_e4m3fn, "
            f"got {q_index.dtype} and {k_index.dtype}"
        )
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(f"weights must be floating point, got {weights.dtype}")
    if weights.shape != (batch, length, heads):
        raise ValueError(f"weights must be [{batch}, {length}, {heads}] like q_index, got shape {weights.shape}")
    check_keys(keys, batch, length)
    size = k_index.shape[1]
    k_scale = jnp.ones((batch, size), jnp.float32) if k_scale is None else jnp.asarray(k_scale)
    if not jnp.issubdtype(k_scale.dtype, jnp.floating):
        raise ValueError(f"k_scale must be floating point, got {k_scale.dtype}")
    if k_scale.shape != (batch, size):
        raise ValueError(f"k_scale must be [{batch}, {size}] like k_index, got shape {k_scale.shape}")
    return q_index, k_index, weights.astype(jnp.float32), k_scale.astype(jnp.float32)


def check_keys(keys: KeyRange, batch: int, length: int) -> None:
    """Raises ValueError unless the key range has one interval for each of `batch` × `length` queries."""
    if keys.start.shape != (batch, length) or keys.stop.shape != (batch, length):
        raise ValueError(
            f"keys must hold start and stop of shape [{batch}, {length}], one for each query, "
            f"got {keys.start.shape} and {keys.stop.shape}"
        )


def map_score_tiles(fn, q_index, k_index, weights, keys, k_scale):
    """Scores a tile of queries at a time and applies `fn` to its scores [QUERY_TILE, S]: [B, T, …]."""
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
    """Σ_j w[t,j] · relu(q[t,j] · k) in float32; `k_index` is [s, E], or [t, s, E] where each query has its own keys."""
    logits = contract("tje,se->tjs" if k_index.ndim == 2 else "tje,tse->tjs", widen(q_index), widen(k_index))
    return jnp.sum(relu(logits) * weights[..., None], axis=1)


def relu(x):
    """max(x, 0) that keeps NaN everywhere: XLA's own maximum may drop it, and hide that a run has diverged."""
    return jnp.where(x <= 0, 0.0, x)


def widen(x):
    """FP8 as float32, where the product of two e4m3 numbers is exact; other types as they are."""
    return x.astype(jnp.float32) if x.dtype.itemsize == 1 else x


def new_weight(config: Config, rngs: nnx.Rngs, *shape: int) -> nnx.Param[Array]:
    """A parameter drawn from a normal distribution of the configured width."""
    return nnx.Param(jax.nn.initializers.normal(config.initializer_range)(rngs.params(), shape, config.param_dtype))


class LayerNorm(nnx.Module):
    """Layer normalisation with weight and bias, computed in float32."""

    def __init__(self, dim: int, dtype: str):
        self.weight = nnx.Param(jnp.ones(dim, dtype))
        self.bias = nnx.Param(jnp.zeros(dim, dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis; the result has the dtype of `x`."""
        centred = x.astype(jnp.float32) - jnp.mean(x, axis=-1, keepdims=True, dtype=jnp.float32)
        normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + NORM_EPS)
        return (normal * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class LightningIndexer(nnx.Module):
    """Makes the index queries, keys and head weights of one layer (the corrected indexer of November 2025).

    The rotary columns come first here and last in the attention; they are half-split here and interleaved there.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        heads, dim = config.index_n_heads, config.index_head_dim
        self.config = config
        self.wq_b = new_weight(config, rngs, config.q_lora_rank, heads, dim)
        self.wk = new_weight(config, rngs, config.hidden_size, dim)
        self.k_norm = LayerNorm(dim, config.param_dtype)
        self.weights_proj = new_weight(config, rngs, config.hidden_size, heads)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q_latent: Float[Array, "B T Q"],
        rotation: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    ) -> tuple[Float[Array, "B T J E"], Float[Array, "B T E"], Float[Array, "B T J"]]:
        """Returns `q_index`, `k_index` in the dtype of `x` and float32 `weights` (J^-0.5 · E^-0.5 included).

        With `index_fp8` queries and keys are Hadamard-transformed, ready to be quantised.
        """
        with jax.named_scope("indexer"):
            q_index = project("btq,qje->btje", q_latent, self.wq_b[...])
            k_index = self.k_norm(project("btd,de->bte", x, self.wk[...]))
            q_index, k_index = self._rotate(q_index, rotation), self._rotate(k_index, rotation)
            if self.config.index_fp8:
                q_index, k_index = hadamard(q_index), hadamard(k_index)
            weights = project("btd,dj->btj", x.astype(jnp.float32), self.weights_proj[...])
            return q_index, k_index, weights * (self.config.index_n_heads * self.config.index_head_dim) ** -0.5

    def _rotate(self, x, rotation):
        rotate = rotate_interleaved if self.config.index_rope_interleave else rotate_half_split
        rope, rest = jnp.split(x, [self.config.qk_rope_head_dim], axis=-1)
        return jnp.concatenate([rotate(rope, *rotation), rest], axis=-1)
