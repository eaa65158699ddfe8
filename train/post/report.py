"""Writes the report of a post-training: what each stage reached, and the curves of those that sampled."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from train.files import read_json_file, replace_text, writing
from train.phases import DISTILL, MIXED, ON_POLICY, SPECIALIST
from train.post.pipeline import MEASURED_FILE
from train.post.stages import DENSE, FREE, PostConfig, PostStage
from train.reporting.figures import hide_frame
from train.reporting.report import DPI, duration, markdown_table
from train.reporting.results import read_curves
from train.watching.metrics import read_metrics

SMOOTHED = 5  # steps whose mean a curve shows
WATCHED = ("kl", "masked_share", "clipped_share", "log_ratio", "equal_groups", "dropped_episodes")


def write_report(config: PostConfig, folder: Path, *, seconds: float | None = None) -> Path:
    """Writes `results.json`, the figures and `report.md`; returns the path of the last.

    Raises:
      ValueError: if something cannot be written, or what was measured cannot be read.
    """
    stages = [stage for stage in config.stages if (folder / stage.name / MEASURED_FILE).exists()]
    measured = {s.name: read_json_file(folder / s.name / MEASURED_FILE, MEASURED_FILE) for s in stages}
    curves = {s.name: _curves(folder / s.name, s) for s in stages if s.policy is not None}
    spent = {s.name: _seconds(folder / s.name) for s in stages}
    results = {"stages": measured, "curves": curves, "seconds": spent}
    with writing(folder / "report.md"):
        replace_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
        for kind in ("reward", "output_tokens"):
            curves_figure(curves, kind).savefig(folder / f"{kind}.png", dpi=DPI)
        path = folder / "report.md"
        replace_text(path, markdown(config, measured, curves, spent, seconds))
    return path


def _curves(folder: Path, stage: PostStage) -> dict[str, list[Any]]:
    """Gathers what a stage's metrics have of rewards, tokens and the objective, of one update a rollout."""
    records = [record for record in read_metrics(folder / "metrics.jsonl") if "reward" in record]
    kinds = ("reward", "correct", "output_tokens")
    names = sorted({name for record in records for name in record if name.partition("/")[0] in kinds})
    found = read_curves(records, ("step", *names, *WATCHED))
    return found.get(stage.phases[0].name, {})


def _seconds(folder: Path) -> float:
    return float(sum(record["seconds"] for record in read_metrics(folder / "metrics.jsonl")))


def curves_figure(curves: Mapping[str, Mapping[str, Sequence[float]]], kind: str) -> Figure:
    """Draws a kind of number over the steps of each stage that samples, by task; means of `SMOOTHED` steps."""
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axes = figure.subplots()
    for stage, curve in curves.items():
        for name in sorted(curve):
            if name.startswith(f"{kind}/"):
                steps, values = np.array(curve["step"], float), np.array(curve[name], float)
                count = min(len(steps), len(values))
                label = stage if stage == name.partition("/")[2] else f"{stage}: {name.partition('/')[2]}"
                axes.plot(steps[:count], smoothed(values[:count]), linewidth=1.2, label=label)
    axes.set_xlabel("step of the stage")
    axes.set_ylabel({"reward": "reward", "output_tokens": "output tokens an episode"}[kind])
    if axes.lines:
        axes.legend(frameon=False, ncols=2)
    hide_frame(axes)
    return figure


def smoothed(values: np.ndarray) -> np.ndarray:
    """Averages each value with those before it, `SMOOTHED` together."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - SMOOTHED, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def markdown(
    config: PostConfig,
    measured: Mapping[str, Mapping[str, Any]],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    spent: Mapping[str, float],
    seconds: float | None,
) -> str:
    """Writes the report."""
    model = config.model
    lines = [
        "# Post-training",
        "",
        f"A model of {model.num_hidden_layers} layers ({model.num_moe_layers} with experts), dimension "
        f"{model.hidden_size}, K {model.index_topk}, rows of {max(s.seq_len for s in config.stages)} tokens.",
        "",
        *verdicts(config, measured),
        "",
        "## What each stage reached",
        "",
        f"Held-out problems, {config.evaluation_prompts} a task, one sample each at the temperature of training; ± is "
        "half the 95 % interval of correctness.",
        "",
        *_table(measured),
        "",
        "![Reward over the steps](reward.png)",
        "",
        "![Output tokens over the steps](output_tokens.png)",
        "",
        "## The stages' training",
        "",
        *_training_table(config, measured, curves, spent),
    ]
    if seconds is not None:
        lines += ["", f"The command that ended it took {duration(seconds)}."]
    return "\n".join(lines) + "\n"


def verdicts(config: PostConfig, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Says how stages compare with those that they began with, specialists and dense controls; losses come first."""
    found: list[tuple[bool, str]] = []
    tasks = {name: _by_task(values) for name, values in measured.items()}
    trained = [s for s in config.stages if s.phases[0].name == SPECIALIST.name and not s.name.endswith((DENSE, FREE))]
    specialists = {name: stage.name for stage in trained for name in stage.tasks}
    mixed = [stage.name for stage in config.stages if stage.phases[0].name == MIXED.name]
    for stage in config.stages:
        for name, numbers in tasks.get(stage.name, {}).items():
            if stage.policy is not None:
                found.append(_compare(f"{stage.name}: {name}", numbers, stage.begins, tasks))
            learns = stage.phases[0].name in (DISTILL.name, MIXED.name, ON_POLICY.name)
            if learns and name in specialists:
                found.append(_compare(f"{stage.name}: {name}", numbers, specialists[name], tasks))
            if stage.phases[0].name == ON_POLICY.name:
                found += [_compare(f"{stage.name}: {name}", numbers, other, tasks) for other in mixed]
            for end, kind in ((DENSE, "sparse"), (FREE, "with the length penalty")):
                if stage.policy is not None and f"{stage.name}{end}" in tasks:
                    found.append(_compare(f"{stage.name}, {kind}: {name}", numbers, f"{stage.name}{end}", tasks))
    known = [each for each in found if each[1]]
    return [f"- {'' if good else '**Below**: '}{text}." for good, text in sorted(known, key=lambda each: each[0])]


def _compare(
    title: str, numbers: Mapping[str, float], other: str, tasks: Mapping[str, Mapping[str, Any]]
) -> tuple[bool, str]:
    """Compares a task's correctness and tokens with another stage's; nothing where that was not measured on it."""
    name = title.rpartition(" ")[2]
    before = tasks.get(other, {}).get(name)
    if before is None:
        return True, ""
    gain = numbers["correct"] - before["correct"]
    noise = float(np.hypot(numbers["interval"], before["interval"]))
    word = "above" if gain > noise else "below" if gain < -noise else "within the intervals of"
    right = f"{title} {numbers['correct']:.3f}, {word} {other} ({before['correct']:.3f})"
    return gain >= -noise, f"{right}, at {numbers['output_tokens']:.1f} output tokens ({before['output_tokens']:.1f})"


def _by_task(values: Mapping[str, Any]) -> dict[str, Any]:
    """Takes what was measured of a stage by task; a task without its penalty stands under the task's own name."""
    return {name.removesuffix(FREE): numbers for name, numbers in values["tasks"].items()}


def _table(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = {stage: _by_task(values) for stage, values in measured.items()}
    tasks = list(dict.fromkeys(name for each in found.values() for name in each))
    rows = []
    for stage, numbers in found.items():
        cells = [_cell(numbers.get(task)) for task in tasks]
        rows.append((stage, *cells))
    return markdown_table(("stage", *tasks), rows)


def _cell(numbers: Mapping[str, float] | None) -> str:
    if numbers is None:
        return "–"
    return f"{numbers['correct']:.3f} ± {numbers['interval']:.3f}, {numbers['output_tokens']:.1f} tokens"


def _training_table(
    config: PostConfig,
    measured: Mapping[str, Mapping[str, Any]],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    spent: Mapping[str, float],
) -> list[str]:
    rows = []
    for stage in (stage for stage in config.stages if stage.name in measured):
        curve, overlap = curves.get(stage.name, {}), measured.get(stage.name, {}).get("selection_overlap")
        ends = [_ends(curve.get("reward", ()))] + [_ends(curve.get(name, ()), last=True) for name in WATCHED]
        phases = ", ".join(f"{phase.name} {phase.steps}" for phase in stage.phases)
        rows.append(
            (stage.name, phases, *ends, "–" if overlap is None else f"{overlap:.3f}", f"{spent.get(stage.name, 0):.0f}")
        )
    header = ("stage", "steps", "reward, first to last", "KL of the indexer", "masked", "clipped", "log ratio")
    return markdown_table((*header, "equal groups", "dropped", "selections as at the start", "seconds"), rows)


def _ends(values: Sequence[float], *, last: bool = False) -> str:
    if not len(values):
        return "–"
    smooth = smoothed(np.array(values, float))
    return f"{smooth[-1]:.3f}" if last else f"{smooth[min(SMOOTHED, len(smooth)) - 1]:.3f} to {smooth[-1]:.3f}"
