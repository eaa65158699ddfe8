"""How much a cache takes: the shapes of its pools, the bytes of a token, and the pages that memory has room for."""

import math

import jax
import jax.numpy as jnp

from dsa_jax import paged
from dsa_jax.config import Config

USABLE_FRACTION = 0.9  # of the free memory: the rest is for what the compiler makes and for fragments


def cached_layers(config: Config, predicting: bool) -> tuple[int, int]:
    """Counts the layers that have latents in a cache, and those that have index keys, or compressed entries, there.

    Args:
      config: the model's.
      predicting: whether prediction layers are among them, behind the model's own.
    """
    more = config.num_nextn_predict_layers if predicting else 0
    indexers = config.num_hidden_layers if config.baseline == "nsa" else config.num_index_layers
    return config.num_hidden_layers + more, indexers + more


def page_shapes(
    config: Config, pages: int, format: str, *, predicting: bool = False
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Gives the shapes of a pool of latents and of one of index keys, or of compressed entries under baseline "nsa".

    Args:
      config: the model's. Index keys are FP8 under `index_fp8`, else in the dtype of the format.
      pages: how many pages of each layer.
      format: "float32", "bfloat16" or "fp8", of the latents.
      predicting: whether there are pages of prediction layers.

    Raises:
      ValueError: for another format, where "fp8" is asked of a model without `index_fp8`, or where blocks of "nsa" do
        not divide pages: in a row of several sequences these would lie elsewhere than alone.
    """
    if format not in ("float32", "bfloat16", "fp8"):
        raise ValueError(f"the cache's format must be 'float32', 'bfloat16' or 'fp8', got {format!r}")
    if format == "fp8" and not config.index_fp8:
        raise ValueError("the cache's format 'fp8' needs a model with index_fp8=True, got index_fp8=False")
    value_dim, dim = config.kv_lora_rank, config.index_head_dim
    if format == "fp8":
        latent = paged.latent_bytes(value_dim, config.qk_rope_head_dim), jnp.uint8
    else:
        latent = config.latent_dim, jnp.dtype(format)
    if config.baseline == "nsa":
        if paged.PAGE % config.nsa.block:
            raise ValueError(f"nsa block must divide the {paged.PAGE} tokens of a page, got {config.nsa.block}")
        index = paged.PAGE // config.nsa.stride, *latent
    else:
        rows = paged.index_page_rows(dim, config.index_fp8)
        index = rows, dim, jnp.float8_e4m3fn if config.index_fp8 else jnp.dtype(format)
    layers, indexers = cached_layers(config, predicting)
    return (
        jax.ShapeDtypeStruct((layers, pages, paged.PAGE, latent[0]), latent[1]),
        jax.ShapeDtypeStruct((indexers, pages, *index[:2]), index[2]),
    )


def token_bytes(config: Config, format: str) -> int:
    """Counts the bytes of cache that a token takes in one layer with an indexer, or entries, scales included.

    Examples:
      >>> from dsa_jax import Config
      >>> token_bytes(Config.deepseek_v32(index_fp8=True), "fp8")
      788
      >>> token_bytes(Config.deepseek_v32(), "bfloat16")
      1408
    """
    return math.ceil(sum(_page_bytes(config, format)) / paged.PAGE)


def cache_token_bytes(config: Config, format: str, *, predicting: bool = False) -> int:
    """Counts the bytes of cache that a token takes in all layers; those that share a selection have no index keys.

    Prediction layers count if `predicting`. Of a compressed entry it is a token's share, rounded up.

    Examples:
      >>> from dsa_jax import Config
      >>> cache_token_bytes(Config.deepseek_v32(index_fp8=True), "fp8") == 61 * 788
      True
    """
    latents, index_keys = _page_bytes(config, format)
    layers, indexers = cached_layers(config, predicting)
    return math.ceil((layers * latents + indexers * index_keys) / paged.PAGE)


def pages_that_fit(
    config: Config, *, format: str, batch: int, length: int, memory: int, predicting: bool = False
) -> int:
    """Counts the pages of all layers that fit into `memory` bytes, beside the index scores of a decode step.

    Args:
      config: the model's.
      format: of the latents.
      batch: tokens of a decode step, each with float32 scores of `length` keys: rows, or times their drafts and one.
      length: the longest sequence, in tokens.
      memory: the free bytes, of which a tenth is left alone.
      predicting: whether pages have entries of prediction layers.

    Raises:
      ValueError: if not even one page fits.
    """
    scores = 4 * batch * length
    page = paged.PAGE * cache_token_bytes(config, format, predicting=predicting)
    pages = int((USABLE_FRACTION * memory - scores) // page)
    if pages < 1:
        raise ValueError(
            f"a page takes {page:,} bytes beside {scores:,} bytes of index scores, "
            f"got {memory:,} bytes of memory, of which {USABLE_FRACTION:.0%} is used"
        )
    return pages


def _page_bytes(config, format):
    """Counts the bytes of one page of latents and of one of index keys, scales included."""
    return [math.prod(x.shape[1:]) * x.dtype.itemsize for x in page_shapes(config, 1, format)]
