"""The command `python -m train overlap`: how far the selections of a model's layers agree."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from train.checks import check_integer, check_number
from train.commands.command import parse
from train.commands.evaluate import TextArguments
from train.evaluation.evaluate import check_selects
from train.evaluation.held_out import draw_batches
from train.evaluation.overlap import Overlap, letters, measure_overlap
from train.evaluation.subject import find_subject
from train.files import replace_text
from train.phases import merge_groups
from train.state import abstract_params


@dataclasses.dataclass(frozen=True)
class Arguments(TextArguments):
    """Measures how far the selections of a model's layers agree, on one device: which layers could share one."""

    queries: int = 128
    """How many queries of each sequence are compared, of those that have at least four times K keys."""
    least: float = 0.8
    """A layer could share if so much of what it selects is selected by the layer with an indexer before it."""


def main(arguments: Sequence[str]) -> None:
    """Runs the command.

    Raises:
      ValueError: if the model or the text cannot be measured.
    """
    given = parse(Arguments, arguments, "python -m train overlap")
    given.check()
    check_integer("queries", given.queries)
    check_number("least", given.least, least=0)
    console = Console()
    with console.status("comparing selections"):
        name, found = measure(given)
    if given.json is not None:
        values: dict[str, Any] = dataclasses.asdict(found) | {"indexer_types": found.pattern(given.least)}
        replace_text(given.json, json.dumps(values, indent=1, allow_nan=False) + "\n")
    show(name, found, given.least, console)


def measure(arguments: Arguments) -> tuple[str, Overlap]:
    """Measures the newest checkpoint of what the arguments name; gives its name too.

    Raises:
      ValueError: if the model or the text cannot be measured.
    """
    subject = find_subject(arguments.model)
    check_selects(subject.config)
    count, rows, seq_len = arguments.shape(subject)
    batches = draw_batches(arguments.load(subject), count, rows, seq_len, seed=arguments.seed)
    *_, (name, read) = subject.weights.items()
    model = merge_groups(abstract_params(subject.config)[0], read(None))
    return name, measure_overlap(model, batches, queries=arguments.queries, seed=arguments.seed)


def show(name: str, found: Overlap, least: float, console: Console) -> None:
    """Prints how much each layer has in common with those before it, and which could share."""
    types = found.pattern(least)
    table = Table("layer", "could", "in common with the layer before", "with the last full layer")
    leader = 0
    for layer, (kind, row) in enumerate(zip(types, found.share, strict=True)):
        before = f"{row[layer - 1]:.3f}" if layer else ""
        table.add_row(str(layer), "share" if kind == "shared" else "", before, f"{row[leader]:.3f}" if layer else "")
        leader = leader if kind == "shared" else layer
    console.print(
        f"{name}: {found.queries:,} queries, which select {found.k:,} keys in each layer",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
    console.print(
        f"{types.count('shared')} of {len(types)} layers have at least {least:g} in common with the last full layer "
        f"before them: {letters(types)}",
        highlight=False,
        soft_wrap=True,
    )
