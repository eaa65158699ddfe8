"""What may change in a run that is continued: found field by field, allowed or refused with the reason."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.checks import shown
from train.settings import listed

FIXED = {"model": "the model of a run stays", "seed": "the seed of a run stays"}
FREE_MODEL_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # they decide no number
FREE_PHASE_FIELDS = ("bias_rate", "keep")
OPTIMIZERS = ("backbone", "indexer")
MUON = "muon_learning_rate"
MOMENT_DTYPE = "moment_dtype"


@dataclasses.dataclass(frozen=True)
class Position:
    """Says where in a run a checkpoint stands."""

    step: int  # done since the start of the run
    phase: int  # index in the run's phases
    phase_step: int  # done since the start of the phase
    data: dict[str, Any]  # the state of the batches' iterator


@dataclasses.dataclass(frozen=True)
class Change:
    """Records that a run goes on with another value from behind a step; `field` is spelled as `--set` takes it."""

    step: int
    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field} {shown(self.before)} → {shown(self.after)}"


@dataclasses.dataclass(frozen=True)
class _Difference:
    """Holds both values of one field, and why a run cannot take up the second; None where it can."""

    path: tuple[str, ...]
    before: Any
    after: Any
    reason: str | None = None

    @property
    def field(self) -> str:
        return ".".join(self.path)


def find_changes(
    folder: Path, before: Mapping[str, Any], after: Mapping[str, Any], done: Position | None
) -> list[Change]:
    """Finds what changes of a run where it goes on, from the JSON of its configuration before and after.

    Phases and stages that have not begun may become others. What is done stays; of the phase and the stage that have
    begun, steps, rates and the split into micro-batches may change. The data are compared by what they hold, elsewhere.

    Args:
      folder: the run's, for the message.
      before: the configuration that the checkpoint was written with.
      after: the one to go on with.
      done: where the checkpoint stands, None without one.

    Returns:
      the changes, in the order of the fields.

    Raises:
      ValueError: naming every field that must not change, with the reason and the way.
    """
    found = [*_top_level(before, after), *_phases(before.get("phases", []), after.get("phases", []), done)]
    refused = [f"{d.field} {shown(d.before)}, here {shown(d.after)} ({d.reason})" for d in found if d.reason]
    if refused:
        raise ValueError(
            f"the run in {folder} cannot go on with another configuration: {listed(refused)}; to begin another run "
            f"from its weights: --init {folder} --phases SPARSE --out NEW"
        )
    step = 0 if done is None else done.step
    return [Change(step, d.field, d.before, d.after) for d in found]


def find_data_changes(
    step: int, before: Mapping[str, Any], after: Mapping[str, Any], fingerprints: tuple[Any, Any]
) -> list[Change]:
    """Finds how data that hold something else than before are spelled, besides their fingerprints."""
    spelled = [Change(step, d.field, d.before, d.after) for d in _differences(before, after, ("data",))]
    return [*spelled, Change(step, "data.fingerprint", *fingerprints)]


def _top_level(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[_Difference]:
    """Yields what differs outside the phases and the data."""
    for name in after:
        if name in ("phases", "data") or name not in before:
            continue
        for difference in _differences(before[name], after[name], (name,)):
            free = name == "model" and difference.path[1:2] and difference.path[1] in FREE_MODEL_FIELDS
            yield difference if free else dataclasses.replace(difference, reason=FIXED.get(name))


def _differences(before: Any, after: Any, path: tuple[str, ...]) -> Iterator[_Difference]:
    """Yields the fields that both have with different values; what one alone has, another version wrote."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in after:
            if key in before:
                yield from _differences(before[key], after[key], (*path, key))
    elif before != after:
        yield _Difference(path, before, after)


def _phases(before: Sequence[Any], after: Sequence[Any], done: Position | None) -> Iterator[_Difference]:
    """Yields what differs in the phases: those that are done, the one that has begun, and those that have not."""
    begun, done_steps = (0, 0) if done is None else (done.phase + 1, done.phase_step)
    names, here = ([phase["name"] for phase in phases] for phases in (before, after))
    if here[:begun] != names[:begun]:
        yield _Difference(("phases",), names, here, "phases that have begun stay")
        return
    for index in range(begun):
        for difference in _phase(before[index], after[index], ("phases", _key(names, index))):
            yield _with_reason(difference, before[index], after[index], None if index + 1 < begun else done_steps)
    if names != here:
        yield _Difference(("phases",), list(before[begun:]), list(after[begun:]))
        return
    for index in range(begun, len(names)):
        yield from _phase(before[index], after[index], ("phases", _key(names, index)))


def _key(names: Sequence[str], index: int) -> str:
    """Names a phase in a path: by its name, or by its number where several have that name."""
    return names[index] if names.count(names[index]) == 1 else str(index)


def _phase(before: Mapping[str, Any], after: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[_Difference]:
    """Yields what differs in one phase; stages by their numbers where there are as many."""
    stages, here = before["stages"], after["stages"]
    rest, rest_here = ({key: phase[key] for key in phase if key != "stages"} for phase in (before, after))
    yield from _differences(rest, rest_here, path)
    if len(stages) != len(here):
        yield _Difference((*path, "stages"), stages, here)
        return
    for number, pair in enumerate(zip(stages, here, strict=True)):
        yield from _differences(*pair, (*path, "stages", str(number)))


def _with_reason(
    difference: _Difference, before: Mapping[str, Any], after: Mapping[str, Any], steps: int | None
) -> _Difference:
    """Adds the reason why a phase that has done `steps` steps, all of them if None, cannot change so, if it cannot."""
    name, *rest = difference.path[2:]
    if steps is None:
        reason = f"phase {before['name']} is done"
    elif name == "stages":
        reason = _stages_reason(before["stages"], after["stages"], steps)
    elif name in OPTIMIZERS:
        other = not rest or (rest[0] == MUON and None in (difference.before, difference.after))
        reason = "the kind of an optimizer stays while its phase runs" if other else None
        reason = "the dtype of moments stays while their phase runs" if rest == [MOMENT_DTYPE] else reason
    else:
        reason = None if name in FREE_PHASE_FIELDS else "it stays while its phase runs"
    return dataclasses.replace(difference, reason=reason)


def _stages_reason(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], steps: int) -> str | None:
    """Says why stages cannot become others after `steps` steps of them, None where they can."""
    begin = 0
    for number, stage in enumerate(before):
        if steps <= begin:
            return None
        end = begin + stage["steps"]
        here = after[number] if number < len(after) else {}
        if end < steps and (not here or any(_differences(stage, here, ()))):
            return "stages that are done stay"
        if any(here.get(key) != stage[key] for key in ("batch_size", "seq_len")):
            return "stages that have begun keep batch_size and seq_len: end this one where it stands and add another"
        if end >= steps and begin + here["steps"] < steps:
            return f"stage {number} must have at least the {steps - begin} steps that are done"
        begin = end
    return None
