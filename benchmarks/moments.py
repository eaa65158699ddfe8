"""Trains a small model with moments in float32 and in bfloat16, and compares losses:  python -m benchmarks.moments

No GPU is needed. Writes benchmarks/results/moments.json in about three minutes on two cores. Runs of one seed begin
with the same weights and see the same batches, so that they differ by the storing of their moments alone.
"""

import dataclasses
import functools
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import measure
from dsa_jax import Config
from train.data import Corpus, DataConfig, load
from train.losses import LM_LOSS
from train.moments import store_rounded
from train.optimizer import OptimizerSettings, make_optimizer
from train.phases import merge_groups, run_model
from train.saved.initial import random_params
from train.state import abstract_params

OUT = measure.RESULTS / "moments.json"
BETAS = {"b2=0.95": 0.95, "b2=0.999": 0.999}  # DeepSeek's, and Adam's usual one
STORED = ("float32", "bfloat16, stochastic", "bfloat16, nearest")
SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH = 200, 4, 128
LAST = 50  # steps whose mean loss is recorded
HELD_OUT = 16  # batches
CONFIG = Config.tiny(hidden_size=64, num_hidden_layers=2, first_k_dense_replace=2, intermediate_size=192)


def optimizer_of(stored: str, b2: float) -> optax.GradientTransformationExtraArgs:
    """Makes AdamW that stores its moments so."""
    settings = OptimizerSettings(4e-3, schedule="cosine", warmup_steps=20, b2=b2)
    if stored == "bfloat16, stochastic":
        return make_optimizer(dataclasses.replace(settings, moment_dtype="bfloat16"), STEPS)
    wide = make_optimizer(settings, STEPS)
    return wide if stored == "float32" else store_rounded(wide, lambda moment, _: moment.astype(jnp.bfloat16))


def mean_loss(backbone: Any, rest: Any, batch: Any) -> jax.Array:
    """Computes the cross-entropy of a batch under dense attention."""
    model = merge_groups(abstract_params(CONFIG)[0], {**rest, "backbone": backbone})
    output = run_model(model, batch, attention="dense")
    return LM_LOSS.total(model, output, batch) / LM_LOSS.count(batch)


@functools.cache
def compiled(stored: str, b2: float) -> tuple[Any, Any]:
    """Makes the optimizer, and the jitted step of backbone and state."""
    optimizer = optimizer_of(stored, b2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(backbone, state, rest, batch, random, number):
        loss, gradient = jax.value_and_grad(mean_loss)(backbone, rest, batch)
        updates, state = optimizer.update(gradient, state, backbone, random=random, step=number)
        return optax.apply_updates(backbone, updates), state, loss

    return optimizer, step


def train(corpus: Corpus, stored: str, b2: float, seed: int) -> dict[str, float]:
    """Trains from one seed; returns the mean loss of the last steps, and the held-out loss."""
    optimizer, step = compiled(stored, b2)
    params = random_params(CONFIG, seed=seed, mesh=None)
    backbone = params.pop("backbone")
    state, random, losses = optimizer.init(backbone), jnp.asarray([0, seed], jnp.uint32), []
    batches = corpus.batches("train", batch_size=BATCH, seq_len=LENGTH, seed=seed)
    for number in range(STEPS):
        backbone, state, loss = step(backbone, state, params, next(batches), random, number)
        losses.append(loss)
    held_out = corpus.batches("held_out", batch_size=BATCH, seq_len=LENGTH, seed=0)
    measured = [jax.jit(mean_loss)(backbone, params, next(held_out)) for _ in range(HELD_OUT)]
    return {"last": float(np.mean(losses[-LAST:])), "held_out": float(np.mean(measured))}


def compare(corpus: Corpus, b2: float) -> dict[str, Any]:
    """Trains every way from every seed; differences from float32 are of the same seed, in held-out loss."""
    began, runs = time.perf_counter(), {}
    for stored in STORED:
        runs[stored] = [train(corpus, stored, b2, seed) for seed in SEEDS]
        print(b2, stored, json.dumps(runs[stored]), flush=True)
    held_out = {stored: np.array([run["held_out"] for run in found]) for stored, found in runs.items()}
    rows = []
    for stored, losses in held_out.items():
        apart = losses - held_out["float32"]
        means = {"held_out": float(losses.mean()), "last": float(np.mean([run["last"] for run in runs[stored]]))}
        spread = {"difference": float(apart.mean()), "standard_error": float(apart.std(ddof=1) / len(apart) ** 0.5)}
        rows.append({"stored": stored, **means, **spread, "runs": runs[stored]})
    shape = {"b2": b2, "seeds": len(SEEDS), "steps": STEPS, "batch_size": BATCH, "seq_len": LENGTH}
    count = sum(x.size for x in jax.tree.leaves(abstract_params(CONFIG)[1]["backbone"]))
    return {**shape, "parameters": count, "seconds": time.perf_counter() - began, "cores": os.cpu_count(), "rows": rows}


def main() -> None:
    """Records the comparison at each b2."""
    names, out = measure.command_line(__doc__, BETAS, OUT, on_gpu=False)
    corpus = load(DataConfig(max_bytes=4 * 2**20), vocab_size=CONFIG.vocab_size)
    for name in names:
        measure.record(out, {name: compare(corpus, BETAS[name])})


if __name__ == "__main__":
    main()
