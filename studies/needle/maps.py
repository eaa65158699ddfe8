"""Maps of the answers: what share is right, by the length of the text and the depth of the needle, for all weights."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from matplotlib.figure import Figure

from dsa_jax import KeyRange, select_topk
from studies.needle.oracle import attend_to_oracle
from studies.needle.questions import Attend, Cell, Questions, ask, attending, draw_questions
from studies.needle.rows import NeedleCorpus
from train.experiment import control_run
from train.phases import DENSE_CONTROL, WINDOW_CONTROL, Params, window_selection
from train.run import Run

DEPTHS = 8  # ranges of equal size
NEEDLES = (1, 8)  # of a row, in turn
BATCH_TOKENS = 2**16
MOST_ROWS = 16  # taken together
RANDOM_QUERIES = 64  # whose random keys are drawn together


@dataclasses.dataclass(frozen=True)
class Subject:
    """Names weights that are asked, and how they attend; they are read when their turn comes.

    Attributes:
      name: in the report.
      read: reads the weights.
      attend: runs the model.
      longest_alone: whether it is asked at the longest rows alone.
    """

    name: str
    read: Callable[[], Params]
    attend: Attend
    longest_alone: bool = False


@dataclasses.dataclass(frozen=True)
class Maps:
    """Holds the answers of all subjects: `cells[subject][needles of a row][tokens of a row]`, one cell a depth."""

    cells: Mapping[str, Mapping[int, Mapping[int, tuple[Cell, ...]]]]

    def to_json(self) -> dict[str, Any]:
        """Writes plain values."""
        return _map_rows(self.cells, lambda row, *_: [dataclasses.astuple(cell) for cell in row])

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_json` wrote, also from JSON."""
        return cls(_map_rows(values, lambda row, *_: tuple(Cell(*cell) for cell in row)))

    @classmethod
    def add(cls, maps: Sequence["Maps"]) -> Self:
        """Adds the answers of several seeds, which have the same subjects and cells."""

        def added(_: object, name: str, needles: int, length: int) -> tuple[Cell, ...]:
            seeds = [each.cells[name][needles][length] for each in maps]
            return tuple(Cell.sum(cells) for cells in zip(*seeds, strict=True))

        return cls(_map_rows(maps[0].cells, added))


def _map_rows(cells: Mapping[str, Any], change: Callable[[Any, str, int, int], Any]) -> dict[str, Any]:
    """Makes maps whose rows are `change(row, subject, needles, length)`; JSON has spelled these numbers as strings."""
    return {
        name: {
            int(needles): {int(length): change(row, name, int(needles), int(length)) for length, row in rows.items()}
            for needles, rows in by_needles.items()
        }
        for name, by_needles in cells.items()
    }


def random_selection(keys: KeyRange, k: int) -> Int[Array, "B T K"]:
    """Selects K of the keys in reach at random, others for each query: the same ones in every run."""
    batch, size = keys.start.shape
    block = math.gcd(size, RANDOM_QUERIES)

    def select(number: Array) -> Array:
        own = lambda array: jax.lax.dynamic_slice_in_dim(array, number * block, block, axis=1)  # noqa: E731
        scores = jax.random.uniform(jax.random.fold_in(jax.random.key(0), number), (batch, block, size))
        return select_topk(scores, k, keys=KeyRange(own(keys.start), own(keys.stop)))

    return jnp.moveaxis(jax.lax.map(select, jnp.arange(size // block)), 0, 1).reshape(batch, size, k)


def subjects_of(run: Run, *, controls: bool) -> Iterator[Subject]:
    """Lists what of a run is asked: its phases, its controls, and its last weights with other selections."""
    final = lambda: run.params_after("SPARSE")  # noqa: E731
    sparse, window = attending("sparse"), attending("sparse", window_selection)
    yield Subject("BASE, dense", lambda: run.params_after("BASE"), attending("dense"))
    yield Subject("WARMUP, sparse", lambda: run.params_after("WARMUP"), sparse, longest_alone=True)
    yield Subject("SPARSE, sparse", final, sparse)
    yield Subject("SPARSE, oracle top-K", final, attend_to_oracle, longest_alone=True)
    yield Subject("SPARSE, last K keys", final, window, longest_alone=True)
    yield Subject("SPARSE, K random keys", final, attending("sparse", random_selection), longest_alone=True)
    if controls:
        first, second = (control_run(run, phase) for phase in (DENSE_CONTROL, WINDOW_CONTROL))
        yield Subject("DENSE_CONTROL, dense", lambda: first.params_after("DENSE_CONTROL"), attending("dense"))
        params = lambda: second.params_after("WINDOW_CONTROL")  # noqa: E731
        yield Subject("WINDOW_CONTROL, last K keys", params, window, longest_alone=True)


def ask_subject(
    run: Run,
    subject: Subject,
    corpus: NeedleCorpus,
    *,
    lengths: Sequence[int],
    needles: Sequence[int],
    questions: int,
) -> dict[int, dict[int, tuple[Cell, ...]]]:
    """Asks one subject of a run; gives its cells by the needles of a row and by its tokens.

    Args:
      run: trained as far as the subject needs.
      subject: whose weights are read, and let go at the end.
      corpus: the held-out text, and how needles are written.
      lengths: tokens of the rows; lengths at which a row has no room for all its needles are left out.
      needles: how many a row has, each in turn.
      questions: of every depth, at least.
    """
    params, found = subject.read(), {}
    asked = [lengths[-1]] if subject.longest_alone else lengths
    for count, length in itertools.product(needles, asked):
        if has_room(corpus, length, count):
            drawn = questions_of(run, corpus, seq_len=length, a_row=count, questions=questions)
            found.setdefault(count, {})[length] = ask(run.graphdef, params, drawn, DEPTHS, attend=subject.attend)
    return found


def has_room(corpus: NeedleCorpus, length: int, needles: int) -> bool:
    """Says whether rows of a length have room for so many needles, and most of their text beside them."""
    return length >= 4 * needles * corpus.needles.cell


def questions_of(
    run: Run, corpus: NeedleCorpus, *, seq_len: int, a_row: int, questions: int, batch_size: int | None = None
) -> Iterator[Questions]:
    """Draws the questions of a length that all subjects of a run are asked; see `draw_questions`."""
    return draw_questions(
        corpus.text.documents("held_out"),
        corpus.needles,
        seq_len=seq_len,
        depths=DEPTHS,
        a_row=a_row,
        questions=questions,
        batch_size=batch_size or max(1, min(MOST_ROWS, BATCH_TOKENS // seq_len)),
        seed=run.config.seed,
    )


def draw_maps(maps: Maps) -> Figure:
    """Draws a map for each subject and number of needles: the share of right answers by length and depth."""
    counts = sorted({count for by_needles in maps.cells.values() for count in by_needles})
    names = list(maps.cells)
    figure = Figure(figsize=(4.2 * len(counts) + 1.5, 1.9 * len(names) + 0.6), layout="constrained")
    grid = figure.subplots(len(names), len(counts), squeeze=False)
    for (row, name), (column, count) in itertools.product(enumerate(names), enumerate(counts)):
        axes, rows = grid[row][column], maps.cells[name].get(count, {})
        axes.set_title(f"{name}: {count} needle{'s' if count > 1 else ''} a row", fontsize=9)
        if not rows:
            axes.set_axis_off()
            continue
        shares = np.array([[cell.share for cell in cells] for cells in rows.values()]).T
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="upper")
        axes.set_xticks(range(len(rows)), [_short(length) for length in rows], fontsize=8)
        axes.set_yticks([-0.5, len(shares) - 0.5], ["start", "end"], fontsize=8)
        for (depth, place), share in np.ndenumerate(shares):
            color = "black" if share > 0.6 else "white"
            axes.text(place, depth, f"{share:.0%}", ha="center", va="center", fontsize=6, color=color)
        if column == len(counts) - 1:
            figure.colorbar(image, ax=axes, label="answers right")
    return figure


def table_of(maps: Maps) -> list[str]:
    """Writes the share of right answers over all depths, with its interval, as lines of Markdown."""
    counts = sorted({count for by_needles in maps.cells.values() for count in by_needles})
    lengths = sorted({length for rows in maps.cells.values() for cells in rows.values() for length in cells})
    header = ["weights and attention", "needles a row", *map(_short, lengths)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for name, count in itertools.product(maps.cells, counts):
        rows = maps.cells[name].get(count, {})
        if rows:
            shares = [_share(rows[length]) if length in rows else "" for length in lengths]
            lines.append(f"| {' | '.join([name, str(count), *shares])} |")
    return lines


def _share(cells: Sequence[Cell]) -> str:
    whole = Cell.sum(cells)
    low, high = whole.interval
    return f"{whole.share:.1%} ({low:.0%}–{high:.0%})"


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
