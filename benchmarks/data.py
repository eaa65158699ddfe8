"""Times the data of training: opening a large corpus, and reading its rows:  python -m benchmarks.data

No GPU is needed, but 2.1 GB of disk for a while. Writes benchmarks/results/data.json. Each part runs in a process of
its own, so that what it needs of memory is its own. The best of several windows counts, for other programs may run; the
time of the processor stands beside it.
"""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import measure
from train.data import DataConfig, load
from train.data.indexed import IndexedWriter
from train.data.manifest import Manifest, Shard

OUT = measure.RESULTS / "data.json"
SHARDS, SHARD_TOKENS = 1000, 10**6
MEAN_DOCUMENT = 1000  # tokens; lengths are log-normal, as those of text
VOCABULARY = 50_000
LENGTH = 131072
WINDOWS = 7  # of which the best counts
WINDOW_ROWS = 256
OPENINGS = 3  # processes that open the corpus
PARTS = ("opening", "concat", "best_fit")


def write_corpus(folder: pathlib.Path) -> None:
    """Writes 10^9 tokens in 1000 shards."""
    rng, shards = np.random.default_rng(0), []
    for number in range(SHARDS):
        name = f"shard-{number:05d}"
        writer = IndexedWriter(folder / name, np.uint16)
        tokens = rng.integers(VOCABULARY, size=SHARD_TOKENS, dtype=np.uint16)
        lengths = np.maximum(rng.lognormal(0, 1, 4 * SHARD_TOKENS // MEAN_DOCUMENT) * MEAN_DOCUMENT / np.e**0.5, 1)
        ends = np.cumsum(lengths.astype(int))
        for document in np.split(tokens, ends[ends < SHARD_TOKENS]):
            writer.add(document)
        shards.append(Shard(name, **dataclasses.asdict(writer.close())))
    Manifest(folder, None, VOCABULARY, "uint16", None, tuple(shards), ()).save()


def resident_mib() -> float:
    """Measures the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def time_opening(folder: str) -> dict[str, Any]:
    """Opens the corpus; `mib` is what that added to what Python and its libraries have already."""
    before, began, cpu = resident_mib(), time.perf_counter(), time.process_time()
    corpus = load(DataConfig(data=(folder,)), vocab_size=VOCABULARY)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    found = {"seconds": seconds, "cpu_seconds": cpu, "mib": resident_mib() - before, "process_mib": resident_mib()}
    return found | {"tokens": corpus.tokens("train") + corpus.tokens("held_out"), "shards": SHARDS}


def time_rows(folder: str, pack: str) -> dict[str, Any]:
    """Reads rows in one thread, from the page cache: all rows of a window have been read before it begins.

    The reading before makes rows of its own, so that the choice of documents for rows, as `best_fit` has, is timed.
    """
    corpus = load(DataConfig(data=(folder,), pack=pack), vocab_size=VOCABULARY)
    before, rows = (corpus.rows("train", batch_size=1, seq_len=LENGTH, seed=0) for _ in range(2))
    times = []
    for number in range(WINDOWS):
        for each in (before, rows):
            began, cpu = time.perf_counter(), time.process_time()
            for row in range(number * WINDOW_ROWS, (number + 1) * WINDOW_ROWS):
                each.batch([row], [(0, LENGTH)])
            if each is rows:
                times.append((time.perf_counter() - began, time.process_time() - cpu))
    rate, cpu_rate = (WINDOW_ROWS * LENGTH / np.array(each) for each in zip(*times, strict=True))
    waste = rows.waste()
    (lost,) = waste.values()
    return {
        "length": LENGTH,
        "tokens_per_second": float(rate.max()),
        "least_tokens_per_second": float(rate.min()),
        "tokens_per_cpu_second": float(cpu_rate.max()),
        "padding": lost.padding,
        "cut_documents": lost.cut,
    }


def run_part(part: str, folder: str) -> dict[str, Any]:
    """Runs a part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data", "--part", part, folder]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Writes the corpus, and records the parts."""
    if sys.argv[1:2] == ["--part"]:
        _, _, part, folder = sys.argv
        print(json.dumps(time_opening(folder) if part == "opening" else time_rows(folder, part)))
        return
    names, out = measure.command_line(__doc__, PARTS, OUT, on_gpu=False)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(pathlib.Path(folder))
        for name in names:
            found = [run_part(name, folder) for _ in range(OPENINGS if name == "opening" else 1)]
            best = min(found, key=lambda part: part.get("seconds", 0.0))
            measure.record(out, {name: best | {"cores": os.cpu_count()}})
            print(name, json.dumps(best), flush=True)


if __name__ == "__main__":
    main()
