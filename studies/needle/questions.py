"""Asks a model for needles: which answers it gets right, by the length of the text and the depth of the needle.

An answer is right if each of its digits is the likeliest token after the question and the digits before it, which is
what greedy generation would write.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from studies.needle.needles import DIGITS, Needles, plant_at
from studies.needle.rows import Windows, one_document
from train.data import Batch, Documents
from train.phases import Params, Selection, merge_groups, run_model

type Attend = Callable[[nnx.GraphDef, Params, Batch], Array]  # gives hidden [B, T, D]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Counts the answers of one length and depth: `right` of `asked`."""

    right: int
    asked: int

    @classmethod
    def sum(cls, cells: Iterable["Cell"]) -> Self:
        """Adds up the counts of cells."""
        counts = [(cell.right, cell.asked) for cell in cells]
        return cls(sum(right for right, _ in counts), sum(asked for _, asked in counts))

    @property
    def share(self) -> float:
        """The share that is right."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the share that is right, by Wilson.

        Examples:
          >>> [round(x, 3) for x in Cell(50, 50).interval]
          [0.929, 1.0]
        """
        z = 1.959964
        share, n = self.share, self.asked
        middle, spread = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        low, high = ((middle + sign * spread) / (1 + z**2 / n) for sign in (-1, 1))
        return max(min(low, share), 0.0), min(max(high, share), 1.0)  # but for rounding they are within


@dataclasses.dataclass(frozen=True)
class Questions:
    """Holds rows with needles at known depths, all asked at the rows' ends.

    Attributes:
      batch: the rows.
      answers: where the digits of each answer stand among the row's targets [rows, needles, 5].
      depths: the number of each needle's depth [rows, needles].
    """

    batch: Batch
    answers: Int[np.ndarray, "B n 5"]
    depths: Int[np.ndarray, "B n"]


def draw_questions(
    documents: Documents,
    needles: Needles,
    *,
    seq_len: int,
    depths: int,
    a_row: int,
    questions: int,
    batch_size: int,
    seed: int,
) -> Iterator[Questions]:
    """Draws rows until every depth has been asked for often enough.

    The depths are ranges of equal size; within its range a needle stands anywhere. The needles of a row are at ranges
    of their own, in turn, so that with as many needles as ranges each row asks once for each.

    Args:
      documents: the text.
      needles: how they are written.
      seq_len: tokens of a row.
      depths: how many ranges.
      a_row: needles of a row, at most `depths`.
      questions: for each range, at least.
      batch_size: rows taken together.
      seed: of the text, the places, the words and the codes.

    Raises:
      ValueError: if a row has more needles than ranges, or the text or the rows are too short.
    """
    if not 1 <= a_row <= depths:
        raise ValueError(f"a row must have from 1 to {depths} needles, as many as there are depths, got {a_row}")
    windows = Windows.of(documents, "held_out", seq_len)
    rows = -(-questions * depths // a_row)
    rows = -(-rows // batch_size) * batch_size
    order = np.random.default_rng(seed).permutation(len(windows))
    for first in range(0, rows, batch_size):
        drawn = [
            _row(windows, needles, order, number, depths, a_row, seed) for number in range(first, first + batch_size)
        ]
        batches, answers, ranges = zip(*drawn, strict=True)
        yield Questions(Batch.stack(batches), np.stack(answers), np.stack(ranges))


def _row(windows, needles, order, number, depths, a_row, seed) -> tuple[Batch, np.ndarray, np.ndarray]:
    rng = np.random.default_rng((seed, number))
    ranges = (number * a_row + np.arange(a_row)) % depths
    text = windows.read(int(order[number % len(order)]))
    planted = plant_at(text, needles, ((ranges + rng.uniform(size=a_row)) / depths).tolist(), rng)
    places = planted.asked[:, None] + np.arange(DIGITS)
    return one_document(planted.tokens), (places - 1).astype(np.int32), ranges.astype(np.int32)


def ask(
    graphdef: nnx.GraphDef, params: Params, questions: Iterator[Questions], depths: int, *, attend: Attend
) -> tuple[Cell, ...]:
    """Asks, and counts the right answers by depth.

    Args:
      graphdef: the model's definition.
      params: its parameters.
      questions: as `draw_questions` gives them, all of one shape.
      depths: how many there are.
      attend: runs the model: `attending`, or `oracle.attend_to_oracle`.
    """
    right, asked = np.zeros(depths, int), np.zeros(depths, int)
    for each in questions:
        hidden = attend(graphdef, params, each.batch)
        found = _is_right(graphdef, params, hidden, each.batch.targets, each.answers)
        np.add.at(right, each.depths, np.asarray(found))
        np.add.at(asked, each.depths, 1)
    return tuple(Cell(int(r), int(a)) for r, a in zip(right, asked, strict=True))


def attending(attention: Literal["dense", "sparse"], selection: Selection | None = None) -> Attend:
    """Makes the function that runs a model with dense attention, or with sparse over the selected keys.

    Args:
      attention: "dense" or "sparse".
      selection: makes what every layer selects, as in `train.phases.Phase`; without it the indexer does.
    """
    return partial(_run, attention=attention, selection=selection)


@partial(jax.jit, static_argnames=("graphdef", "attention", "selection"))
def _run(graphdef, params, batch: Batch, *, attention, selection) -> Float[Array, "B T D"]:
    return run_model(merge_groups(graphdef, params), batch, attention=attention, selection=selection).hidden


@partial(jax.jit, static_argnames="graphdef")
def _is_right(graphdef, params, hidden: Array, targets: Array, answers: Array) -> Bool[Array, "B n"]:
    """Says which answers are right; logits exist at their digits alone."""
    flat = answers.reshape(answers.shape[0], -1)
    logits = merge_groups(graphdef, params).unembed(jnp.take_along_axis(hidden, flat[..., None], axis=1))
    wanted = jnp.take_along_axis(targets, flat, axis=1)
    return (jnp.argmax(logits, -1) == wanted).reshape(answers.shape).all(-1)
