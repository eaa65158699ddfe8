"""Compares a rollout with the training forward, with and without replay:  python -m benchmarks.replay

Draws tokens from random models on the paged cache, runs the same tokens through the forward pass of training, and
compares the log-probabilities of what was drawn, the selections and the experts. Writes benchmarks/results/replay.json.
No GPU is needed for the parts of small models, one minute on two cores. The part "kernels" needs a Hopper GPU: there
both sides run the card's kernels, at heads of the published sizes.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import measure
from dsa_jax import Config, PagedCache, Runner, Transformer
from dsa_jax.inference.sampling import kind_of
from dsa_jax.inference.turns import Turns, row_settings
from train.data import Batch
from train.losses import log_probabilities
from train.phases import merge_groups, run_model, split_groups
from train.post.environment import Episode, Turn
from train.post.recorded import Recorded, join_kept, replay_of
from train.post.rollout import MAX_KEPT

OUT = measure.RESULTS / "replay.json"
REPLAYS = {
    "nothing": (),
    "selections": ("selections",),
    "routes": ("routes",),
    "routes and selections": ("routes", "selections"),
}
SEED = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """Describes a part: the model, and how much is drawn from it.

    Attributes:
      config: its weights are drawn with `initializer_range`, which keeps activations near 1.
      rows, prompt, drawn: sequences, tokens of each prompt, and tokens drawn behind it.
      attention: "sparse" or "dense".
      cache_format: of the rollout's cache; the compute dtype if None.
      top_p: of the draws.
      on_gpu: whether the part needs a Hopper GPU.
    """

    config: Config
    rows: int = 16
    prompt: int = 24
    drawn: int = 72
    attention: Any = "sparse"
    cache_format: str | None = None
    top_p: float = 1.0
    on_gpu: bool = False


def small(dtype: str) -> Config:
    """A model of three MoE layers, K 16."""
    sizes = dict(hidden_size=128, num_hidden_layers=3, first_k_dense_replace=0, num_attention_heads=4)
    index = dict(index_n_heads=8, index_head_dim=32, index_topk=16)
    experts = dict(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=64)
    options = dict(vocab_size=128, max_position_embeddings=128, initializer_range=0.09, dtype=dtype)
    return Config.tiny(**sizes, **index, **experts, **options)


def published(index_fp8: bool) -> Config:
    """A model of two MoE layers with the published heads, K 256: what the card's kernels take."""
    sizes = dict(hidden_size=1024, num_hidden_layers=2, first_k_dense_replace=0, num_attention_heads=16)
    heads = dict(q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    index = dict(index_n_heads=64, index_head_dim=128, index_topk=256, index_fp8=index_fp8)
    experts = dict(n_routed_experts=32, num_experts_per_tok=8, n_group=4, topk_group=2, moe_intermediate_size=256)
    options = dict(vocab_size=1024, max_position_embeddings=2048, initializer_range=0.03, dtype="bfloat16")
    return Config.tiny(**sizes, **heads, **index, **experts, **options)


def cases() -> dict[str, Case]:
    """The parts by name."""
    large = dict(rows=16, prompt=512, drawn=512, on_gpu=True)
    return {
        "float32": Case(small("float32")),
        "float32, top-p 0.9": Case(small("float32"), top_p=0.9),
        "bfloat16": Case(small("bfloat16")),
        "bfloat16, dense": Case(small("bfloat16"), attention="dense"),
        "kernels, bfloat16": Case(published(False), **large),
        "kernels, FP8 index": Case(published(True), **large),
        "kernels, FP8 cache": Case(published(True), cache_format="fp8", **large),
    }


def roll_out(case: Case, model: Transformer) -> list[Episode]:
    """Draws one turn behind random prompts, everything recorded."""
    length, vocab = case.prompt + case.drawn, case.config.vocab_size
    pages = case.rows * -(-length // 64)
    cache = PagedCache(case.config, pages, format=case.cache_format or case.config.dtype)
    wanted = dict(return_selected=case.attention == "sparse", return_routed=True)
    turns = Turns(
        Runner(model, cache, attention=case.attention, max_length=length, **wanted), most=case.drawn, stops=()
    )
    rows = [cache.new() for _ in range(case.rows)]
    prompts = list(np.random.default_rng(SEED).integers(vocab, size=(case.rows, case.prompt)).astype(np.int32))
    logits, read = turns.read(rows, prompts)
    top_k = min(MAX_KEPT, vocab)
    seeds = np.arange(case.rows, dtype=np.uint32)
    settings = row_settings(case.rows, vocab, temperature=1.0, top_p=case.top_p, top_k=top_k, seeds=seeds)
    kind = kind_of(np.asarray(1.0), np.asarray(top_k), np.asarray(case.top_p), vocab)
    kept = top_k if kind == "truncated" else 0
    limit = np.full(case.rows, case.drawn)
    drawn = turns.draw(rows, logits, settings, limit=limit, kind=kind, kept=kept)
    return [_episode(prompt, own, turn) for prompt, own, turn in zip(prompts, read, drawn, strict=True)]


def _episode(prompt, own, turn) -> Episode:
    join = lambda name: None if getattr(own, name) is None else np.concatenate(  # noqa: E731
        [getattr(own, name), getattr(turn.taken, name)], axis=1).swapaxes(0, 1)  # fmt: skip
    kept = (None, None) if turn.kept is None else join_kept([None] * len(prompt) + turn.kept)
    record = Recorded(join("routed"), join("selected"), *kept)
    played: Any = None
    return Episode("random", 0, "", prompt, [Turn("", turn.tokens, turn.log_probs)], played, "tokens", recorded=record)


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(graphdef: nnx.GraphDef, params: Any, batch: Batch, attention: Any) -> tuple[Any, Any, Any]:
    """Runs the forward pass of training; returns log-probabilities, its own selections and experts."""
    model = merge_groups(graphdef, params)
    log_probs = log_probabilities(model, run_model(model, batch, attention=attention), batch)
    choices = dict(return_selected=attention == "sparse", return_routed=True, return_indexer_kl=False)
    own = model(batch.tokens, keys=batch.keys, positions=batch.positions, attention=attention, **choices)
    return log_probs, own.selected, own.routed


def compare(case: Case) -> dict[str, Any]:
    """Measures one part: a row for each kind of replay."""
    began = time.perf_counter()
    model = Transformer(case.config, rngs=nnx.Rngs(SEED))
    graphdef, params = split_groups(model)
    episodes = roll_out(case, model)
    tokens = np.stack([np.concatenate([each.prompt_tokens, each.turns[0].tokens]) for each in episodes])
    old = np.stack([each.turns[0].log_probs for each in episodes])
    length, kept = tokens.shape[1] - 1, ("kept",) if case.top_p < 1 else ()
    replays = {name: (*own, *kept) for name, own in REPLAYS.items()}
    if kept:
        replays = {"nothing": (), "kept": kept} | {name: own for name, own in replays.items() if name != "nothing"}
    if case.attention == "dense":
        replays = {name: own for name, own in replays.items() if "selections" not in own}
    plain = jax.tree.map(lambda x: x[:, :length], Batch.from_tokens(tokens))
    whole: Any = replay_of(episodes, length)
    rows = []
    for name, own in replays.items():
        replay = dataclasses.replace(whole, **{each: None for each in vars(whole) if each not in own})
        log_probs, selected, routed = forward(
            graphdef, params, dataclasses.replace(plain, replay=replay), case.attention
        )
        apart = np.abs(np.asarray(log_probs)[:, case.prompt - 1 :] - old)
        rows.append({"replay": name, "max": float(apart.max()), "mean": float(apart.mean())})
        print(f"{name:24} max {apart.max():.2e}  mean {apart.mean():.2e}", flush=True)
        if not own:
            differ = _differences(episodes, selected, routed)
    sizes = {"rows": case.rows, "prompt": case.prompt, "drawn": case.drawn, "index_topk": case.config.index_topk}
    return {**sizes, "top_p": case.top_p, **differ, "seconds": time.perf_counter() - began, "comparisons": rows}


def _differences(episodes, selected, routed) -> dict[str, float | None]:
    """Computes the share of queries, of all layers, whose keys or experts the two sides choose differently."""
    mine = np.stack([each.recorded.routes for each in episodes], axis=1)  # [T, B, layers, k]
    theirs = np.asarray(routed).transpose(2, 1, 0, 3)
    routes = float(np.mean(np.any(np.sort(mine, -1) != np.sort(theirs, -1), axis=-1)))
    if selected is None:
        return {"routes_differ": routes, "selections_differ": None, "keys_differ": None}
    mine = np.stack([each.recorded.selections for each in episodes], axis=1).astype(np.int32)
    theirs = np.asarray(selected).transpose(2, 1, 0, 3)
    width = max(mine.shape[-1], theirs.shape[-1])
    mine, theirs = (np.pad(x, (*[(0, 0)] * 3, (0, width - x.shape[-1])), constant_values=-1) for x in (mine, theirs))
    other = np.any(mine != theirs, axis=-1)
    differ = [len(np.setdiff1d(x, y)) for x, y in zip(mine[other], theirs[other], strict=True)]
    return {
        "routes_differ": routes,
        "selections_differ": float(other.mean()),
        "keys_differ": float(np.mean(differ)) if differ else 0.0,
    }


def main() -> None:
    """Records the parts that this machine can measure."""
    on_gpu = jax.default_backend() == "gpu"
    able = {name: case for name, case in cases().items() if on_gpu or not case.on_gpu}
    names, out = measure.command_line(__doc__, able, OUT, on_gpu=False)
    for name in names:
        print(name, flush=True)
        measure.record(out, {name: compare(able[name])})


if __name__ == "__main__":
    main()
