"""Results of made-up runs, and how their reports are read."""

from typing import Any

from train.evaluation.evaluate import Evaluation
from train.evaluation.kept_mass import KeptMass
from train.reporting.results import Results, SeedResult

MIXED = ("all", "text", "recall", "answers")
ALONE = ("text",)


def make_kept(indexer, parts=MIXED) -> KeptMass:
    """Makes the mass of two layers with oracle 0.9 and 0.8, window 0.5 and 0.4."""
    mass = {
        "indexer": indexer,
        "warmed": [0.65, 0.55],
        "untrained": [0.3, 0.2],
        "oracle": [0.9, 0.8],
        "window": [0.5, 0.4],
        "random": [0.1, 0.15],
    }
    return KeptMass(32, {part: mass for part in parts}, dict.fromkeys(parts, 1234))


def make_seed(seed=0, indexer=(0.8, 0.7), *, parts=MIXED, controls=False) -> SeedResult:
    """Makes the findings of a seed; losses of a part are so far above a base."""
    above = {"all": 0.0, "text": 0.25, "recall": 0.5, "answers": -0.5}

    def of_parts(base):
        return {part: base + above[part] for part in parts}

    losses = {"after BASE, dense": 1.75 + seed, "final, sparse": 1.5 + seed, "final, dense": 1.25}
    losses = {name: of_parts(base) for name, base in losses.items()}
    curves = {
        "BASE": {"step": [1.0, 2.0], "lm_loss": [5.5, 3.0]},
        "WARMUP": {"step": [3.0, 4.0], "kl": [2.625, 0.375]},
        "SPARSE": {"step": [5.0, 6.0], "lm_loss": [3.0, 2.5], "kl": [0.5, 0.25]},
    }
    if controls:
        curves["DENSE_CONTROL"] = {"step": [1.0, 2.0], "lm_loss": [3.0, 2.25]}
        losses |= {"DENSE_CONTROL, dense": of_parts(1.125), "WINDOW_CONTROL, last K keys": of_parts(2.25)}
    names = ("dense", "indexer", "oracle", "window", "random")
    selections = {name: of_parts(1.0 + i / 8) for i, name in enumerate(names)}
    kept = make_kept(list(indexer), parts)
    return SeedResult(seed, Evaluation(losses, selections, kept), curves, {"BASE": 100.0, "WARMUP": 50.0})


def make_results(*seeds, **changes) -> Results:
    """Makes the results of these seeds, of one without them."""
    values: dict[str, Any] = dict(
        name="tiny",
        setup={"K": 32, "sequence length": 512},
        seeds=list(seeds) or [make_seed()],
        seconds=400.4,
        max_rss=2**31,
        sample="def f(x):\n    return x\n",
    )
    return Results(**values | changes)


def table_after(text, heading) -> dict[str, list[str]]:
    """Reads the rows of the first table after a line, by their first cell."""
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        rows[first] = rest
    return rows


def first_words(text) -> str:
    """Reads the first words below the title."""
    return next(line for line in text.splitlines()[1:] if line)
