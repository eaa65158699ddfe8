"""`LLM`: a model or a checkpoint's folder, and continuations of prompts."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from dsa_jax.hf.convert import load_hf
from dsa_jax.inference.engine import ROWS, Engine, check_mesh
from dsa_jax.inference.pages import PagedCache
from dsa_jax.inference.params import Finished, PromptToken, Record, Request, SamplingParams, Token, Top
from dsa_jax.inference.speculative import MTP, Drafter, check_drafter
from dsa_jax.inference.step import PREFILL_CHUNK, Runner
from dsa_jax.inference.tokenizer import find_tokenizer
from dsa_jax.model import Transformer
from dsa_jax.paged import PAGE
from dsa_jax.parallel.sharding import shards

PREFIX_POOLS = 2  # times the pages that full rows of the longest sequences need: the rest keeps prefixes


@dataclasses.dataclass
class Output:
    """Holds one continuation.

    Attributes:
      tokens: a stop token included.
      log_probs: of each, under the distribution that it was drawn from.
      text: without a stop token or text.
      finished: why it ended.
      error: why, where that is an error.
      model_log_probs: of each under the model's own distribution, if `logprobs` was given.
      top: the likeliest tokens of that distribution, at each.
      record: what it recorded for training, if that was asked for.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    text: str = ""
    finished: Finished | None = None
    error: str | None = None
    model_log_probs: list[float] = dataclasses.field(default_factory=list)
    top: list[Top] = dataclasses.field(default_factory=list)
    record: Record | None = None

    def add(self, token: Token) -> None:
        """Takes in what an engine tells of it."""
        if token.token is not None and token.log_prob is not None:
            self.tokens.append(token.token)
            self.log_probs.append(token.log_prob)
        if token.model_log_prob is not None and token.top is not None:
            self.model_log_probs.append(token.model_log_prob)
            self.top.append(token.top)
        self.text += token.text
        self.finished, self.error, self.record = token.finished, token.error, token.record


@dataclasses.dataclass
class Result:
    """Holds the continuations of one prompt, and how likely its tokens are, if `prompt_logprobs` was given."""

    prompt: Any
    outputs: list[Output]
    prompt_tokens: tuple[PromptToken, ...] | None = None


class LLM:
    """Continues prompts by a model.

    Args:
      model: the transformer, or a folder with a checkpoint, and its `tokenizer.json` if text is wanted.
      tokenizer: of the model; that of the folder if None.
      expert_dtype: of the routed experts of a folder's checkpoint, as `load_hf` takes it.
      max_length: the longest sequence, prompt and continuation; the model's positions if None.
      pages: of the cache, on each shard of a mesh; as many as free memory has room for if None.
      rows: how many sequences run at a time, on a mesh a multiple of its shards of rows.
      cache_format: "float32", "bfloat16" or "fp8"; the model's compute dtype if None.
      prefill_chunk: tokens of prompts that a step takes beside the tokens that it decodes.
      batch_invariant: makes the tokens independent of whatever else runs, to the last bit of their log-probabilities.
      reuse_prefixes: whether pages of equal prefixes are computed once.
      return_selected: whether requests may ask for the selections of their tokens.
      return_routed: whether requests may ask for the experts of their tokens.
      drafter: proposes tokens for steps to verify, as `NGram()` does, or `MTP()` by the model's prediction layers; the
        tokens that come out are the same. Prediction layers of a folder are loaded for this alone.
      mesh: the devices of this process over which sequences and experts (`data`, `expert`) and heads and widths
        (`tensor`) are split; one device if None. A folder is loaded there, a model is moved there.

    Examples:
      >>> llm = LLM(model, pages=16)
      >>> [result] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=4))
      >>> len(result.outputs[0].tokens)
      4
    """

    def __init__(
        self,
        model: Transformer | str | Path,
        *,
        tokenizer: Any = None,
        expert_dtype: Literal["fp8"] | None = None,
        max_length: int | None = None,
        pages: int | None = None,
        rows: int = ROWS,
        cache_format: str | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        batch_invariant: bool = False,
        reuse_prefixes: bool = True,
        return_selected: bool = False,
        return_routed: bool = False,
        drafter: Drafter | None = None,
        mesh: Mesh | None = None,
    ):
        check_drafter(drafter)
        check_mesh(mesh)
        end_tokens: list[int] = []
        if not isinstance(model, Transformer):
            folder = Path(model)
            end_tokens = read_end_tokens(folder)
            own: dict[str, Any] = dict(expert_dtype=expert_dtype, prediction_layers=isinstance(drafter, MTP))
            model = load_hf(folder, mesh=mesh, copies=True, **own)
            if tokenizer is None:
                tokenizer = find_tokenizer(folder, model.config.vocab_size)
        config = model.config
        if expert_dtype not in (None, config.expert_dtype):
            raise ValueError(f"expert_dtype must be None for a model that is loaded already, got {expert_dtype!r}")
        length = config.max_position_embeddings if max_length is None or batch_invariant else max_length
        format = cache_format or config.dtype
        wanted: dict[str, Any] = dict(format=format, mesh=mesh, predicting=isinstance(drafter, MTP))
        if pages is None:
            batch = -(-rows // shards(mesh, "rows"))
            most = PREFIX_POOLS * batch * math.ceil(length / PAGE)
            scored = batch * (1 if drafter is None else 1 + drafter.most)  # tokens of a step, each with its scores
            cache = PagedCache.sized(config, batch=scored, length=length, most=most, **wanted)
        else:
            cache = PagedCache(config, pages, **wanted)
        runner = Runner(
            model, cache, prefill_chunk=prefill_chunk, batch_invariant=batch_invariant, max_length=length,
            return_selected=return_selected, return_routed=return_routed,
        )  # fmt: skip
        self.engine = Engine(
            runner, tokenizer=tokenizer, end_tokens=end_tokens, rows=rows, reuse_prefixes=reuse_prefixes,
            drafter=drafter,
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008
    ) -> list[Result]:
        """Continues each prompt, text or token ids, and returns when all have ended.

        Args:
          prompts: any number; a single text is one prompt.
          params: for all of them, or one for each.

        Raises:
          ValueError, OutOfPages: as `Engine.add`; nothing has run then.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params must be one, or one for each of the {len(prompts)} prompts, got {len(each)}")
        results: dict[int, Result] = {}
        try:
            for prompt, own in zip(prompts, each, strict=True):
                name = self.engine.add(Request(prompt, own))
                results[name] = Result(prompt, [Output() for _ in range(own.n)])
            while self.engine.busy:
                self._collect(results)
        except BaseException:
            for name in results:
                self.engine.cancel(name)
            raise
        return list(results.values())

    def _collect(self, results: dict[int, Result]) -> None:
        """Runs a step, and adds its tokens to the results that they belong to."""
        for token in self.engine.step():
            if token.request in results:
                result = results[token.request]
                result.outputs[token.index].add(token)
                result.prompt_tokens = result.prompt_tokens or token.prompt


def read_end_tokens(folder: Path) -> list[int]:
    """Reads the ids that end a text from `generation_config.json`, or else `config.json`; none if neither says."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            if found is not None:
                return [found] if isinstance(found, int) else list(found)
    return []
