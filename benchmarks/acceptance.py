"""Trains a small model with a prediction layer, and counts how many drafts are right:  python -m benchmarks.acceptance

No GPU is needed. Writes benchmarks/results/acceptance.json in some minutes on two cores. The model of bytes learns by
BASE, WARMUP and SPARSE, its prediction layer along with it; then it continues held-out text, with drafts by that layer,
by n-grams, and by neither. Where texts part from those without drafts, it says by how little.
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import measure
from dsa_jax import MTP, Config, Engine, NGram, PagedCache, Request, Runner, SamplingParams, Transformer
from train.data import Corpus, DataConfig, load
from train.optimizer import OptimizerSettings
from train.phases import BASE, SPARSE, WARMUP, merge_groups
from train.saved.initial import random_params
from train.settings import PhaseSettings, Stage
from train.state import abstract_params, init_state
from train.step import make_step

OUT = measure.RESULTS / "acceptance.json"
CONFIG = Config.tiny(
    hidden_size=64, num_hidden_layers=2, first_k_dense_replace=2, intermediate_size=192, num_nextn_predict_layers=1
)
RATE = OptimizerSettings(4e-3, schedule="cosine", warmup_steps=20, weight_decay=0.0)
LOW = dataclasses.replace(RATE, learning_rate=5e-4)
FAST = dataclasses.replace(RATE, learning_rate=1e-2)
PHASES = (
    PhaseSettings(BASE, (Stage(400, 8, 128), Stage(100, 8, 128, prediction_weight=0.1)), backbone=RATE),
    PhaseSettings(WARMUP, (Stage(40, 8, 128),), indexer=FAST),
    PhaseSettings(SPARSE, (Stage(40, 8, 128, prediction_weight=0.1),), backbone=LOW, indexer=LOW),
)
PROMPTS, PROMPT, NEW = 16, 192, 128  # sequences, bytes of each that are given, and that are generated
TEMPERATURES = {"greedy": 0.0, "temperature 0.8": 0.8}
DRAFTERS = {"prediction layer": MTP, "n-grams": NGram}


def train(corpus: Corpus) -> tuple[Transformer, list[dict[str, Any]]]:
    """Trains through the phases; returns the model, and the last metrics of each."""
    graphdef, _ = abstract_params(CONFIG)
    params, found = random_params(CONFIG, seed=0, mesh=None), []
    for number, phase in enumerate(PHASES):
        phase = dataclasses.replace(phase, predictions=True)
        state, step = init_state(params, phase, jax.random.key(number)), make_step(graphdef, phase)
        batches = corpus.batches("train", batch_size=8, seq_len=128, seed=number)
        metrics: Any = {}
        for _ in range(phase.steps):
            state, metrics = step(state, next(batches))
        params = state.params
        names = ("lm_loss", "mtp_loss_1", "kl", "mtp_kl_1")
        found.append({"phase": phase.name} | {name: float(metrics[name]) for name in names if name in metrics})
        print(found[-1], flush=True)
    return merge_groups(graphdef, params), found


def prompts(corpus: Corpus) -> Iterator[list[int]]:
    """Yields held-out text."""
    batch = next(corpus.batches("held_out", batch_size=PROMPTS, seq_len=PROMPT, seed=0))
    yield from np.asarray(batch.tokens).tolist()


def draft(model: Transformer, texts: list[list[int]], drafter: Any, temperature: float) -> dict[str, Any]:
    """Continues texts; returns what was generated, and how many drafts of a step are right."""
    cache = PagedCache(CONFIG, 6 * PROMPTS, format="float32", predicting=isinstance(drafter, MTP))
    engine = Engine(Runner(model, cache, max_length=PROMPT + NEW), rows=PROMPTS, drafter=drafter)
    names = [
        engine.add(Request(text, SamplingParams(temperature=temperature, seed=row, max_tokens=NEW)))
        for row, text in enumerate(texts)
    ]
    found: dict[int, list[int]] = {name: [] for name in names}
    while engine.busy:
        for token in engine.step():
            if token.token is not None:
                found[token.request].append(token.token)
    stats = engine.stats()
    drawn = stats.generated_tokens
    return {
        "proposed": stats.drafts_proposed,
        "accepted": stats.drafts_accepted,
        "tokens_a_step": drawn / (drawn - stats.drafts_accepted),
        "tokens": list(found.values()),
    }


def margins(model: Transformer, texts: list[list[int]], expected: Any, found: Any) -> list[float]:
    """Computes how far apart both tokens are in log-probability, by a plain forward pass, where texts part."""
    graph, state = nnx.split(model)

    @jax.jit
    def log_probs(state, ids):
        model = nnx.merge(graph, state)
        return jax.nn.log_softmax(model.unembed(model(ids, return_indexer_kl=False).hidden))

    apart = []
    for text, one, other in zip(texts, expected, found, strict=True):
        if one != other:
            at = next(i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
            ids = np.zeros((1, PROMPT + NEW), np.int32)
            ids[0, : PROMPT + at] = [*text, *one[:at]]
            behind = np.asarray(log_probs(state, ids))[0, PROMPT + at - 1]
            apart.append(float(abs(behind[one[at]] - behind[other[at]])))
    return apart


def measure_all(corpus: Corpus) -> dict[str, Any]:
    """Trains, and drafts one to three tokens at every temperature."""
    began = time.perf_counter()
    model, phases = train(corpus)
    trained, texts, rows = time.perf_counter() - began, list(prompts(corpus)), []
    for name, temperature in TEMPERATURES.items():
        expected = draft(model, texts, None, temperature)["tokens"]
        for by, make in DRAFTERS.items():
            for most in (1, 2, 3):
                row = draft(model, texts, make(most=most), temperature)
                apart = margins(model, texts, expected, row.pop("tokens"))
                rows.append({"sampling": name, "drafter": by, "most": most, **row, "margins": apart})
                print(rows[-1], flush=True)
    count = sum(x.size for x in jax.tree.leaves(abstract_params(CONFIG)[1]))
    shape = {"parameters": count, "prompts": PROMPTS, "prompt_tokens": PROMPT, "new_tokens": NEW}
    return {**shape, "training_seconds": trained, "cores": os.cpu_count(), "phases": phases, "rows": rows}


def main() -> None:
    """Records how many drafts are right."""
    names, out = measure.command_line(__doc__, {"bytes": None}, OUT, on_gpu=False)
    corpus = load(DataConfig(max_bytes=4 * 2**20), vocab_size=CONFIG.vocab_size)
    for name in names:
        measure.record(out, {name: measure_all(corpus)})


if __name__ == "__main__":
    main()
