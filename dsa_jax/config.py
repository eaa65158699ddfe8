"""The model's configuration, and the letters that name every dimension.

Letter table, used in every signature, einsum and comment:

    B batch                  T queries                S keys                   K selected keys
    N attention heads        J index heads            E index head dim         D model dim
    Q query latent           C key/value latent       R rotary dim             P un-rotated head dim
    V value head dim         X experts                F feed-forward width
"""

import dataclasses
import math
from typing import Self


@dataclasses.dataclass(frozen=True)
class YaRN:
    """How rotary frequencies stretch past the length they were trained on (arXiv:2309.00071).

    `mscale_all_dim` multiplies the softmax scale by `attention_scale ** 2`; `mscale` over `mscale_all_dim` multiplies
    cosines and sines (1 in every published DSA model).
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"rope_scaling factor must be at least 1, got {self.factor}")
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings must be at least 1, got {self.original_max_position_embeddings}"
            )

    def magnitude(self, mscale: float) -> float:
        """0.1 · mscale · ln(factor) + 1, the factor by which longer contexts sharpen the softmax."""
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """A DSA transformer. Fields keep the names of Hugging Face's `config.json`; the defaults are the published 671B model.

    `dtype` is that of the computation and `param_dtype` that of the parameters; normalisations, softmax, router, index
    weights and losses are float32 whatever they say.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168  # D
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3  # layers before the first MoE layer
    num_attention_heads: int = 128  # N
    q_lora_rank: int = 1536  # Q
    kv_lora_rank: int = 512  # C
    qk_nope_head_dim: int = 128  # P
    qk_rope_head_dim: int = 64  # R
    v_head_dim: int = 128  # V
    index_n_heads: int = 64  # J
    index_head_dim: int = 128  # E
    index_topk: int = 2048  # K
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256  # X
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YaRN | None = YaRN(40.0, 4096)
    max_position_embeddings: int = 163840
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    index_rope_interleave: bool = False  # True in GLM-5, whose indexer pairs neighbouring columns
    index_fp8: bool = False  # Hadamard transform and e4m3 index queries and keys
    dtype: str = "bfloat16"
    param_dtype: str = "float32"

    def __post_init__(self):
        positive = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim "
            "qk_rope_head_dim v_head_dim index_n_heads index_head_dim index_topk intermediate_size "
            "moe_intermediate_size n_routed_experts num_experts_per_tok n_group topk_group max_position_embeddings"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name} must be 'float32' or 'bfloat16', got {getattr(self, name)!r}")
        if self.n_shared_experts < 0 or self.first_k_dense_replace < 0:
            raise ValueError(
                "n_shared_experts and first_k_dense_replace must be at least 0, "
                f"got {self.n_shared_experts} and {self.first_k_dense_replace}"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim must be at least qk_rope_head_dim, got {self.index_head_dim} < {self.qk_rope_head_dim}"
            )
        if self.index_fp8 and self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(f"index_fp8 needs index_head_dim a power of two, got {self.index_head_dim}")
        if self.n_routed_experts % self.n_group or self.n_routed_experts < 2 * self.n_group:
            raise ValueError(
                "n_routed_experts must be a multiple of n_group with at least two experts a group, "
                f"got {self.n_routed_experts} experts in {self.n_group} groups"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group must be at most n_group, got {self.topk_group} > {self.n_group}")
        eligible = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > eligible:
            raise ValueError(
                f"num_experts_per_tok must be at most the {eligible} experts of topk_group groups, "
                f"got {self.num_experts_per_tok}"
            )

    @property
    def num_dense_layers(self) -> int:
        """Layers with a dense feed-forward; the others route to experts."""
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def latent_dim(self) -> int:
        """C + R, the width of one cached key/value entry."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """(P + R)^-0.5, times the square of YaRN's magnitude."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        return scale if self.rope_scaling is None else scale * self.rope_scaling.magnitude(self.rope_scaling.mscale_all_dim) ** 2

    @classmethod
    def deepseek_v32(cls) -> Self:
        """DeepSeek-V3.2-Exp, 671B parameters."""
        return cls()

    @classmethod
    def tiny(cls) -> Self:
        """A model of about a million parameters that trains on a laptop; bytes are its tokens."""
        return cls(
            vocab_size=256,
            hidden_size=128,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_attention_heads=4,
            q_lora_rank=96,
            kv_lora_rank=48,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            index_n_heads=16,
            index_head_dim=32,
            index_topk=32,
            intermediate_size=384,
            moe_intermediate_size=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=4,
            topk_group=2,
            rope_scaling=None,
            max_position_embeddings=4096,
            dtype="float32",
        )
