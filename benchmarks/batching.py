"""Measures what other rows change in a row's logits, and what it costs that they change none:

  python -m benchmarks.batching      # writes benchmarks/results/batching.json

Rows of a slice of the 671B shape are run in one batch, alone, and behind a cached prefix. Their greedy tokens must be
equal wherever the best two logits differ by more than twice the largest difference that was measured between the runs;
the share of rows where they do not is reported. Under `batch_invariant` the bits must be equal. Its cost is that of a
decode step at some batches.
"""

import argparse
import pathlib
import statistics
import sys
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.decode_step import STEPS, WINDOWS, Case, fill, make_model, slice_of
from dsa_jax import Config, PagedCache, Runner

OUT = measure.RESULTS / "batching.json"
ALONE = 16  # rows that are run alone too
BATCHES = (1, 16, 64)  # of the steps that are timed


def make_prompts(config: Config, rows: int, chunk: int) -> list[np.ndarray]:
    """Draws prompts of more than half a chunk and up to a whole one: so one program serves each of them alone."""
    random = np.random.default_rng(0)
    lengths = random.integers(chunk // 2 + 1, chunk, size=rows)
    return [random.integers(0, config.vocab_size, size=length).astype(np.int32) for length in lengths]


def logits_of(runner: Runner, prompts, prefix: int = 0) -> np.ndarray:
    """Computes the logits behind each prompt and a step later, float32 [2, rows, vocab].

    Args:
      runner: its cache is emptied.
      prompts: of the rows.
      prefix: tokens of each that are run first, and stay in the cache.
    """
    cache = runner.cache
    for sequence in cache.sequences:
        cache.free(sequence)
    sequences = [cache.new() for _ in prompts]
    if prefix:
        runner.prefill(sequences, [prompt[:prefix] for prompt in prompts])
    first = np.asarray(runner.prefill(sequences, [prompt[prefix:] for prompt in prompts]).logits)[: len(prompts)]
    rows = runner.place(sequences)
    # Each row's step takes in its own first token again, so that what differs comes from the step.
    tokens = [[prompts[sequences.index(row)][0] if row is not None else 0] for row in rows]
    second = np.asarray(runner.extend(rows, np.asarray(tokens, np.int32)))[:, 0]
    return np.stack([first, second[[rows.index(sequence) for sequence in sequences]]])


def compare(runner: Runner, prompts) -> dict[str, Any]:
    """Compares logits in a batch with those alone and behind a cached prefix."""
    together = logits_of(runner, prompts)
    alone = np.concatenate([logits_of(runner, [prompt]) for prompt in prompts[:ALONE]], axis=1)
    prefixed = logits_of(runner, prompts, prefix=runner.prefill_chunk // 2)
    pairs = [(together[:, :ALONE], alone), (together, prefixed)]
    error = max(float(np.abs(a - b).max()) for a, b in pairs)
    second, best = np.sort(together, axis=-1)[..., -2:].transpose(2, 0, 1)
    near = best - second <= 2 * error
    unequal = [(a.argmax(-1) != b.argmax(-1)) for a, b in pairs]
    return {
        "rows": int(near.size),
        "deviation": float(together.std()),
        "error": error,
        "near_share": float(near.mean()),
        "unequal": int(sum(x.sum() for x in unequal)),
        "unequal_elsewhere": int(sum((x & ~near[:, : x.shape[1]]).sum() for x in unequal)),
        "same_bits": all(a.tobytes() == b.tobytes() for a, b in pairs),
    }


def time_steps(runner: Runner, batch: int, length: int) -> float:
    """Times a decode step of rows of one length, in seconds."""
    case = Case(runner, batch, length)
    kind = "truncated" if runner.batch_invariant else "greedy"
    case.steps(2, read=False, kind=kind)
    return statistics.median(case.steps(STEPS, read=True, kind=kind) for _ in range(WINDOWS))


def main() -> int:
    """Runs the rows both ways, records, and returns 1 where tokens differ that should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program on a CPU")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    positions = 256 if arguments.tiny else 8192
    sizes: dict[str, Any] = dict(num_hidden_layers=2, max_position_embeddings=positions)
    chunk = positions // 2
    if arguments.tiny:
        sizes |= dict(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128, index_fp8=True)
        config = Config.tiny(**sizes)
    else:
        config = slice_of(2, 1, max_position_embeddings=positions)
    model, prompts = make_model(config), make_prompts(config, arguments.rows, chunk)
    parts: dict[str, Any] = {}
    for invariant in (False, True):
        cache = PagedCache(config, max(BATCHES) * positions // 64, format="fp8")
        fill(cache)
        options = dict(batch_invariant=True) if invariant else dict(max_length=positions)
        runner = Runner(model, cache, prefill_chunk=chunk, **options)
        row = compare(runner, prompts)
        row["steps"] = [{"batch": n, "seconds": time_steps(runner, n, positions - 1)} for n in BATCHES]
        print(row, flush=True)
        parts["batch_invariant" if invariant else "default"] = row
        del cache, runner
    measure.record(arguments.out, parts)
    invariant, default = parts["batch_invariant"], parts["default"]
    return 0 if invariant["same_bits"] and not default["unequal_elsewhere"] else 1


if __name__ == "__main__":
    sys.exit(main())
