"""Kernels of a mixture's feed-forward: rows times the weights of their own experts, and the gradients of that."""

from dsa_jax.pallas_kernels.grouped_product.expert_ffn import expert_ffn, expert_ffn_gradients, why_not

__all__ = ["expert_ffn", "expert_ffn_gradients", "why_not"]
