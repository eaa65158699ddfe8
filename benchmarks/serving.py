"""Times an engine under load, on one Hopper GPU:  python -m benchmarks.serving

A slice of the 671B shape, four layers by default. `steps` has full batches decode, and sets the engine's step beside
its floor: decode steps of the same rows, chained without a scheduler and without reading what is drawn. `load` sends
requests at the times of a Poisson process, whatever has been answered, with prefixes that some share and lengths of
their own, and times every token as the caller of `Engine.step` sees it. A request is good if its first token came in
time, and the others in time on average. Tokens are the likeliest ones. Dollars are those of the slice, at GPU_DOLLARS
an hour.
"""

import argparse
import collections
import dataclasses
import gc
import itertools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import measure
from benchmarks.decode_step import STEPS, Case, make_model, slice_of
from dsa_jax import Config, Engine, NGram, PagedCache, Request, Runner, SamplingParams, load_hf, make_mesh
from dsa_jax.parallel.sharding import parse_mesh, shards

OUT = measure.RESULTS / "serving.json"
GPU_DOLLARS = 2.0  # an hour
WINDOWS = 7  # of STEPS engine steps, of which the median counts
COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that JAX records of every program it compiles


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Says what is asked for; lengths are medians of log-normal distributions.

    Attributes:
      rate: requests a second.
      seconds: how long they come.
      patience: seconds after which those that have not been answered are given up.
      prefixes: how many different beginnings there are; each request has one of them.
      prefix_tokens: of each.
      own_tokens: of a prompt behind its prefix.
      answer_tokens: of a continuation.
      spread: the standard deviation of lengths' logarithms.
      first_token_limit: seconds to the first token of a good request.
      between_tokens_limit: seconds between two of its tokens on average.
    """

    rate: float
    seconds: float = 20.0
    patience: float = 20.0
    prefixes: int = 8
    prefix_tokens: int = 2048
    own_tokens: int = 512
    answer_tokens: int = 128
    spread: float = 0.7
    first_token_limit: float = 1.0
    between_tokens_limit: float = 0.05


class Arrival(NamedTuple):
    at: float  # seconds
    request: Request


@dataclasses.dataclass
class Answer:
    """Holds when a request was to come, when its tokens came, and how it ended."""

    asked: float
    tokens: list[float] = dataclasses.field(default_factory=list)
    finished: str | None = None


def arrivals(traffic: Traffic, vocab: int, max_length: int) -> Iterator[Arrival]:
    """Yields the same requests for the same traffic; no two prefixes and no two tails are alike."""
    rng = np.random.default_rng(0)
    prefixes = rng.integers(0, vocab, (traffic.prefixes, traffic.prefix_tokens))
    length = lambda median: max(1, round(median * rng.lognormal(sigma=traffic.spread)))  # noqa: E731
    at = rng.exponential(1 / traffic.rate)
    while at < traffic.seconds:
        own, answer = length(traffic.own_tokens), length(traffic.answer_tokens)
        prompt = np.concatenate([prefixes[rng.integers(traffic.prefixes)], rng.integers(0, vocab, own)])
        answer = min(answer, max_length // 4)
        prompt = prompt[: max_length - answer]
        params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
        yield Arrival(at, Request(prompt.tolist(), params))
        at += rng.exponential(1 / traffic.rate)


def send(
    engine: Engine,
    requests: Sequence[Arrival],
    end: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Answer]:
    """Adds each request when it is due, whatever runs, and notes when tokens come; gives up at `end`, in seconds."""
    answers: dict[int, Answer] = {}
    left = collections.deque(requests)
    began = clock()
    while left or engine.busy:
        now = clock() - began
        while left and left[0].at <= now:
            arrival = left.popleft()
            answers[engine.add(arrival.request)] = Answer(arrival.at)
        if now > end:
            for name in answers:
                engine.cancel(name)
        if not engine.busy:
            sleep(left[0].at - now)
            continue
        tokens, now = engine.step(), clock() - began
        for token in tokens:
            answer = answers[token.request]
            if token.token is not None:
                answer.tokens.append(now)
            answer.finished = token.finished
    return list(answers.values())


def summary(answers: Sequence[Answer], traffic: Traffic) -> dict[str, Any]:
    """Summarises answers: throughput, medians and 99 % of delays in ms, and the good requests a second."""
    done = [answer for answer in answers if answer.finished == "length"]
    first = [answer.tokens[0] - answer.asked for answer in answers if answer.tokens]
    gaps = [after - before for answer in answers for before, after in itertools.pairwise(answer.tokens)]
    good = [answer for answer in done if _is_good(answer, traffic)]
    tokens = sum(len(answer.tokens) for answer in answers)
    took = max((answer.tokens[-1] for answer in answers if answer.tokens), default=0.0)
    return {
        "requests": len(answers),
        "answered": len(done),
        "took_seconds": took,
        "tokens_per_second": tokens / took if took else 0.0,
        "dollars_per_million_tokens": dollars(tokens / took) if took else None,
        "first_token_ms": _spread(first),
        "between_tokens_ms": _spread(gaps),
        "good_per_second": len(good) / took if took else 0.0,
        "good_share": len(good) / len(answers) if answers else None,
    }


def _is_good(answer, traffic):
    """Tells whether a request was answered within the limits."""
    first, last = answer.tokens[0], answer.tokens[-1]
    between = (last - first) / max(1, len(answer.tokens) - 1)
    return first - answer.asked <= traffic.first_token_limit and between <= traffic.between_tokens_limit


def _spread(seconds):
    if not seconds:
        return None
    median, most = np.percentile(seconds, [50, 99])
    return {"median": 1e3 * float(median), "p99": 1e3 * float(most)}


def dollars(tokens_per_second: float) -> float:
    """Computes the dollars of a million tokens."""
    return 1e6 * GPU_DOLLARS / 3600 / tokens_per_second


def load_row(engine: Engine, traffic: Traffic) -> dict[str, Any]:
    """Sends traffic to an idle engine that remembers no prefix, and counts the programs that are compiled meanwhile."""
    engine.prefix.clear()
    before, compiled = engine.stats(), []
    requests = list(arrivals(traffic, engine.runner.config.vocab_size, engine.max_length))
    listener = lambda event, seconds, **_: compiled.append(seconds) if event == COMPILED else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    gc.collect()
    try:
        answers = send(engine, requests, traffic.seconds + traffic.patience)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    after = engine.stats()
    row: dict[str, Any] = {"rate": traffic.rate} | summary(answers, traffic)
    for name in ("prefix_hits", "prefix_asked", "preemptions", "prompt_tokens", "drafts_proposed", "drafts_accepted"):
        row[name] = getattr(after, name) - getattr(before, name)
    row["hit_rate"] = row["prefix_hits"] / max(1, row["prefix_asked"])
    return row | {"programs_compiled": len(compiled), "compile_seconds": sum(compiled)}


def step_row(engine: Engine, batch: int, length: int) -> dict[str, Any]:
    """Times the steps of a full batch that decodes, and their floor at the same lengths."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    prompts = rng.integers(0, engine.runner.config.vocab_size, (batch, length))
    names = [engine.add(Request(prompt.tolist(), params)) for prompt in prompts]
    while len(engine.step()) < batch:
        pass
    times = [_window(engine) for _ in range(WINDOWS)]
    for name in names:
        engine.cancel(name)
    while engine.busy:
        engine.step()
    engine.prefix.clear()
    case = Case(engine.runner, batch, length + 2 * STEPS)
    case.steps(2, read=False)
    floor = statistics.median(case.steps(STEPS, read=False) for _ in range(WINDOWS))
    for sequence in engine.cache.sequences:
        engine.cache.free(sequence)
    step = statistics.median(times)
    return {
        "batch": batch,
        "length": length,
        "step_ms": 1e3 * step,
        "floor_ms": 1e3 * floor,
        "loss_percent": 100 * (1 - floor / step),
        "tokens_per_second": batch / step,
        "dollars_per_million_tokens": dollars(batch / step),
    }


def _window(engine) -> float:
    """Returns the seconds of a step, of STEPS of them; each is read behind the next, as in service."""
    began = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    return (time.perf_counter() - began) / STEPS


def make_engine(arguments) -> Engine:
    """Makes an engine whose pages hold the full batch of `steps`, and prefixes beside the rows of `load`."""
    mesh = None if arguments.mesh is None else make_mesh(parse_mesh(arguments.mesh))
    if arguments.model is not None:
        config = dataclasses.replace(Config.from_hf(arguments.model), index_fp8=True)
        model = load_hf(arguments.model, config=config, mesh=mesh, copies=True)
    else:
        tiny = dict(
            num_hidden_layers=2, index_fp8=True, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128,
            max_position_embeddings=4096,
        )  # fmt: skip
        config = Config.tiny(**tiny) if arguments.tiny else slice_of(arguments.layers, arguments.dense)
        model = make_model(config, mesh)
    longest = min(config.max_position_embeddings, arguments.max_length)
    of_shard = -(-max(arguments.batch) // shards(mesh, "rows"))
    cache = PagedCache(config, 2 * of_shard * -(-longest // 64), format="fp8", mesh=mesh)
    runner = Runner(model, cache, max_length=longest, prefill_chunk=arguments.chunk)
    return Engine(runner, rows=max(arguments.batch), drafter=NGram() if arguments.drafts else None)


def main() -> int:
    """Times steps, then loads, and records every row at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("steps", "load"), default=["steps", "load"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dense", type=int, default=4, help="how many of them have no experts")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--length", type=int, default=8192, help="of the prompts whose decode steps are timed")
    parser.add_argument("--max-length", type=int, default=16384, help="the longest sequence that the engine takes")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of prompts in a step")
    parser.add_argument("--rate", type=float, nargs="+", default=[4.0, 16.0, 32.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="in which requests come")
    parser.add_argument("--drafts", action="store_true", help="verify n-gram drafts")
    parser.add_argument("--mesh", help="of all GPUs, such as expert=8; one GPU by default")
    parser.add_argument("--model", type=pathlib.Path, help="a checkpoint's folder, in place of the slice")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program on a CPU")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    engine = make_engine(arguments)
    began = time.perf_counter()
    engine.warm(kinds=["greedy"])
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    config = engine.runner.config
    name = f"{config.num_hidden_layers} layers, {config.num_moe_layers} with experts"
    if arguments.model is not None:
        name += f", of {arguments.model.name}"
    if arguments.mesh is not None:
        name += f", {arguments.mesh}"
    short = dict(prefix_tokens=256, own_tokens=64, answer_tokens=16) if arguments.tiny else {}
    traffic = Traffic(arguments.rate[0], arguments.seconds, **short)
    cases: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
        "steps": {f"batch {each}": partial(step_row, engine, each, arguments.length) for each in arguments.batch},
        "load": {
            f"{each} a second": partial(load_row, engine, dataclasses.replace(traffic, rate=each))
            for each in arguments.rate
        },
    }
    settings: dict[str, Any] = {"weights": config.param_dtype, "cache": "fp8", "rows": engine.scheduler.limits.rows}
    for part in arguments.only:
        rows = []
        for label, case in cases[part].items():
            rows.append(measure.run_case(f"{part}, {label}", case))
            what = settings | ({"traffic": dataclasses.asdict(traffic)} if part == "load" else {})
            measure.record(arguments.out, {f"{part}: {name}": what | {"timings": rows}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
