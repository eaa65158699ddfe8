"""The report of the study, from what was measured of each seed.

python -m studies.nsa.report studies/nsa/results/seed*.json --out studies/nsa/results
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure

from dsa_jax import Config
from dsa_jax.cache_shapes import cache_token_bytes, page_shapes
from dsa_jax.paged import PAGE
from studies.needle import scaling
from studies.needle.maps import NEEDLES, Maps, draw_maps, table_of
from studies.needle.questions import Cell
from studies.nsa.settings import DENSE, PRESETS, VARIANTS, sides
from train.commands.command import parse, run_command
from train.files import replace_text
from train.reporting.figures import hide_frame
from train.reporting.report import DPI, markdown_table
from train.reporting.results import as_text

RESULTS = Path(__file__).parent / "results"  # what was recorded
FORMAT = "fp8"  # of the cache whose bytes are counted, and which is timed
ALIKE = ("preset", "corpus", "sizes")  # in all seeds of a report

type Found = dict[str, Any]  # what was measured of one seed


def to_json(found: Found) -> str:
    """Writes what was measured of a seed."""
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def load(path: Path) -> Found:
    """Reads what was measured of a seed.

    Raises:
      ValueError: if it is not there, or is no such file.
    """
    try:
        found = json.loads(path.read_text())
        missing = {"seed", "variants", "timing", *ALIKE} - found.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} must hold what was measured of a seed: {type(error).__name__}: {error}") from error
    if missing or DENSE not in found["variants"]:
        raise ValueError(f"{path} must hold what was measured of a seed, got no {min(missing, default=DENSE)}")
    return found


def recorded() -> list[Found]:
    """Reads the seeds that were recorded, in their order."""
    return [load(path) for path in sorted(RESULTS.glob("seed*.json"))]


def check_alike(founds: Sequence[Found]) -> None:
    """Checks that seeds may stand in one table.

    Raises:
      ValueError: if there is none, one comes twice, or they differ in their settings or in what was trained.
    """
    seeds = [found["seed"] for found in founds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"a report must have at least one seed, and each once, got {seeds}")
    for found in founds[1:]:
        for name in ALIKE:
            if found[name] != founds[0][name]:
                raise ValueError(
                    f"all seeds of a report must have one {name}, seeds {founds[0]['seed']} and {found['seed']} differ"
                )
        if found["variants"].keys() != founds[0]["variants"].keys():
            raise ValueError(f"all seeds of a report must have the same variants, got {sorted(found['variants'])}")


def write(founds: Sequence[Found], folder: Path) -> Path:
    """Writes `report.md` and its figures; returns the path of the first.

    Args:
      founds: one a seed, of one setup and one corpus.
      folder: where they go.

    Raises:
      ValueError: as `check_alike`.
    """
    check_alike(founds)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"answers": draw_maps(_maps(founds)), "gaps": _draw_gaps(founds), "curves": _draw_curves(founds)}
    lines = ["# Native Sparse Attention beside DSA", ""]
    if not PRESETS[founds[0]["preset"]]().learns:
        lines += ["At this size needles are not learnt: the numbers show that all of the study runs.", ""]
    lines += [_where(founds), "", *_trained(founds), "", *_losses(founds), "", "![Losses by position](gaps.png)", ""]
    lines += [*_answers(founds), "", "![Answers by length and depth](answers.png)", "", *_cache(founds)]
    if founds[0]["timing"]:
        figures["timing"] = scaling.draw(founds[0]["timing"])
        lines += ["", *_times(founds[0]["timing"]), "", "![Times by length](timing.png)"]
    lines += ["", "## Curves", "", "![Losses of training](curves.png)"]
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)
    path = folder / "report.md"
    replace_text(path, "\n".join(lines) + "\n")
    return path


def summary(founds: Sequence[Found]) -> str:
    """Tells in Markdown what was recorded, or that nothing was: the documentation quotes it."""
    if not founds:
        return "No figures are recorded yet."
    check_alike(founds)
    length = max(map(int, founds[0]["variants"][DENSE]["answers"]["1"]))
    lines = [_where(founds), "", *_loss_table(founds), "", *_answer_table(founds, length), "", *_cache_table(founds)]
    if founds[0]["timing"]:
        lines += ["", *scaling.table(founds[0]["timing"])]
    return "\n".join(lines)


def _where(founds: Sequence[Found]) -> str:
    """Says what it ran on, and on which text."""
    places = {_place(**each["circumstances"]) for found in founds for each in found["variants"].values()}
    tokens = founds[0]["corpus"]["tokens"]
    seeds = ", ".join(str(found["seed"]) for found in founds)
    return (
        f"Seed{'s' if len(founds) > 1 else ''} {seeds}; preset `{founds[0]['preset']}`; "
        f"{'; '.join(sorted(places))}. The text has {tokens['train']:,} tokens, and "
        f"{tokens['held_out']:,} of whole packages are held out."
    )


def _place(date: str, device: str, jax: str, beside: str | None = None) -> str:
    return f"{date}, {device}, {jax}" + (f", beside {beside}, so that times are upper bounds" if beside else "")


def _trained(founds: Sequence[Found]) -> list[str]:
    """Says what each variant is, and what its training took."""
    sizes = founds[0]["sizes"]
    rows = []
    for name, own in founds[0]["variants"].items():
        phases = "; ".join(f"{phase}: {own['setup'][phase]}" for phase in own["seconds"])
        seconds = as_text([sum(found["variants"][name]["seconds"].values()) for found in founds], digits=0)
        rows.append((f"`{name}`", VARIANTS[name].says, own["setup"]["model"].partition(", ")[0], phases, seconds))
    return [
        "## What was trained",
        "",
        "All see the same rows in the same order, but for those of WARMUP, in which the indexer alone learns. What is "
        f"converted begins with `{DENSE}` after BASE. DSA and the window read K {sizes['K']} keys a query; NSA "
        f"{sizes['blocks']} blocks of {sizes['block']}, a window of {sizes['window']}, and an entry for every "
        f"{sizes['stride']} keys, compressed of {sizes['compression']}.",
        "",
        *markdown_table(("variant", "what it is", "model", "phases", "training, s"), rows),
    ]


def _losses(founds: Sequence[Found]) -> list[str]:
    return [
        "## Loss by position",
        "",
        f"Held-out losses of `{DENSE}` in nats a token, and how far the others lie above it, in percent of it; of "
        "several seeds the mean, and each seed's own in brackets.",
        "",
        *_loss_table(founds),
    ]


def _loss_table(founds: Sequence[Found]) -> list[str]:
    names = list(founds[0]["variants"])
    parts = {part: _part(part) for part in founds[0]["variants"][DENSE]["losses"] if part != "needles"}

    def cell(name: str, part: str) -> str:
        values = [found["variants"][name]["losses"].get(part) for found in founds]
        if name == DENSE:
            return as_text(values)
        gap = as_text(_gaps(founds, name, part), digits=2)
        return gap if gap == "–" else f"{gap} %"

    rows = [(text, *(cell(name, part) for name in names)) for part, text in parts.items()]
    return markdown_table(("loss of", *(f"`{name}`" for name in names)), rows)


def _gaps(founds: Sequence[Found], name: str, part: str) -> list[float | None]:
    """Percents by which the loss of a variant lies above the dense model's."""
    pairs = [tuple(found["variants"][each]["losses"].get(part) for each in (name, DENSE)) for found in founds]
    return [None if None in pair else 100 * (pair[0] / pair[1] - 1) for pair in pairs]


def _part(name: str) -> str:
    named = {"text": "all text", "answers": "digits of answers"}
    return named.get(name, name.replace(" to ", "–"))


def _maps(founds: Sequence[Found]) -> Maps:
    """Adds up the answers of all seeds."""
    own = ({name: each["answers"] for name, each in found["variants"].items()} for found in founds)
    return Maps.add([Maps.from_json(each) for each in own])


def _answers(founds: Sequence[Found]) -> list[str]:
    return [
        "## Answers",
        "",
        "What share of the questions for needles is answered right, all digits of it, over all depths and seeds, and "
        "in brackets the 95 % interval.",
        "",
        *table_of(_maps(founds)),
    ]


def _answer_table(founds: Sequence[Found], length: int) -> list[str]:
    """The right answers at one length."""
    header = f"right answers at {length:,} tokens", *(f"{n} needle{'s' * (n > 1)} a row" for n in NEEDLES)
    rows = []
    for name, own in _maps(founds).cells.items():
        cells = [Cell.sum(own[n][length]) for n in NEEDLES if length in own.get(n, {})]
        rows.append((f"`{name}`", *(f"{cell.share:.1%} of {cell.asked}" for cell in cells)))
    return markdown_table(header[: max(map(len, rows))], rows)


def _cache(founds: Sequence[Found]) -> list[str]:
    return [
        "## Cache",
        "",
        "Bytes of cache that a token takes in all layers, latents, entries and index keys in FP8. Held is what this "
        "library keeps: for the window and for dense attention all latents and index keys. Needed is what the method "
        "has to keep: of NSA an entry beside every few latents, of the window the last K latents however long the "
        "text, here a token's share of them at the length of the study.",
        "",
        *_cache_table(founds),
    ]


def _cache_table(founds: Sequence[Found]) -> list[str]:
    preset = PRESETS[founds[0]["preset"]]()
    rows = []
    for name, side in sides(preset, max(preset.lengths)).items():
        config = dataclasses.replace(side.config, index_fp8=True)
        pool = page_shapes(config, 1, FORMAT)[0]
        latents, held = pool.size * pool.dtype.itemsize // PAGE, cache_token_bytes(config, FORMAT)
        rows.append((f"`{name}`", f"{held:,}", f"{_needed(name, config, latents, held, max(preset.lengths)):,.0f}"))
    return markdown_table(("cache of a token, bytes", "held", "needed"), rows)


def _needed(name: str, config: Config, latents: int, held: int, length: int) -> float:
    if name == "window":
        return latents * min(1.0, config.index_topk / length)
    return latents if name == DENSE else held


def _times(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        "## Time and memory by length",
        "",
        "One row of random tokens, random weights, one seed's machine. Memory is what a program needs beside its "
        "arguments. Decode is of one sequence through pages of an FP8 cache, the host's time included. NSA's reads "
        "the entries that its cache keeps, the selected blocks and the window.",
        "",
        *scaling.table([dict(row) for row in rows]),
    ]


def _draw_gaps(founds: Sequence[Found]) -> Figure:
    """Draws how far losses lie above the dense model's by position, means of all seeds."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    parts = [part for part in founds[0]["variants"][DENSE]["losses"] if part.startswith("positions")]
    for number, name in enumerate(founds[0]["variants"]):
        if name != DENSE:
            gaps = [[gap for gap in _gaps(founds, name, part) if gap is not None] for part in parts]
            means = [sum(each) / len(each) if each else float("nan") for each in gaps]
            axes.plot(range(len(parts)), means, "o-", color=f"C{number}", linewidth=1, label=name)
    axes.set_xticks(range(len(parts)), [part.split()[-1] for part in parts], fontsize=8)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xlabel("up to position")
    axes.set_ylabel("loss above the dense model's, %")
    if len(founds[0]["variants"]) > 1:
        axes.legend(frameon=False, fontsize=8)
    hide_frame(axes)
    return figure


def _draw_curves(founds: Sequence[Found]) -> Figure:
    """Draws the loss of the last phase of every variant, over the same rows, one line a seed."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for found in founds:
        for number, (name, own) in enumerate(found["variants"].items()):
            curve = list(own["curves"].values())[-1]
            label = name if found is founds[0] else None
            axes.plot(curve["lm_loss"], color=f"C{number}", linewidth=0.8, label=label)
    axes.set_xlabel("step of the last phase")
    axes.set_ylabel("language-model loss, nats")
    axes.legend(frameon=False, fontsize=8)
    hide_frame(axes)
    return figure


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes the report of several seeds, each measured on its own."""

    seeds: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files that `python -m studies.nsa` left, one a seed."""
    out: Path = RESULTS
    """Folder of the report."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input becomes one line on stderr and exit status 2."""
    given = sys.argv[1:] if arguments is None else arguments

    def report() -> None:
        chosen = parse(Arguments, given, "python -m studies.nsa.report")
        founds = sorted((load(path) for path in chosen.seeds), key=lambda found: found["seed"])
        print(f"Report: {write(founds, chosen.out)}")

    return run_command(report)


if __name__ == "__main__":
    sys.exit(main())
