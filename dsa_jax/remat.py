"""Names the intermediate results of a layer that its backward pass may keep rather than compute again.

A layer is rematerialised: its backward computes what it needs from the layer's input. What a name of `KEEPABLE` marks
is kept where a caller says so, which costs memory and saves time. No number depends on it. Of routed experts nothing
can be kept: their backward pass begins with the products anew (`dsa_jax.grouped_ffn`).
"""

from collections.abc import Callable
from typing import Any

import jax

# A selection is kept, not found again: a second indexer pass costs time and could choose otherwise.
ALWAYS_KEPT = ("indices", "lse")

KEEPABLE = {
    "latents": "products that all heads share: query latents, latents, index keys and the index weights",
    "queries": "queries and index queries of all heads",
    "attention": "the attention's output before its projection, in latent form where it is sparse",
    "attention_output": "its projection, which is added to the residual stream",
    "indexer_kl": "gradients of the indexer's loss, which the forward pass computes beside the loss",
    "router": "the router's logits",
    "feed_forward": "products with gate and up, of dense layers and shared experts",
}


def check_keep(keep: Any) -> None:
    """Checks the names of what is kept.

    Raises:
      ValueError: unless they are a tuple of names of `KEEPABLE`, each once.
    """
    if not isinstance(keep, tuple) or not all(isinstance(name, str) for name in keep):
        raise ValueError(f"keep must be a tuple of names, got {str(keep)[:80]!r}")
    if wrong := [name for name in keep if name not in KEEPABLE or keep.count(name) > 1]:
        raise ValueError(f"keep must name results among {', '.join(KEEPABLE)}, each once, got {wrong[0][:80]!r}")


def remat_policy(keep: tuple[str, ...]) -> Callable[..., bool]:
    """Makes the policy of `jax.checkpoint` that keeps these results and those that always are."""
    return jax.checkpoint_policies.save_only_these_names(*ALWAYS_KEPT, *keep)
