"""The report of the study, from what was measured of each seed: verdicts first, then the maps and what explains them.

python -m studies.needle.report studies/needle/results/seed*.json --out studies/needle/results
"""

import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from studies.needle import ablations, scaling
from studies.needle.charts import draw_curves, draw_distances, draw_gaps
from studies.needle.found import Found, gaps_by_position
from studies.needle.maps import Maps, draw_maps, table_of
from studies.needle.questions import Cell
from train.commands.command import parse, run_command
from train.files import replace_text
from train.reporting.layout import Goal, Layout
from train.reporting.report import DPI, markdown_table, write_report
from train.reporting.results import Results, SeedResult, as_text

PART_NAMES = {"text": "held-out text", "needles": "text with needles", "answers": "digits of answers"}
SPARSE, CONTROL, BASE, WARMUP = "SPARSE, sparse", "DENSE_CONTROL, dense", "BASE, dense", "WARMUP, sparse"
WITHIN, AIM = 0.01, 0.003  # of the control's loss, in every range of positions and seed
POINT = 0.01  # of the share of right answers

type Read = Callable[[Found], Mapping[str, Mapping[str, float | None]]]  # reads losses by name and part


def write(founds: Sequence[Found], folder: Path, *, learns: bool = True) -> Path:
    """Writes `report.md`, its figures and `results.json`; returns the path of the first.

    Args:
      founds: one a seed, of one setup and one corpus.
      folder: where they go.
      learns: whether the model was to learn needles; without it the report says so, and has no verdicts.

    Raises:
      ValueError: if there is none, a seed comes twice, or setup or corpus differ.
    """
    check_alike(founds)
    results = Results(
        "needle",
        dict(founds[0].setup),
        [SeedResult(f.seed, f.evaluation, f.curves, f.seconds) for f in founds],
        sum(sum(f.seconds.values()) for f in founds),
        max_rss=None,  # that of the process which writes would say nothing
    )
    layout = Layout(
        part_names=PART_NAMES,
        drawn_parts=("text", "answers"),
        summary_losses={"answers": "loss at the digits of answers"},
        goals=(lambda results: verdicts(founds)) if learns else lambda results: [],
    )
    path = write_report(results, folder, layout)
    maps = Maps.add([found.answers for found in founds])
    figures = {"answers": draw_maps(maps), "distances": draw_distances(founds), "curves": draw_curves(founds)}
    figures |= {"gaps": draw_gaps(founds)}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)
    lines = path.read_text().splitlines()
    if not learns:
        lines[1:1] = ["", "At this size needles are not learnt: the numbers show that all of the study runs."]
    sections = [_answers(maps, founds), _behind(founds), _sources(founds), _agreement(founds), _inside(founds)]
    changes = change_rows(folder, founds)
    sections += [_curves(), _scaling(folder), ["## One change each", "", *changes] if changes else [], _corpus(founds)]
    for section in sections:
        lines += ["", *section] if section else []
    replace_text(path, "\n".join(lines) + "\n")
    return path


def check_alike(founds: Sequence[Found]) -> None:
    """Checks that seeds may stand in one table.

    Raises:
      ValueError: if there is none, one comes twice, or two have another setup or corpus.
    """
    if not founds:
        raise ValueError("a report must have at least one seed, got none")
    seeds = [found.seed for found in founds]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"every seed must come once, got {seeds}")
    first = founds[0]
    for other in founds[1:]:
        for name in ("setup", "corpus"):
            mine, its = getattr(first, name), getattr(other, name)
            if mine != its:
                differs = [key for key in {*mine, *its} if mine.get(key) != its.get(key)]
                raise ValueError(
                    f"all seeds of a report must have one {name}: seeds {first.seed} and {other.seed} differ in "
                    f"{', '.join(sorted(differs))}"
                )


# Verdicts.


def verdicts(founds: Sequence[Found]) -> list[Goal]:
    """Compares what came with what was asked for; without controls only what needs none."""
    goals = [_one_needle(founds), _generated(founds)]
    if all(CONTROL in found.losses for found in founds):
        goals += [_eight_needles(founds), *_losses(founds)]
    return goals


def whole(found: Found, name: str, needles: int) -> Cell:
    """The answers of one subject at the longest rows, over all depths."""
    rows = found.answers.cells[name][needles]
    return Cell.sum(rows[max(rows)])


def _one_needle(founds: Sequence[Found]) -> Goal:
    cells = [whole(found, SPARSE, 1) for found in founds]
    shown = ", ".join(f"{cell.right} of {cell.asked}" for cell in cells)
    length = max(founds[0].answers.cells[SPARSE][1])
    return Goal(
        f"one needle in {length:,} tokens is to be found always, in every seed: {shown}",
        all(cell.right == cell.asked for cell in cells),
    )


def _eight_needles(founds: Sequence[Found]) -> Goal:
    pairs = [(whole(found, SPARSE, 8), whole(found, CONTROL, 8)) for found in founds]
    shown = ", ".join(f"{ours.share:.1%} and {dense.share:.1%}" for ours, dense in pairs)
    return Goal(
        f"eight needles are to be answered within one point of the dense control, in every seed: sparse and dense "
        f"{shown}",
        all(ours.share >= dense.share - POINT for ours, dense in pairs),
    )


def _losses(founds: Sequence[Found]) -> list[Goal]:
    gaps = [gap for found in founds for gap in gaps_by_position(found, SPARSE, CONTROL).values()]
    text = f"the largest gap to the dense control's loss, over all positions and seeds: {max(gaps):.2%}"
    return [
        Goal(f"{text}, within {WITHIN:.0%}", max(gaps) <= WITHIN),
        Goal(f"{text}, within {AIM:.1%}", max(gaps) <= AIM),
    ]


def _generated(founds: Sequence[Found]) -> Goal:
    pairs = [(found.generated["generated"], found.generated["forward"]) for found in founds]
    shown = ", ".join(f"{ours.right} and {forward.right} of {ours.asked}" for ours, forward in pairs)
    return Goal(
        "answers generated through pages of an FP8 cache are to be as often right as those of the forward pass: "
        f"{shown}",
        all(ours.right >= forward.right for ours, forward in pairs),
    )


# Sections.


def _answers(maps: Maps, founds: Sequence[Found]) -> list[str]:
    whole = {name: Cell.sum(found.generated[name] for found in founds) for name in ("generated", "forward")}
    return [
        "## Answers",
        "",
        "What share of the questions for needles is answered right, all digits of it, over all depths and seeds, and "
        "in brackets the 95 % interval. Where a row has eight needles, all are asked for, one after the other.",
        "",
        *table_of(maps),
        "",
        "![Answers by length and depth](answers.png)",
        "",
        "Generated greedily through pages of an FP8 cache, the indexer in FP8 too, "
        f"{whole['generated'].right} of {whole['generated'].asked} answers of the longest rows with eight needles are "
        f"right; by the forward pass {whole['forward'].right} of the same.",
    ]


def gap_table(founds: Sequence[Found]) -> list[str]:
    """The table of losses by position beside the dense model's."""
    pairs = [("before", WARMUP, BASE), ("after", SPARSE, CONTROL), ("window", "WINDOW_CONTROL, last K keys", CONTROL)]
    pairs = [(name, a, b) for name, a, b in pairs if all(a in f.losses and b in f.losses for f in founds)]
    names = {"before": "after WARMUP, to BASE", "after": "after SPARSE, to its control"}
    names |= {"window": "trained with the window, to the control"}
    gaps = {name: [gaps_by_position(found, a, b) for found in founds] for name, a, b in pairs}
    ranges = list(next(iter(gaps.values()))[0])
    header = "positions", *(names[name] for name in gaps)
    rows = [
        (_positions(each), *(_percent([gap.get(each) for gap in found]) for found in gaps.values())) for each in ranges
    ]
    ratios = [
        (
            "perplexity ratio, all positions",
            *(
                as_text([_ratio(found.losses[a]["text"], found.losses[b]["text"]) for found in founds], digits=4)
                for _, a, b in pairs
            ),
        )
    ]
    return markdown_table(header, rows + ratios)


def _behind(founds: Sequence[Found]) -> list[str]:
    """Losses by position beside the dense model's."""
    return [
        "## Loss by position",
        "",
        "How far the sparse model's loss on held-out text lies above the dense model's that was trained on the same "
        "tokens in the same order, in percent of it; of several seeds the mean, and each seed's own in brackets. What "
        "SPARSE recovers is the difference between the first two columns.",
        "",
        *gap_table(founds),
        "",
        "![Gap of the loss by position](gaps.png)",
    ]


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else math.exp(ours - theirs)


def _sources(founds: Sequence[Found]) -> list[str]:
    """Where the loss comes from, in nats."""

    warmed: Read = lambda found: found.warmed.losses  # noqa: E731
    final: Read = lambda found: found.final.losses  # noqa: E731
    differences: list[tuple[str, Read, str, str]] = [
        ("feasibility: oracle top-K to all keys, after WARMUP", warmed, "oracle", "dense"),
        ("indexer error: indexer to oracle, after WARMUP", warmed, "indexer", "oracle"),
        ("the same after SPARSE: oracle to all keys", final, "oracle", "dense"),
        ("the same after SPARSE: indexer to oracle", final, "indexer", "oracle"),
    ]
    if all(CONTROL in found.losses for found in founds):
        text = "what is left after adaptation: SPARSE to its dense control"
        differences.append((text, lambda found: found.losses, SPARSE, CONTROL))

    def mean_difference(read: Read, ours: str, theirs: str, part: str) -> str:
        pairs = [(read(found)[ours][part], read(found)[theirs][part]) for found in founds]
        return as_text([None if a is None or b is None else a - b for a, b in pairs], digits=4)

    parts = [part for part in PART_NAMES if founds[0].warmed.losses["dense"].get(part) is not None]
    rows = [(name, *(mean_difference(read, a, b, part) for part in parts)) for name, read, a, b in differences]
    return [
        "## Where the loss comes from",
        "",
        "Differences of held-out losses in nats a token. Feasibility is what K keys cost at best, the indexer's error "
        "what its choice costs beyond that; adaptation is the training through the selection.",
        "",
        *markdown_table(("difference", *(PART_NAMES[part] for part in parts)), rows),
    ]


def _agreement(founds: Sequence[Found]) -> list[str]:
    pairs = list(founds[0].agreement)
    parts = list(founds[0].agreement[pairs[0]])
    rows = [
        (
            pair.replace(" | ", " and "),
            *(as_text([found.agreement[pair].get(part) for found in founds]) for part in parts),
        )
        for pair in pairs
    ]
    return [
        "## Agreement",
        "",
        "The share of places in held-out text at which two models hold the same token likeliest.",
        "",
        *markdown_table(("models", *(_positions(part) for part in parts)), rows),
    ]


def _inside(founds: Sequence[Found]) -> list[str]:
    layers = len(founds[0].inside["text"].overlap)
    lines = [
        "## Selections of layers, and distances",
        "",
        "The share of the keys that a layer's indexer selects which another layer's selects too, over queries that "
        "reach at least four times K keys: what sharing a selection between layers would cost.",
    ]
    kinds = {kind: [found.inside[kind] for found in founds if kind in found.inside] for kind in founds[0].inside}
    for kind, own in kinds.items():
        share = lambda a, b, own=own: as_text([each.overlap[a][b] for each in own])  # noqa: E731
        rows = [(f"layer {a}", *(share(a, b) for b in range(layers))) for a in range(layers)]
        lines += [
            "",
            f"**{_kind(kind)}**",
            "",
            *markdown_table(("selected by", *(f"layer {b}" for b in range(layers))), rows),
        ]
    ends = founds[0].inside["text"].distances
    lines += [
        "",
        "Attention mass by the distance between query and key, and the share of it that each selection keeps, means "
        "over layers:",
    ]
    for kind, own in kinds.items():
        rows = []
        for place, (low, high) in enumerate(zip((0, *ends), ends, strict=False)):
            mass = lambda name, own=own, place=place: [  # noqa: E731
                sum(layer[place] for layer in each.mass[name]) / layers for each in own
            ]
            whole = mass("all")
            kept = [
                as_text([part / all_ if all_ else None for part, all_ in zip(mass(name), whole, strict=True)])
                for name in ("indexer", "oracle", "window")
            ]
            rows.append((f"{low:,} to {high - 1:,}", as_text(whole), *kept))
        header = "distance", "mass", "indexer keeps", "oracle", "last K keys"
        lines += ["", f"**{_kind(kind)}**", "", *markdown_table(header, rows)]
    return [*lines, "", "![Attention mass by distance](distances.png)"]


def _kind(kind: str) -> str:
    return {"text": "Queries of held-out text", "answers": "Queries that predict digits of answers"}[kind]


def _curves() -> list[str]:
    return ["## Curves", "", "![Losses, KL of each layer and gradient norms of every phase](curves.png)"]


def _scaling(folder: Path) -> list[str]:
    """Times by length, where they were measured."""
    path = folder / scaling.FILE
    if not path.exists():
        return []
    recorded = json.loads(path.read_text())
    where, rows = recorded["circumstances"], recorded["rows"]
    scaling.draw(rows).savefig(folder / "scaling.png", dpi=DPI)
    places = {name: scaling.crossover(rows, work) for work, name in scaling.WORKS.items()}
    said = "; ".join(f"{name} from {place:,.0f} tokens on" for name, place in places.items() if place is not None)
    return [
        "## Time and memory by length",
        "",
        f"One row of random tokens, random weights, {where['device']}, jax {where['jax']}, {where['date']}. Memory is "
        "what a program needs beside its arguments. Decode is through pages of an FP8 cache, the host's time included. "
        f"Sparse takes less time than dense: {said or 'at none of these lengths'}.",
        "",
        *scaling.table(rows),
        "",
        "![Times by length](scaling.png)",
    ]


def change_rows(folder: Path, founds: Sequence[Found]) -> list[str]:
    """Writes what one change each costs, if that was measured.

    Raises:
      ValueError: if they were trained on another corpus.
    """
    path = folder / ablations.FILE
    if not path.exists():
        return []
    recorded = json.loads(path.read_text())
    if recorded["tokenizer"] != founds[0].corpus["tokenizer"]:
        raise ValueError(f"{path} must be of the corpus of the seeds, got rows of another tokenizer")
    rows = recorded["rows"]
    said = (
        "Each row converts the same dense model at 16K tokens, one seed. Losses are those of held-out text, in percent "
        "of the loss of the dense model that was continued for as many steps of the same batches."
    )
    if any("beside" in row for row in rows.values()):
        said += " Where other work ran on the device meanwhile, the seconds are an upper bound (≤)."
    return [*textwrap.wrap(said, 120), "", *ablations.table(rows, int(founds[0].setup["K"]))]


def ran_on(founds: Sequence[Found]) -> str:
    """Names the devices, the version of jax and the days."""
    devices = {(found.circumstances["device"], found.circumstances["jax"]) for found in founds}
    where = "; ".join(f"{device}, jax {version}" for device, version in sorted(devices))
    return f"{where}; {', '.join(sorted({found.circumstances['date'] for found in founds}))}"


def _corpus(founds: Sequence[Found]) -> list[str]:
    corpus = founds[0].corpus
    sizes = {
        split: (
            sum(package["split"] == split for package in corpus["packages"]),
            sum(package["bytes"] for package in corpus["packages"] if package["split"] == split),
        )
        for split in ("train", "held_out")
    }
    left_out = ", ".join(f"{each['files']:,} files {name}" for name, each in corpus["left_out"].items())
    waited = as_text([100 * found.waited for found in founds], digits=2)
    return [
        "## What it ran on",
        "",
        f"{ran_on(founds)}. Of the time of training, the device waited {waited} % for data.",
        *(
            f"Beside seed {found.seed} the device also did other work ({found.circumstances['beside']}): its seconds "
            "are upper bounds."
            for found in founds
            if "beside" in found.circumstances
        ),
        "",
        f"The text is that of {sizes['train'][0]} packages ({sizes['train'][1] / 1e6:.0f} MB, "
        f"{corpus['tokens']['train']:,} tokens); {sizes['held_out'][0]} whole packages are held out "
        f"({sizes['held_out'][1] / 1e6:.0f} MB, {corpus['tokens']['held_out']:,} tokens). Left out of it: {left_out}. "
        "Packages, versions and hashes stand in the file of each seed; the tokenizer's is "
        f"{corpus['tokenizer'][:12]}.",
    ]


def _positions(name: str) -> str:
    return name.removeprefix("positions ").replace(" to ", "–") if name.startswith("positions") else PART_NAMES[name]


def _percent(values: Sequence[float | None]) -> str:
    text = as_text([None if value is None else 100 * value for value in values], digits=2)
    return text if text == "–" else f"{text} %"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes the report of several seeds, each measured on its own."""

    seeds: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files that `python -m studies.needle` left, one a seed."""
    out: Path = Path(__file__).parent / "results"
    """Folder of the report."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input becomes one line on stderr and exit status 2."""
    given = sys.argv[1:] if arguments is None else arguments

    def report() -> None:
        chosen = parse(Arguments, given, "python -m studies.needle.report")
        founds = sorted((Found.load(path) for path in chosen.seeds), key=lambda found: found.seed)
        print(f"Report: {write(founds, chosen.out)}")

    return run_command(report)


if __name__ == "__main__":
    sys.exit(main())
