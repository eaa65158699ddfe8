"""Reads what GPUs did from the traces of JAX's profiler."""

import collections
import dataclasses
import glob
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
)
OTHERS = "others"  # collectives whose kind a launch does not tell


@dataclasses.dataclass(frozen=True)
class Launch:
    """Holds a kernel or copy that a GPU ran: its GPU, its instruction if that is known, and its seconds."""

    gpu: str
    name: str
    instruction: str | None
    begin: float
    end: float

    @property
    def collective(self) -> str | None:
        """The kind of collective that it belongs to, None if it computes."""
        instruction = (self.instruction or "").replace("_", "-")
        found = next((kind for kind in COLLECTIVES if kind in instruction), None)
        return found or (OTHERS if "nccl" in self.name.lower() else None)


def read_launches(folder: str) -> list[Launch]:
    """Lists what the GPUs ran, of all traces in a folder."""
    found = []
    for path in glob.glob(folder + "/**/*.trace.json.gz", recursive=True):
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
        threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
        for each in events:
            gpu = names.get(each.get("pid"), "")
            if each.get("ph") == "X" and "GPU" in gpu and "Stream" in threads.get((each["pid"], each["tid"]), ""):
                begin = each["ts"] * 1e-6
                instruction = each.get("args", {}).get("hlo_op")
                found.append(Launch(gpu, each["name"], instruction, begin, begin + each["dur"] * 1e-6))
    return found


def collective_seconds(launches: Iterable[Launch]) -> dict[str, Any]:
    """Adds up, of the GPU that waits longest, the seconds of collectives and those in which it computed nothing else.

    Collectives that wait for another GPU take time too.

    Returns:
      "collective_seconds", "exposed_seconds", and "kinds", the seconds of each kind; all 0 and empty without any.
    """
    rows = [_of_gpu(each) for each in _by_gpu(launches).values()]
    nothing = {"collective_seconds": 0.0, "exposed_seconds": 0.0, "kinds": {}}
    return max(rows, key=lambda row: row["exposed_seconds"], default=nothing)


def _by_gpu(launches: Iterable[Launch]) -> dict[str, list[Launch]]:
    found: dict[str, list[Launch]] = collections.defaultdict(list)
    for launch in launches:
        found[launch.gpu].append(launch)
    return found


def _of_gpu(launches: Sequence[Launch]) -> dict[str, Any]:
    compute = union((x.begin, x.end) for x in launches if not x.collective)
    kinds: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for launch in launches:
        if launch.collective:
            kinds[launch.collective].append((launch.begin, launch.end))
    together = union(span for spans in kinds.values() for span in spans)
    return {
        "collective_seconds": length(together),
        "exposed_seconds": length(together) - overlap(together, compute),
        "kinds": {kind: length(union(spans)) for kind, spans in sorted(kinds.items())},
    }


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Joins spans that touch.

    Examples:
      >>> union([(3, 4), (0, 1), (1, 2)])
      [(0, 2), (3, 4)]
    """
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def length(spans: Iterable[tuple[float, float]]) -> float:
    """Adds up the lengths of spans that do not touch."""
    return sum(end - begin for begin, end in spans)


def overlap(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """Adds up what two sorted lists of spans have in common.

    Examples:
      >>> overlap([(0, 4), (6, 8)], [(1, 2), (3, 7)])
      3
    """
    total, i, j = 0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total


def seconds_by_instruction(launches: Iterable[Launch]) -> Mapping[str, list[float]]:
    """Lists the seconds of every launch by its instruction, or by its own name where that is not known."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for launch in launches:
        found[launch.instruction or launch.name].append(launch.end - launch.begin)
    return found


def kernels_of_step(launches: Iterable[Launch], steps: int, longest: int = 14) -> dict[str, Any]:
    """Says what the GPU that is busiest did in a step, of launches of so many.

    Returns:
      "kernel_seconds" and "kernels", their number, of a step; "idle_share", of the time from the first to the last in
      which none ran; "longest", the seconds of a step by the names of those that take most. Without launches "trace"
      alone, which says so.
    """
    by_gpu = _by_gpu(launches)
    if not by_gpu:
        return {"trace": "no events of a GPU"}
    spans = {gpu: union((x.begin, x.end) for x in each) for gpu, each in by_gpu.items()}
    busiest = max(spans, key=lambda gpu: length(spans[gpu]))
    seconds: dict[str, float] = collections.defaultdict(float)
    for launch in by_gpu[busiest]:
        seconds[launch.name] += launch.end - launch.begin
    ranked = sorted(seconds.items(), key=lambda item: -item[1])[:longest]
    began, ended = spans[busiest][0][0], spans[busiest][-1][1]
    return {
        "kernel_seconds": sum(seconds.values()) / steps,
        "idle_share": 1 - length(spans[busiest]) / (ended - began),
        "kernels": len(by_gpu[busiest]) / steps,
        "longest": {name[:60]: each / steps for name, each in ranked},
    }
