"""A run's findings: `results.json`, and from it `report.md` with figures, and a table for the terminal.

`python -m train.report runs/tiny` writes report and figures again from `results.json` alone.
"""

import dataclasses
import json
import math
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from rich.console import Console
from rich.table import Table

from train.evaluate import MIN_REACH, PARTS, Evaluation, KeptMass, Parts
from train.phases import CONTROLS

GOAL_GAP = 0.5  # share of the gap from the window to the oracle that the trained indexer must close
CHANCE = math.log(8)  # at an answer of a recall episode
DPI = 130

SELECTIONS = {  # every selection measured: its name in the report, its colour
    "dense": ("dense, all keys", "#222222"),
    "oracle": ("oracle top-K of the attention", "#7f7f7f"),
    "indexer": ("trained indexer", "#1f5fa8"),
    "warmed": ("indexer after warm-up alone", "#7fb2e5"),
    "untrained": ("untrained indexer", "#c9def2"),
    "window": ("last K keys", "#e08214"),
    "random": ("K random keys", "#d9c9b0"),
}
PART_NAMES = {"all": "training's mixture", "text": "text", "recall": "recall episodes", "answers": "recall answers"}

type Curve = dict[str, list[float]]  # "step" counted over the run, and "lm_loss" or "kl" at each


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """What one seed found."""

    seed: int
    evaluation: Evaluation
    curves: dict[str, Curve]
    """By phase, in the order trained; see `read_curves`."""
    seconds: dict[str, float]
    """Wall time of each phase and of the evaluation."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """A number that was asked for, and what came."""

    text: str
    met: bool


@dataclasses.dataclass(frozen=True)
class Results:
    """All that the report says."""

    name: str
    setup: dict[str, str | int | float]
    """What was run, as shown: model, sequence length, K, steps."""
    seeds: list[SeedResult]
    seconds: float
    """Wall time of everything."""
    max_rss: int
    """Peak resident memory in bytes."""
    limit_seconds: float | None = None
    limit_rss: int | None = None
    sample: str | None = None
    """A sampled continuation."""

    def __post_init__(self):
        if not self.seeds:
            raise ValueError("results must hold at least one seed, got none")

    def goals(self) -> list[Goal]:
        """What was asked for, missed goals first."""
        trained = any("kl" in curve for seed in self.seeds for curve in seed.curves.values())
        goals = [self._gap_goal()] if trained else []
        if self.limit_seconds is not None:
            text = f"the run took {_duration(self.seconds)}; at most {_duration(self.limit_seconds)} was asked"
            goals.append(Goal(text, self.seconds <= self.limit_seconds))
        if self.limit_rss is not None:
            text = f"memory peaked at {_gib(self.max_rss)}; at most {_gib(self.limit_rss)} was asked"
            goals.append(Goal(text, self.max_rss <= self.limit_rss))
        return sorted(goals, key=lambda goal: goal.met)

    def _gap_goal(self) -> Goal:
        asked = f"at least {GOAL_GAP} was asked"
        gaps = [seed.evaluation.kept.mean_gap_closed() for seed in self.seeds]
        mean = _mean(gaps)
        if mean is None:
            return Goal(f"the gap from the window to the oracle could not be measured; {asked} to be closed", False)
        text = f"the trained indexer closes {_several(gaps)} of the gap from the last K keys to the oracle; {asked}"
        return Goal(text, mean >= GOAL_GAP)

    def save(self, folder: Path) -> None:
        """Writes `results.json`."""
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        (folder / "results.json").write_text(text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote; ValueError if it is not there or not whole."""
        path = folder / "results.json"
        try:
            values = json.loads(path.read_text())
            seeds = [_seed_result(seed) for seed in values.pop("seeds")]
            return cls(seeds=seeds, **values)
        except OSError as error:
            raise ValueError(f"a finished run must have {path}: {error.strerror}") from error
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} must hold the results of a run, got {type(error).__name__}: {error}") from error


def _seed_result(values: dict[str, Any]) -> SeedResult:
    evaluation = values.pop("evaluation")
    kept = KeptMass(**evaluation.pop("kept"))
    return SeedResult(evaluation=Evaluation(kept=kept, **evaluation), **values)


def read_curves(records: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """The curves of each phase from the lines of `metrics.jsonl`."""
    curves: dict[str, Curve] = {}
    for record in records:
        curve = curves.setdefault(record["phase"], {})
        for name in ("step", "lm_loss", "kl"):
            if name in record:
                curve.setdefault(name, []).append(record[name])
    return curves


def max_rss() -> int:
    """This process's peak resident memory so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write_report(results: Results, folder: Path) -> Path:
    """Writes `results.json`, the figures and `report.md`; returns the path of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder)
    figures = {"training": _training_figure, "kept_mass": _kept_mass_figure, "answers": _answers_figure}
    drawn = set()
    for name, draw in figures.items():
        figure = draw(results)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=DPI)
            drawn.add(name)
    path = folder / "report.md"
    path.write_text(markdown(results, drawn))
    return path


def markdown(results: Results, figures: Iterable[str] = ()) -> str:
    """The report; `figures` are those that were drawn. A missed goal stands first."""
    goals = results.goals()
    lines = [f"# {_title(results)}", ""]
    lines += [f"- {'Met' if goal.met else '**Missed**'}: {goal.text}." for goal in goals]
    several = len(results.seeds) > 1
    if several:
        seeds = ", ".join(str(seed.seed) for seed in results.seeds)
        lines += ["", f"Numbers are means over the seeds {seeds}, then each seed's own in brackets."]
    lines += ["", *_table(("setting", "value"), [(key, str(value)) for key, value in results.setup.items()])]
    drawn = set(figures)
    lines += _kept_section(results, drawn) + _loss_section(results, drawn) + _training_section(results, drawn)
    if results.sample is not None:
        lines += ["", "## A sampled continuation", "", *("    " + line for line in results.sample.splitlines())]
    return "\n".join(lines) + "\n"


def summary(results: Results) -> Table:
    """The short table for the terminal."""
    missed = [goal for goal in results.goals() if not goal.met]
    table = Table(title=_title(results), show_header=False)
    for goal in missed:
        table.add_row("[bold red]missed[/]", goal.text)
    if missed:
        table.add_section()
    for name in _selections(results, lambda evaluation: evaluation.kept.mass.get("all", {})):
        means = [seed.evaluation.kept.mean(name) for seed in results.seeds]
        table.add_row(f"mass kept, {SELECTIONS[name][0]}", _several(means))
    gaps = [seed.evaluation.kept.mean_gap_closed() for seed in results.seeds]
    table.add_row("gap closed, window to oracle", _several(gaps))
    table.add_section()
    for name in _names(seed.evaluation.losses for seed in results.seeds):
        table.add_row(f"held-out loss, {name}", _several(_losses(results, name, "all")))
    for name in _selections(results, lambda evaluation: evaluation.selections):
        values = [seed.evaluation.selections[name]["answers"] for seed in results.seeds]
        if _mean(values) is not None:
            table.add_row(f"loss at recall answers, {SELECTIONS[name][0]}", _several(values))
    table.add_section()
    for phase, (first, last) in _kl_ends(results).items():
        table.add_row(f"KL of {phase}, first to last", f"{_several(first)} to {_several(last)}")
    table.add_row("time, peak memory", f"{_duration(results.seconds)}, {_gib(results.max_rss)}")
    return table


def _title(results: Results) -> str:
    goals = results.goals()
    if not goals:
        return results.name
    return f"{results.name}: {'goals met' if all(goal.met for goal in goals) else 'goal missed'}"


def _kept_section(results: Results, figures: set[str]) -> list[str]:
    kepts = [seed.evaluation.kept for seed in results.seeds]
    lines = ["", "## Attention mass that the selection keeps", ""]
    lines += [
        "The share of dense attention (final weights, run dense; summed over heads, of norm 1) that lies on the K = "
        f"{kepts[0].k} selected keys, over held-out queries that reach at least {MIN_REACH * kepts[0].k} keys.",
        "Gap closed is (indexer - window) / (oracle - window); its mean is the ratio of the means over layers.",
    ]
    if "kept_mass" in figures:
        lines += ["", "![Attention mass kept in each layer](kept_mass.png)"]
    for part in PARTS:
        names = _selections(results, lambda evaluation, part=part: evaluation.kept.mass.get(part, {}))
        if names:
            queries = ", ".join(f"{kept.queries[part]:,}" for kept in kepts)
            lines += [
                "",
                f"**{PART_NAMES[part].capitalize()}** ({queries} queries)",
                "",
                *_kept_table(kepts, part, names),
            ]
    return lines


def _kept_table(kepts: Sequence[KeptMass], part: str, names: Sequence[str]) -> list[str]:
    layers = len(kepts[0].mass[part]["window"])
    rows = []
    for name in names:
        cells = [_several([kept.mass[part][name][layer] for kept in kepts]) for layer in range(layers)]
        rows.append((SELECTIONS[name][0], *cells, _several([kept.mean(name, part) for kept in kepts])))
    gaps = [kept.gap_closed(part=part) for kept in kepts]
    cells = [_several([gap[layer] for gap in gaps]) for layer in range(layers)]
    rows.append(("**gap closed**", *cells, _several([kept.mean_gap_closed(part=part) for kept in kepts])))
    return _table(("selection", *(f"layer {layer}" for layer in range(layers)), "mean"), rows)


def _loss_section(results: Results, figures: set[str]) -> list[str]:
    parts = [
        part for part in PARTS if any(_mean(_losses(results, name, part)) is not None for name in _weights(results))
    ]
    header = tuple(PART_NAMES[part] for part in parts)
    rows = [(name, *(_several(_losses(results, name, part)) for part in parts)) for name in _weights(results)]
    lines = ["", "## Held-out loss", "", "Cross-entropy in nats a token, over files that were never trained on."]
    if "answers" in parts:
        lines += [f"Recall answers: values stated more than 64 bytes back; chance is ln 8 = {CHANCE:.2f}."]
    lines += ["", *_table(("weights, attention", *header), rows)]
    lines += ["", "The final weights over other selections, imposed on every layer; the oracle is the dense run's.", ""]
    rows = []
    for name in _selections(results, lambda evaluation: evaluation.selections):
        found = [seed.evaluation.selections[name] for seed in results.seeds]
        rows.append((SELECTIONS[name][0], *(_several([losses[part] for losses in found]) for part in parts)))
    lines += _table(("selection", *header), rows)
    return lines + (["", "![Loss at recall answers](answers.png)"] if "answers" in figures else [])


def _training_section(results: Results, figures: set[str]) -> list[str]:
    lines = ["", "## Training", ""]
    if "training" in figures:
        lines += ["![Loss and KL over the steps](training.png)", ""]
    rows = [(phase, _several(first), _several(last)) for phase, (first, last) in _kl_ends(results).items()]
    lines += [
        "KL of the indexer, summed over layers: over all reachable keys in WARMUP, over the selected ones in SPARSE.",
        "Last is the mean of the last tenth of the steps.",
        "",
    ]
    lines += _table(("phase", "first step", "last"), rows)
    names = _names(seed.seconds for seed in results.seeds)
    rows = [(name, _several([seed.seconds.get(name) for seed in results.seeds], digits=1)) for name in names]
    rows += [("everything", f"{results.seconds:.1f}")]
    lines += ["", *_table(("part", "seconds"), rows), "", f"Memory peaked at {_gib(results.max_rss)}."]
    return lines


def _training_figure(results: Results) -> Figure:
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    for axes, metric, label in zip(
        figure.subplots(2, 1),
        ("lm_loss", "kl"),
        ("language-model loss (nats)", "KL of the indexer"),
        strict=True,
    ):
        for number, seed in enumerate(results.seeds):
            for phase, curve in seed.curves.items():
                if metric in curve:
                    steps = np.array(curve["step"])
                    if any(phase == control.name for control in CONTROLS) and "SPARSE" in seed.curves:
                        steps += seed.curves["SPARSE"]["step"][0] - steps[0]  # beside the phase that it controls
                    color = f"C{list(seed.curves).index(phase)}"
                    name = phase if number == 0 else None
                    axes.plot(steps, curve[metric], color=color, linewidth=1, alpha=0.8, label=name)
        axes.set_ylabel(label)
        if axes.lines:
            axes.legend(frameon=False)
        _clean(axes)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.set_xlabel("step")
    return figure


def _kept_mass_figure(results: Results) -> Figure | None:
    kepts = [seed.evaluation.kept for seed in results.seeds]
    parts = [part for part in ("all", "answers") if part in kepts[0].mass]
    if not parts:
        return None
    figure = Figure(figsize=(8.5, 3.2 * len(parts)), layout="constrained")
    for axes, part in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts, strict=True):
        names = _selections(results, lambda evaluation, part=part: evaluation.kept.mass.get(part, {}))
        layers = np.arange(len(kepts[0].mass[part]["window"]))
        width = 0.85 / len(names)
        for i, name in enumerate(names):
            label, color = SELECTIONS[name]
            x = layers + (i - (len(names) - 1) / 2) * width
            masses = np.array([kept.mass[part][name] for kept in kepts])
            axes.bar(x, masses.mean(axis=0), width, color=color, label=label)
            if len(kepts) > 1:
                axes.plot(np.tile(x, len(kepts)), masses.ravel(), "k.", markersize=3)
        axes.set_xticks(layers, [f"layer {layer}" for layer in layers])
        axes.set_ylim(0, 1)
        axes.set_ylabel(f"mass kept: {PART_NAMES[part]}")
        _clean(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=3)
    return figure


def _answers_figure(results: Results) -> Figure | None:
    names = _selections(results, lambda evaluation: evaluation.selections)
    losses = {n: [seed.evaluation.selections[n]["answers"] for seed in results.seeds] for n in names}
    losses = {name: [value for value in values if value is not None] for name, values in losses.items()}
    losses = {name: values for name, values in losses.items() if values}
    if not losses:
        return None
    figure = Figure(figsize=(8.5, 0.7 + 0.45 * len(losses)), layout="constrained")
    axes = figure.subplots()
    for row, (name, values) in enumerate(losses.items()):
        label, color = SELECTIONS[name]
        axes.barh(label, float(np.mean(values)), color=color)
        if len(values) > 1:
            axes.plot(values, [row] * len(values), "k.", markersize=4)
    axes.axvline(CHANCE, color="black", linestyle=":", linewidth=1)
    axes.text(CHANCE, -0.6, " chance", va="bottom", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss at recall answers (nats), final weights")
    _clean(axes)
    return figure


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _weights(results: Results) -> list[str]:
    return _names(seed.evaluation.losses for seed in results.seeds)


def _losses(results: Results, name: str, part: str) -> list[float | None]:
    missing: Parts = {}
    return [seed.evaluation.losses.get(name, missing).get(part) for seed in results.seeds]


def _kl_ends(results: Results) -> dict[str, tuple[list[float | None], list[float | None]]]:
    """By phase, the KL of the first step and the mean of the last tenth of the steps, of each seed."""
    phases = _names({p: c for p, c in seed.curves.items() if "kl" in c} for seed in results.seeds)
    ends = {}
    for phase in phases:
        curves = [seed.curves.get(phase, {}).get("kl", []) for seed in results.seeds]
        first = [kl[0] if kl else None for kl in curves]
        ends[phase] = first, [float(np.mean(kl[-max(1, len(kl) // 10) :])) if kl else None for kl in curves]
    return ends


def _selections(results: Results, measured: Callable[[Evaluation], Mapping[str, Any]]) -> list[str]:
    """The selections that every seed measured, in the report's order."""
    found = [measured(seed.evaluation) for seed in results.seeds]
    return [name for name in SELECTIONS if all(name in each for each in found)]


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _several(values: Sequence[float | None], digits: int = 3) -> str:
    """The mean, and each value if there are several."""
    mean = _mean(values)
    if mean is None or len(values) == 1:
        return "–" if mean is None else f"{mean:.{digits}f}"
    each = ", ".join("–" if value is None else f"{value:.{digits}f}" for value in values)
    return f"{mean:.{digits}f} ({each})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [lines[0], "|" + " --- |" * len(header), *lines[1:]]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def main(arguments: Sequence[str]) -> int:
    """Writes the reports of the given runs' folders again."""
    if not arguments:
        print("python -m train.report needs the folders of one or more runs, got none", file=sys.stderr)
        return 2
    try:
        for folder in map(Path, arguments):
            results = Results.load(folder)
            path = write_report(results, folder)
            Console().print(summary(results))
            print(path)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
