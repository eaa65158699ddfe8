"""Writes a run's report: `results.json`, and from it `report.md` with figures, and a table for the terminal.

`python -m train report` writes report and figures again from `results.json` alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from train.evaluation.held_out import ByPart
from train.evaluation.kept_mass import MIN_REACH, KeptMass
from train.files import replace_text
from train.reporting.figures import kept_mass_figure, training_figure
from train.reporting.layout import PLAIN, SELECTIONS, Layout, measured_selections
from train.reporting.results import Results, as_text, mean

DPI = 130


def write_report(results: Results, folder: Path, layout: Layout = PLAIN) -> Path:
    """Writes `results.json`, the figures and `report.md`; returns the path of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder)
    figures = {"training": training_figure(results, layout), "kept_mass": kept_mass_figure(results, layout)}
    figures |= {figure.stem: figure.draw(results) for figure in layout.figures}
    for stem, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{stem}.png", dpi=DPI)
    path = folder / "report.md"
    replace_text(path, markdown(results, [stem for stem, figure in figures.items() if figure is not None], layout))
    return path


def markdown(results: Results, figures: Iterable[str] = (), layout: Layout = PLAIN) -> str:
    """Writes the report; `figures` are the stems of those that were drawn. A missed goal stands first."""
    goals = sorted(layout.goals(results), key=lambda goal: goal.met)
    lines = [f"# {_title(results, layout)}", ""]
    lines += [f"- {'Met' if goal.met else '**Missed**'}: {goal.text}." for goal in goals]
    if len(results.seeds) > 1:
        seeds = ", ".join(str(seed.seed) for seed in results.seeds)
        lines = _paragraph(lines, f"Numbers are means over the seeds {seeds}, then each seed's own in brackets.")
    lines = _paragraph(
        lines, *markdown_table(("setting", "value"), [(key, str(value)) for key, value in results.setup.items()])
    )
    drawn = set(figures)
    lines += _kept_section(results, drawn, layout) + _loss_section(results, drawn, layout)
    lines += _training_section(results, drawn)
    if results.sample is not None:
        lines += ["", "## A sampled continuation", "", *("    " + line for line in results.sample.splitlines())]
    return "\n".join(lines) + "\n"


def summary(results: Results, layout: Layout = PLAIN) -> Table:
    """Makes the short table for the terminal."""
    missed = [goal for goal in layout.goals(results) if not goal.met]
    table = Table(title=_title(results, layout), show_header=False)
    for goal in missed:
        table.add_row("[bold red]missed[/]", goal.text)
    if missed:
        table.add_section()
    for row in _summary_of_kept(results):
        table.add_row(*row)
    table.add_section()
    for row in _summary_of_losses(results, layout):
        table.add_row(*row)
    table.add_section()
    for phase, (first, last) in _kl_ends(results).items():
        table.add_row(f"KL of {phase}, first to last", f"{as_text(first)} to {as_text(last)}")
    memory = "" if results.max_rss is None else f", {gib(results.max_rss)}"
    table.add_row("time, peak memory" if memory else "time", f"{duration(results.seconds)}{memory}")
    return table


def _summary_of_kept(results: Results) -> list[tuple[str, str]]:
    part = results.seeds[0].evaluation.parts[0]
    rows = []
    for name in measured_selections(results, lambda evaluation: evaluation.kept.mass.get(part, {})):
        means = [seed.evaluation.kept.mean(name, part) for seed in results.seeds]
        rows.append((f"mass kept, {SELECTIONS[name][0]}", as_text(means)))
    gaps = [seed.evaluation.kept.mean_gap_closed(part=part) for seed in results.seeds]
    return [*rows, ("gap closed, window to oracle", as_text(gaps))]


def _summary_of_losses(results: Results, layout: Layout) -> list[tuple[str, str]]:
    part = results.seeds[0].evaluation.parts[0]
    rows = [(f"held-out loss, {name}", as_text(_losses(results, name, part))) for name in _weights(results)]
    for part, text in layout.summary_losses.items():
        for name in measured_selections(results, lambda evaluation: evaluation.selections):
            values = [seed.evaluation.selections[name].get(part) for seed in results.seeds]
            if mean(values) is not None:
                rows.append((f"{text}, {SELECTIONS[name][0]}", as_text(values)))
    return rows


def _title(results: Results, layout: Layout) -> str:
    goals = layout.goals(results)
    if not goals:
        return results.name
    return f"{results.name}: {'goals met' if all(goal.met for goal in goals) else 'goal missed'}"


def _kept_section(results: Results, figures: set[str], layout: Layout) -> list[str]:
    kepts = [seed.evaluation.kept for seed in results.seeds]
    lines = ["", "## Attention mass that the selection keeps", ""]
    lines += [
        "The share of dense attention (final weights, run dense; summed over heads, of norm 1) that lies on the K = "
        f"{kepts[0].k} selected keys, over held-out queries that reach at least {MIN_REACH * kepts[0].k} keys.",
        "Gap closed is (indexer - window) / (oracle - window); its mean is the ratio of the means over layers.",
    ]
    if "kept_mass" in figures:
        lines += ["", "![Attention mass kept in each layer](kept_mass.png)"]
    for part in results.seeds[0].evaluation.parts:
        names = measured_selections(results, lambda evaluation, part=part: evaluation.kept.mass.get(part, {}))
        if names:
            queries = ", ".join(f"{kept.queries[part]:,}" for kept in kepts)
            lines += ["", f"**{layout.part_name(part).capitalize()}** ({queries} queries)", ""]
            lines += _keptmarkdown_table(kepts, part, names)
    return lines


def _keptmarkdown_table(kepts: Sequence[KeptMass], part: str, names: Sequence[str]) -> list[str]:
    layers = len(kepts[0].mass[part]["window"])
    rows = []
    for name in names:
        cells = [as_text([kept.mass[part][name][layer] for kept in kepts]) for layer in range(layers)]
        rows.append((SELECTIONS[name][0], *cells, as_text([kept.mean(name, part) for kept in kepts])))
    gaps = [kept.gap_closed(part=part) for kept in kepts]
    cells = [as_text([gap[layer] for gap in gaps]) for layer in range(layers)]
    rows.append(("**gap closed**", *cells, as_text([kept.mean_gap_closed(part=part) for kept in kepts])))
    return markdown_table(("selection", *(f"layer {layer}" for layer in range(layers)), "mean"), rows)


def _loss_section(results: Results, figures: set[str], layout: Layout) -> list[str]:
    weights = _weights(results)
    parts = [
        part
        for part in results.seeds[0].evaluation.parts
        if any(mean(_losses(results, name, part)) is not None for name in weights)
    ]
    header = tuple(layout.part_name(part) for part in parts)
    rows = [(name, *(as_text(_losses(results, name, part)) for part in parts)) for name in weights]
    lines = ["", "## Held-out loss", "", "Cross-entropy in nats a token, over files that were never trained on."]
    lines += [note for part, note in layout.loss_notes.items() if part in parts]
    lines += ["", *markdown_table(("weights, attention", *header), rows)]
    lines += ["", "The final weights over other selections, imposed on every layer; the oracle is the dense run's.", ""]
    rows = []
    for name in measured_selections(results, lambda evaluation: evaluation.selections):
        found = [seed.evaluation.selections[name] for seed in results.seeds]
        rows.append((SELECTIONS[name][0], *(as_text([losses[part] for losses in found]) for part in parts)))
    lines += markdown_table(("selection", *header), rows)
    for figure in layout.figures:
        lines += ["", f"![{figure.title}]({figure.stem}.png)"] if figure.stem in figures else []
    return lines


def _training_section(results: Results, figures: set[str]) -> list[str]:
    lines = ["", "## Training", ""]
    if "training" in figures:
        lines += ["![Loss and KL over the steps](training.png)", ""]
    rows = [(phase, as_text(first), as_text(last)) for phase, (first, last) in _kl_ends(results).items()]
    lines += [
        "KL of the indexer, summed over layers: over all reachable keys in WARMUP, over the selected ones in SPARSE.",
        "Last is the mean of the last tenth of the steps.",
        "",
    ]
    lines += markdown_table(("phase", "first step", "last"), rows)
    names = _names(seed.seconds for seed in results.seeds)
    rows = [(name, as_text([seed.seconds.get(name) for seed in results.seeds], digits=1)) for name in names]
    rows += [("everything", f"{results.seconds:.1f}")]
    lines += ["", *markdown_table(("part", "seconds"), rows)]
    return lines if results.max_rss is None else [*lines, "", f"Memory peaked at {gib(results.max_rss)}."]


def _weights(results: Results) -> list[str]:
    """Lists the weights, with the attention that they were run with, of which there are losses."""
    return _names(seed.evaluation.losses for seed in results.seeds)


def _losses(results: Results, name: str, part: str) -> list[float | None]:
    missing: ByPart = {}
    return [seed.evaluation.losses.get(name, missing).get(part) for seed in results.seeds]


def _kl_ends(results: Results) -> dict[str, tuple[list[float | None], list[float | None]]]:
    """Gathers by phase the KL of the first step and the mean of the last tenth of the steps, of each seed."""
    phases = _names({p: c for p, c in seed.curves.items() if "kl" in c} for seed in results.seeds)
    ends = {}
    for phase in phases:
        curves = [seed.curves.get(phase, {}).get("kl", []) for seed in results.seeds]
        first = [kl[0] if kl else None for kl in curves]
        ends[phase] = first, [float(np.mean(kl[-max(1, len(kl) // 10) :])) if kl else None for kl in curves]
    return ends


def _paragraph(lines: list[str], *more: str) -> list[str]:
    """Adds lines after an empty one."""
    return [*lines, *([""] if lines[-1] else []), *more]


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Writes a table as lines of Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [lines[0], "|" + " --- |" * len(header), *lines[1:]]


def duration(seconds: float) -> str:
    """Writes minutes and seconds.

    Examples:
      >>> duration(500)
      '8 min 20 s'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def gib(size: int) -> str:
    """Writes bytes in GiB.

    Examples:
      >>> gib(3 * 2**29)
      '1.50 GiB'
    """
    return f"{size / 2**30:.2f} GiB"
