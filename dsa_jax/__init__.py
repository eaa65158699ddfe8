"""DeepSeek Sparse Attention for JAX.

The mechanism is a handful of functions: `index_scores`, `select_topk`, `select_keys`, `sparse_attention`, and the
indexer's losses. The model around it, its checkpoints and generation are `Transformer`, `load_hf`, `save_hf` and
`generate`; `train` trains it.
"""

from dsa_jax.attention import attention_target, sparse_attention
from dsa_jax.baselines import (
    BlockMLA,
    NativeSparseMLA,
    WindowMLA,
    compress_keys,
    native_sparse_attention,
    select_blocks,
    span_attention,
    window_selection,
)
from dsa_jax.cache import Cache
from dsa_jax.config import Config, YaRN
from dsa_jax.dense_attention import latent_attention, multihead_attention
from dsa_jax.hf.convert import convert_hf, load_hf, save_hf, to_hf
from dsa_jax.indexer import LightningIndexer, index_scores
from dsa_jax.indexer_loss import dense_attention_target, dense_indexer_kl, sparse_indexer_kl
from dsa_jax.inference.engine import Engine
from dsa_jax.inference.generate import Completions, complete, generate, stream
from dsa_jax.inference.llm import LLM
from dsa_jax.inference.pages import OutOfPages, PagedCache
from dsa_jax.inference.params import Request, SamplingParams, StructuredOutputs, Token
from dsa_jax.inference.sampling import sample
from dsa_jax.inference.speculative import MTP, NGram
from dsa_jax.inference.step import Runner
from dsa_jax.key_range import KeyRange
from dsa_jax.layers import Attention, AttentionMaps, SparseMLA
from dsa_jax.mesh_forward import forward_on_mesh
from dsa_jax.model import Output, Transformer
from dsa_jax.moe import MoE
from dsa_jax.nsa_sizes import NSASizes
from dsa_jax.paged import paged_index_scores, paged_select_keys, paged_sparse_attention
from dsa_jax.pallas_kernels import Implementation, implementation
from dsa_jax.parallel.sharding import make_mesh, parameter_shardings
from dsa_jax.quantization import dequantize, hadamard, quantize, straight_through_quantize
from dsa_jax.selection import select_keys, select_topk

__version__ = "0.2.0"

__all__ = [
    "LLM",
    "MTP",
    "Attention",
    "AttentionMaps",
    "BlockMLA",
    "Cache",
    "Completions",
    "Config",
    "Engine",
    "Implementation",
    "KeyRange",
    "LightningIndexer",
    "MoE",
    "NGram",
    "NSASizes",
    "NativeSparseMLA",
    "OutOfPages",
    "Output",
    "PagedCache",
    "Request",
    "Runner",
    "SamplingParams",
    "SparseMLA",
    "StructuredOutputs",
    "Token",
    "Transformer",
    "WindowMLA",
    "YaRN",
    "attention_target",
    "complete",
    "compress_keys",
    "convert_hf",
    "dense_attention_target",
    "dense_indexer_kl",
    "dequantize",
    "forward_on_mesh",
    "generate",
    "hadamard",
    "implementation",
    "index_scores",
    "latent_attention",
    "load_hf",
    "make_mesh",
    "multihead_attention",
    "native_sparse_attention",
    "paged_index_scores",
    "paged_select_keys",
    "paged_sparse_attention",
    "parameter_shardings",
    "quantize",
    "sample",
    "save_hf",
    "select_blocks",
    "select_keys",
    "select_topk",
    "span_attention",
    "sparse_attention",
    "sparse_indexer_kl",
    "straight_through_quantize",
    "stream",
    "to_hf",
    "window_selection",
]
