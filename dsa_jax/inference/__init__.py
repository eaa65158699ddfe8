"""Inference: a paged cache, the steps of prefill and decode over it, sampling, and generation.

`generate` continues prompts; `complete` tells all that is known of what it drew, `stream` yields tokens as they come.
`LLM` serves many requests at once from one model, `Engine` is what it runs: sequences join and leave its batch at every
step. `Runner` runs a model over a `PagedCache` a step at a time, for engines of one's own; `Turns` reads and draws by
turns, each drawn on the device in one program, as rollouts with tools do.
"""

from dsa_jax.cache_shapes import pages_that_fit
from dsa_jax.inference.engine import Engine
from dsa_jax.inference.generate import Completions, complete, generate, stream
from dsa_jax.inference.llm import LLM, Output, Result
from dsa_jax.inference.pages import OutOfPages, PagedCache, check_table
from dsa_jax.inference.params import PromptToken, Record, Request, SamplingParams, StructuredOutputs, Token
from dsa_jax.inference.sampling import sample
from dsa_jax.inference.speculative import MTP, Drafter, NGram
from dsa_jax.inference.step import Runner
from dsa_jax.inference.turns import Drawn, Taken, Turns, greedy_settings, row_settings

__all__ = [
    "LLM",
    "MTP",
    "Completions",
    "Drafter",
    "Drawn",
    "Engine",
    "NGram",
    "OutOfPages",
    "Output",
    "PagedCache",
    "PromptToken",
    "Record",
    "Request",
    "Result",
    "Runner",
    "SamplingParams",
    "StructuredOutputs",
    "Taken",
    "Token",
    "Turns",
    "check_table",
    "complete",
    "generate",
    "greedy_settings",
    "pages_that_fit",
    "row_settings",
    "sample",
    "stream",
]
