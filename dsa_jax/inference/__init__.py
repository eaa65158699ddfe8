"""Inference: `generate` continues prompts through the model's cache, `sampling` draws tokens from logits."""

from dsa_jax.inference.generate import generate
from dsa_jax.inference.sampling import sample

__all__ = ["generate", "sample"]
