"""Fields of a run that a command line sets: `--set`, and `--steps` and `--learning-rate`, which are short for it."""

import json
from collections.abc import Sequence
from typing import Any

from train.checks import check_integer, check_number, shown
from train.settings import PhaseSettings, RunConfig, nearest


def set_fields(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Sets fields of a run, such as `checkpoint_every=100` or `phases.SPARSE.backbone.learning_rate=1e-4`.

    Args:
      config: the run.
      assignments: each a path and a JSON value; what is no JSON is taken as a string. A phase goes by its name, or as a
        stage by its number from 0.

    Raises:
      ValueError: naming a field that there is not, with the nearest, or a value that it cannot have.
    """
    values = config.to_json()
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not path or not equals:
            raise ValueError(f"set must be like phases.SPARSE.bias_rate=0.001, got {shown(assignment)}")
        _assign(values, path, path.split("."), _value(text))
    return RunConfig.from_json(values) if assignments else config


def _value(text: str) -> Any:
    """Reads a JSON value; what is none is a string."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _assign(values: Any, path: str, keys: Sequence[str], value: Any) -> None:
    """Puts a value at a path into JSON values."""
    inside = values
    for key in keys[:-1]:
        inside = inside[_step(inside, key, path)]
    inside[_step(inside, keys[-1], path)] = value


def _step(inside: Any, key: str, path: str) -> Any:
    """Finds what part of a path leads to within an object or a list."""
    if isinstance(inside, dict):
        known = {name: name for name in inside}
    elif isinstance(inside, list):
        names = [each.get("name") if isinstance(each, dict) else None for each in inside]
        known: dict[str, Any] = {str(number): number for number in range(len(inside))}
        known |= {name: number for number, name in enumerate(names) if name is not None and names.count(name) == 1}
    else:
        raise ValueError(f"set cannot reach {shown(path)}: {shown(inside)} has no part {shown(key)}")
    if key not in known:
        found = nearest([key], list(known)) or f"; there are {', '.join(known) or 'none'}"
        raise ValueError(f"set must name a field, got {shown(path)} without {shown(key)}{found}")
    return known[key]


def steps_assignments(config: RunConfig, texts: Sequence[str]) -> list[str]:
    """Spells `SPARSE=2000`, the steps of a phase, as its last stage's: earlier stages keep theirs.

    Raises:
      ValueError: if there is no such phase, or earlier stages have as many steps.
    """
    assignments = []
    for text in texts:
        name, value = _split("steps", text, "SPARSE=2000")
        check_integer(f"steps of {name}", value)
        stages = _phase(config, "steps", name).stages
        earlier = sum(stage.steps for stage in stages[:-1])
        if value <= earlier:
            raise ValueError(f"steps of {name} must be more than the {earlier} of its earlier stages, got {value}")
        assignments.append(f"phases.{name}.stages.{len(stages) - 1}.steps={value - earlier}")
    return assignments


def rate_assignments(config: RunConfig, texts: Sequence[str]) -> list[str]:
    """Spells `SPARSE=1e-4`, the learning rate of all that a phase trains, or `SPARSE.indexer=1e-4`, of one group.

    Raises:
      ValueError: if there is no such phase, or it does not train the group.
    """
    assignments = []
    for text in texts:
        where, value = _split("learning_rate", text, "SPARSE=1e-4 or SPARSE.indexer=1e-4")
        name, _, group = where.partition(".")
        check_number(f"learning_rate of {where}", value, above=0)
        trained = _phase(config, "learning_rate", name).phase.trains
        if group and group not in trained:
            raise ValueError(f"learning_rate must be of {' or '.join(trained)} in phase {name}, got {shown(group)}")
        assignments += [f"phases.{name}.{each}.learning_rate={value}" for each in ([group] if group else trained)]
    return assignments


def _split(name: str, text: str, example: str) -> tuple[str, Any]:
    where, equals, value = text.partition("=")
    if not where or not equals:
        raise ValueError(f"{name} must be like {example}, got {shown(text)}")
    return where, _value(value)


def _phase(config: RunConfig, name: str, phase: str) -> PhaseSettings:
    names = [each.name for each in config.phases]
    if phase not in names:
        raise ValueError(f"{name} must be of a phase of the run, {', '.join(names)}, got {shown(phase)}")
    return config.phases[names.index(phase)]
