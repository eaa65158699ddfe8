"""The demo's goals: the gap that the indexer closes, and of one seed alone the time and the memory that it takes."""

from studies.tiny.settings import GAP_CLOSED, MAX_RSS_BYTES, MAX_SECONDS
from train.phases import CONTROLS
from train.reporting.layout import Goal
from train.reporting.report import duration, gib
from train.reporting.results import Results, as_text, mean


def find_goals(results: Results) -> list[Goal]:
    """Computes the goals that apply: the gap where an indexer was trained, time and memory without controls."""
    phases = {phase for seed in results.seeds for phase in seed.curves}
    has_indexer = any("kl" in curve for seed in results.seeds for curve in seed.curves.values())
    goals = [_gap_goal(results)] if has_indexer else []
    if len(results.seeds) == 1 and phases.isdisjoint(control.name for control in CONTROLS):
        text = f"the run took {duration(results.seconds)}; at most {duration(MAX_SECONDS)} was asked"
        goals.append(Goal(text, results.seconds <= MAX_SECONDS))
        assert results.max_rss is not None  # the demo trains and reports in one process
        text = f"memory peaked at {gib(results.max_rss)}; at most {gib(MAX_RSS_BYTES)} was asked"
        goals.append(Goal(text, results.max_rss <= MAX_RSS_BYTES))
    return goals


def _gap_goal(results: Results) -> Goal:
    asked = f"at least {GAP_CLOSED} was asked"
    gaps = [seed.evaluation.kept.mean_gap_closed(part=seed.evaluation.parts[0]) for seed in results.seeds]
    closed = mean(gaps)
    if closed is None:
        return Goal(f"the gap from the window to the oracle could not be measured; {asked} to be closed", False)
    text = f"the trained indexer closes {as_text(gaps)} of the gap from the last K keys to the oracle; {asked}"
    return Goal(text, closed >= GAP_CLOSED)
