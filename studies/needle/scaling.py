"""Time and memory of the study's model by length, dense and sparse: a forward pass, a training step, a token's decode.

    python -m studies.needle.scaling            # writes studies/needle/results/scaling.json

Weights are random: no time depends on them. Every program is compiled before the first one runs.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from dsa_jax import Config, PagedCache, Runner
from studies.needle import settings
from studies.needle.found import circumstances
from train.commands.command import parse, run_command
from train.data import Batch
from train.files import replace_text
from train.optimizer import OptimizerSettings
from train.phases import DENSE_CONTROL, SPARSE, Phase, merge_groups, run_model
from train.reporting.figures import hide_frame
from train.reporting.report import markdown_table
from train.reporting.results import first_rise
from train.saved.initial import random_params
from train.settings import PhaseSettings, Stage
from train.state import abstract_params, abstract_state, init_state
from train.step import build_step

RESULTS, FILE = Path(__file__).parent / "results", "scaling.json"
THREADS = 5  # that compile beside each other
WINDOWS = 3  # of which the median counts
WINDOW_SECONDS = 0.5
DECODE_STEPS = 32
COLORS = ("#222222", "#1f5fa8", "#c1452b", "#3d8b4f")
WORKS = {"forward": "forward pass", "step": "training step", "decode": "decode of a token"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times the study's model by length, dense and sparse."""

    preset: Literal["card", "small"] = "card"
    """The study's."""
    lengths: tuple[int, ...] = ()
    """Tokens of a row; without them from 4K to 128K, or two short ones of "small"."""
    out: Path = RESULTS / FILE
    """The file of the numbers; the figure is drawn by the report."""


def batch_of(length: int, vocabulary: int) -> Batch:
    """Makes a row of one document of random tokens."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, size=(1, length + 1))
    return Batch.from_tokens(tokens[:, :-1])


def forward(graphdef: Any, attention: Any) -> Callable:
    """Makes the forward pass to the last hidden states, without the indexer's loss."""

    @jax.jit
    def run(params, batch):
        return run_model(merge_groups(graphdef, params), batch, attention=attention).hidden

    return run


@dataclasses.dataclass(frozen=True)
class Side:
    """Describes an attention that is timed: the model, how it attends, and the phase whose step is taken."""

    config: Config
    attention: Literal["dense", "sparse"]
    phase: Phase

    @property
    def settings(self) -> PhaseSettings:
        """The phase with rates, on which no time depends."""
        rates = OptimizerSettings(1e-4, muon_learning_rate=1e-3, weight_decay=0.0)
        indexer = OptimizerSettings(1e-4, weight_decay=0.0) if "indexer" in self.phase.trains else None
        stages = (Stage(1, 1, self.config.max_position_embeddings),)
        return PhaseSettings(self.phase, stages, backbone=rates, indexer=indexer)


def sides_of(config: Config) -> dict[str, Side]:
    """Lists both attentions of the study: the dense control, and SPARSE."""
    return {"dense": Side(config, "dense", DENSE_CONTROL), "sparse": Side(config, "sparse", SPARSE)}


def measure_lengths(
    sides: Mapping[str, Side], lengths: Sequence[int], say: Callable[[str], object] = print
) -> list[dict[str, Any]]:
    """Times forward passes and steps of all lengths, and decoding at them.

    Args:
      sides: the attentions by their names.
      lengths: tokens of a row.
      say: told each row.
    """
    programs: dict[tuple[str, str, int], Callable] = {}
    with ThreadPoolExecutor(THREADS) as threads:
        for (name, side), length in itertools.product(sides.items(), lengths):
            graphdef, like = abstract_params(side.config)
            tokens = batch_of(length, side.config.vocab_size)
            batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tokens)
            lowered = forward(graphdef, side.attention).lower(like, batch)
            programs["forward", name, length] = threads.submit(lowered.compile).result
            lowered = build_step(graphdef, side.settings).lower(abstract_state(side.config, side.settings), batch)
            programs["step", name, length] = threads.submit(lowered.compile).result
    rows = []
    params = {config: random_params(config, seed=0) for config in {side.config for side in sides.values()}}
    for (work, name, length), program in programs.items():
        side, row = sides[name], {"work": work, "attention": name, "length": length}
        own = params[side.config]
        try:
            compiled = program()
            batch = jax.device_put(batch_of(length, side.config.vocab_size))
            memory = compiled.memory_analysis()
            row["temporary_gib"] = memory.temp_size_in_bytes / 2**30
            if work == "forward":
                row["seconds"] = _median(lambda calls, run=compiled, own=own, at=batch: _forwards(run, own, at, calls))
            else:
                key = jax.random.key_data(jax.random.key(0))
                state = init_state(jax.tree.map(jnp.copy, own), side.settings, key)
                row["seconds"] = _median(_Steps(compiled, state, batch))
        except Exception as error:  # the next row runs all the same
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
        say(str(row))
    for name, side in sides.items():
        rows += _decode(name, side, params[side.config], lengths, say)
    return rows


def _forwards(run: Callable, params: Any, batch: Batch, calls: int) -> None:
    for _ in range(calls):
        out = run(params, batch)
    jax.block_until_ready(out)


@dataclasses.dataclass
class _Steps:
    """Runs training steps, each from the state that the one before has left."""

    run: Callable
    state: Any
    batch: Batch

    def __call__(self, calls: int) -> None:
        for _ in range(calls):
            self.state, metrics = self.run(self.state, self.batch)
        jax.block_until_ready(metrics)


def _median(run: Callable[[int], None]) -> float:
    """Times windows of back-to-back calls; gives the median, in seconds a call."""
    run(1)
    began = time.perf_counter()
    run(1)
    calls = max(1, min(50, int(WINDOW_SECONDS / (time.perf_counter() - began))))
    times = []
    for _ in range(WINDOWS):
        began = time.perf_counter()
        run(calls)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def _decode(name: str, side: Side, params: Any, lengths: Sequence[int], say: Callable) -> list[dict[str, Any]]:
    """Times decoding of one sequence at each length: one program, whose table holds the longest."""
    longest, config = max(lengths), dataclasses.replace(side.config, index_fp8=True)
    model = merge_groups(abstract_params(config)[0], params)
    cache = PagedCache(config, -(-(longest + DECODE_STEPS * (WINDOWS + 2)) // 64) + 1, format="fp8")
    runner = Runner(model, cache, attention=side.attention, max_length=config.max_position_embeddings)
    rows = []
    for length in lengths:
        for sequence in cache.sequences:
            cache.free(sequence)
        sequence = cache.new()
        cache.extend(sequence, length - DECODE_STEPS * (WINDOWS + 2))  # what is written there does not matter
        tokens, times = np.zeros((1, 1), np.int32), []
        for window in range(WINDOWS + 2):
            began = time.perf_counter()
            for _ in range(DECODE_STEPS):
                logits = runner.extend([sequence], tokens)
            jax.block_until_ready(logits)
            times += [(time.perf_counter() - began) / DECODE_STEPS] if window > 1 else []
        rows.append({"work": "decode", "attention": name, "length": length, "seconds": statistics.median(times)})
        say(str(rows[-1]))
    return rows


def crossover(rows: Sequence[dict[str, Any]], work: str) -> float | None:
    """Finds the length from which on dense takes longer than sparse, between two lengths; None where it is not there.

    Examples:
      >>> rows = [dict(work="step", attention=side, length=n, seconds=s)
      ...         for n, dense, sparse in ((1024, 1.0, 2.0), (2048, 3.0, 2.0))
      ...         for side, s in (("dense", dense), ("sparse", sparse))]
      >>> crossover(rows, "step")
      1536.0
    """
    side = {name: _by_length(rows, work, name) for name in ("dense", "sparse")}
    lengths = sorted(side["dense"].keys() & side["sparse"].keys())
    return first_rise((length, side["dense"][length] - side["sparse"][length]) for length in lengths)


def _by_length(rows, work: str, attention: str, value: str = "seconds") -> dict[int, float]:
    wanted = [row for row in rows if (row["work"], row["attention"]) == (work, attention) and value in row]
    return {row["length"]: row[value] for row in wanted}


def _names(rows) -> list[str]:
    return list(dict.fromkeys(row["attention"] for row in rows))


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draws the times by length, and marks where they cross."""
    works = {work: name for work, name in WORKS.items() if any(row["work"] == work for row in rows)}
    figure = Figure(figsize=(3.7 * len(works), 3.4), layout="constrained")
    for axes, (work, name) in zip(figure.subplots(1, len(works), squeeze=False)[0], works.items(), strict=True):
        for attention, color in zip(_names(rows), COLORS, strict=False):
            found = _by_length(rows, work, attention)
            axes.plot(found.keys(), [1e3 * each for each in found.values()], "o-", color=color, label=attention)
        if (place := crossover(rows, work)) is not None:
            axes.axvline(place, color="#9aa4b0", linestyle="--", label=f"equal at {place:,.0f}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({row["length"] for row in rows})
        axes.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths], fontsize=8)
        axes.set_title(f"{name}, ms", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        hide_frame(axes)
    return figure


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Writes times and temporary memory as a table in Markdown."""
    lengths = sorted({row["length"] for row in rows})
    header = "work", "attention", *(f"{length:,}" for length in lengths)
    cells = []
    for work, name in WORKS.items():
        for value, unit in (("seconds", "ms"), ("temporary_gib", "GiB")):
            for attention in _names(rows):
                found = _by_length(rows, work, attention, value)
                if found:
                    factor = 1e3 if value == "seconds" else 1
                    row = [f"{factor * found[length]:.3g}" if length in found else "" for length in lengths]
                    cells.append((f"{name}, {unit}", attention, *row))
    return markdown_table(header, cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    given = sys.argv[1:] if arguments is None else arguments

    def run() -> None:
        chosen = parse(Arguments, given, "python -m studies.needle.scaling")
        preset = settings.PRESETS[chosen.preset]()
        lengths = chosen.lengths or (
            tuple(2**i for i in range(12, 18)) if chosen.preset == "card" else (512, preset.lengths[-1])
        )
        sizes: dict[str, Any] = preset.model | {"max_position_embeddings": max(lengths)}
        config = Config(vocab_size=preset.vocabulary, **sizes)
        rows = measure_lengths(sides_of(config), lengths, partial(print, flush=True))
        replace_text(chosen.out, json.dumps({"circumstances": circumstances(), "rows": rows}, indent=1) + "\n")
        print("\n".join(table(rows)))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
