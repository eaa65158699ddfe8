"""Inference: a paged cache, the steps of prefill and decode over it, sampling, and generation.

`generate` continues prompts; `complete` tells all that is known of what it drew, `stream` yields tokens as they come.
`Runner` runs a model over a `PagedCache` a step at a time, for engines of one's own.
"""

from dsa_jax.inference.generate import Completions, complete, generate, stream
from dsa_jax.inference.pages import OutOfPages, PagedCache, check_table, pages_that_fit
from dsa_jax.inference.sampling import sample
from dsa_jax.inference.step import Runner

__all__ = [
    "Completions",
    "OutOfPages",
    "PagedCache",
    "Runner",
    "check_table",
    "complete",
    "generate",
    "pages_that_fit",
    "sample",
    "stream",
]
