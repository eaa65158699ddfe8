"""Controls of draws of kind "full", kept on the device by slot: penalties, biases, counts of tokens.

A sequence's own are written once, when a step first draws for it in its slot; what is drawn is counted on the device,
so that the next step need not wait for the host.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.inference.continuation import Continuation
from dsa_jax.inference.params import MAX_BIASES
from dsa_jax.inference.sampling import Controls, Counts, Rules

ALWAYS = np.iinfo(np.int32).max


class SlotControls:
    """Keeps the controls of every slot; takes memory on the device from its first use on.

    Args:
      slots: how many; one more is padding's.
      vocab: how many logits there are.
      place: puts arrays where steps take them.
    """

    def __init__(self, slots: int, vocab: int, place: Callable[[Any], Any] = lambda arrays: arrays):
        self.slots, self.vocab, self._place = slots, vocab, place
        self._rules: Rules | None = None
        self._counts: Counts | None = None
        self._held: dict[int, int] = {}  # of each slot, the sequence in the cache whose rules it has
        self._open: dict[int, jax.Array] = {}  # masks that forbid nothing, of each number of rows

    def of(self, rows: Sequence[Any], slots: np.ndarray) -> Controls:
        """Returns the controls of a batch, those of sequences that are new to their slots among them.

        Args:
          rows: of each row the `Work` of a `Continuation`, or None.
          slots: int32 [B].
        """
        if self._rules is None or self._counts is None:
            made: tuple[Rules, Counts] = self._place(_empty(self.slots + 1, self.vocab))
            self._rules, self._counts = made
        for work in rows:
            if work is not None and self._held.get(work.sequence.slot) != work.sequence.cached:
                self._load(work.sequence, work.number)
        return Controls(self._rules, self._counts, slots, self._mask(rows))

    def padding(self, rows: int) -> Controls:
        """Returns the controls of rows that nobody reads."""
        return self.of([None] * rows, np.full(rows, self.slots, np.int32))

    def count(self, slots: np.ndarray, tokens: jax.Array) -> None:
        """Counts what was drawn."""
        assert self._counts is not None
        self._counts = _count(self._counts, slots, tokens)

    def _load(self, own: Continuation, number: int) -> None:
        self._held[own.slot] = own.cached
        before = own.tokens[:number]
        if own.constraint is not None:
            own.constraint.begin(before)
        self._rules = _set(self._rules, own.slot, rules_of(own, self.vocab))
        if own.is_penalised:
            self._counts = _set(self._counts, own.slot, counts_of(own.prompt, before, self.vocab))

    def _mask(self, rows):
        """Returns the packed masks of a batch; where nothing is forbidden, one that is on the device already."""
        if not any(work is not None and work.sequence.constraint is not None for work in rows):
            if len(rows) not in self._open:
                words = len(rows), -(-self.vocab // 32)
                self._open[len(rows)] = self._place(jnp.full(words, 2**32 - 1, jnp.uint32))
            return self._open[len(rows)]
        mask = np.full((len(rows), -(-self.vocab // 32)), 2**32 - 1, np.uint32)
        for row, work in enumerate(rows):
            if work is not None and work.sequence.constraint is not None:
                mask[row] = work.sequence.constraint.mask
        return mask


def rules_of(own: Continuation, vocab: int) -> Rules:
    """Returns the rules of one sequence, without the axis of slots."""
    params = own.params
    forbidden = own.stops if params.min_tokens else ()
    entries = [(token, value, ALWAYS) for token, value in params.logit_bias.items()]
    entries += [(token, -np.inf, params.min_tokens) for token in forbidden]
    entries += [(vocab, 0.0, 0)] * (MAX_BIASES - len(entries))
    ids, values, until = zip(*entries, strict=True)
    return Rules(
        min_p=np.array(params.min_p, np.float32),
        repetition=np.array(params.repetition_penalty, np.float32),
        presence=np.array(params.presence_penalty, np.float32),
        frequency=np.array(params.frequency_penalty, np.float32),
        ids=np.array(ids, np.int32),
        values=np.array(values, np.float32),
        until=np.array(until, np.int32),
    )


def counts_of(prompt: np.ndarray, output: Sequence[int], vocab: int) -> Counts:
    """Counts the tokens of one sequence."""
    return Counts(
        np.bincount(prompt, minlength=vocab) > 0,
        np.bincount(np.asarray(output, np.int32), minlength=vocab).astype(np.int32),
    )


def _empty(slots, vocab) -> tuple[Rules, Counts]:
    """Makes the controls of slots that change nothing."""
    number = lambda value: jnp.full(slots, value, jnp.float32)  # noqa: E731
    biases = jnp.full((slots, MAX_BIASES), vocab, jnp.int32), jnp.zeros((slots, MAX_BIASES), jnp.float32)
    rules = Rules(number(0), number(1), number(0), number(0), *biases, jnp.zeros((slots, MAX_BIASES), jnp.int32))
    return rules, Counts(jnp.zeros((slots, vocab), bool), jnp.zeros((slots, vocab), jnp.int32))


@partial(jax.jit, donate_argnums=0)
def _set(of_slots, slot, own):
    return jax.tree.map(lambda x, new: x.at[slot].set(new), of_slots, own)


@partial(jax.jit, donate_argnums=0)
def _count(counts, slots, tokens):
    return Counts(counts.prompt, counts.output.at[slots, tokens].add(1))
