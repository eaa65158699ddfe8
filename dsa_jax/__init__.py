"""DeepSeek Sparse Attention for JAX."""

from dsa_jax.attention import attention_target, sparse_attention
from dsa_jax.cache import Cache
from dsa_jax.config import Config, YaRN
from dsa_jax.dense_attention import latent_attention, multihead_attention
from dsa_jax.hf.convert import convert_hf, load_hf, save_hf, to_hf
from dsa_jax.indexer import LightningIndexer, index_scores
from dsa_jax.indexer_loss import dense_indexer_kl, sparse_indexer_kl
from dsa_jax.inference.generate import generate
from dsa_jax.key_range import KeyRange
from dsa_jax.layers import SparseMLA
from dsa_jax.model import Output, Transformer, forward_on_mesh
from dsa_jax.parallel.sharding import make_mesh
from dsa_jax.quantization import hadamard, quantize, straight_through_quantize
from dsa_jax.selection import select_keys, select_topk

__all__ = [
    "Cache",
    "Config",
    "KeyRange",
    "LightningIndexer",
    "Output",
    "SparseMLA",
    "Transformer",
    "YaRN",
    "attention_target",
    "convert_hf",
    "dense_indexer_kl",
    "forward_on_mesh",
    "generate",
    "hadamard",
    "index_scores",
    "latent_attention",
    "load_hf",
    "make_mesh",
    "multihead_attention",
    "quantize",
    "save_hf",
    "select_keys",
    "select_topk",
    "sparse_attention",
    "sparse_indexer_kl",
    "straight_through_quantize",
    "to_hf",
]
