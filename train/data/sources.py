"""Where documents lie: places with names and weights, read from `NAME=WEIGHT:PLACE`."""

import dataclasses
import glob
import math
import os
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

from train.checks import shown
from train.data.inputs import JSON_LINES
from train.data.manifest import MANIFEST

type Kind = Literal["text", "shards", "indexed", "conversations"]

NAMED = re.compile(r"([A-Za-z][\w.-]*)=([^:=/]*):(.+)", re.DOTALL)
TEXT = "text"  # the name of all text that has none
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6


@dataclasses.dataclass(frozen=True)
class Place:
    """Names documents that are mixed as one: text may lie in several globs."""

    name: str
    weight: Fraction | None
    kind: Kind
    patterns: tuple[str, ...]


def parse_places(field: str, places: Sequence[str]) -> list[tuple[str | None, Fraction | None, str]]:
    """Reads name, weight and pattern of each place; either all have a weight or none has.

    Raises:
      ValueError: naming a weight that is no positive number, or a name that stands twice.

    Examples:
      >>> parse_places("data", ["code=0.7:shards", "books=0.3:text/*.txt"])[0]
      ('code', Fraction(7, 10), 'shards')
    """
    parsed = [_parse_place(field, place) for place in places]
    names = [name for name, _, _ in parsed if name is not None]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{field} must name each source once, got {shown(twice[0])} {names.count(twice[0])} times")
    if names and len(names) < len(parsed):
        plain = next(pattern for name, _, pattern in parsed if name is None)
        raise ValueError(f"{field} must have a weight for each source or for none, got {shown(plain)} without one")
    return parsed


def _parse_place(field: str, place: str) -> tuple[str | None, Fraction | None, str]:
    match = NAMED.fullmatch(place)
    if match is None:
        return None, None, place
    name, text, pattern = match.groups()
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        raise ValueError(
            f"the weight of {name} in {field} must be a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, "
            f"got {shown(text)}"
        )
    return name, Fraction(repr(weight)), pattern  # the decimal number that was written: 0.1 is a tenth


def find_places(field: str, places: Sequence[str]) -> tuple[Place, ...]:
    """Finds what lies at each place; globs of text without a name are one source."""
    found, text = [], []
    for name, weight, pattern in parse_places(field, places):
        kind = find_kind(pattern)
        if name is None and kind == "text":
            text.append(pattern)
        else:
            found.append(Place(name or pattern, weight, kind, (pattern,)))
    if text or not found:
        found.insert(0, Place(TEXT, None, "text", tuple(text)))
    return tuple(found)


def find_kind(pattern: str) -> Kind:
    """Says what a pattern names, by the files that are there; what matches nothing is text that is missing."""
    prefix = os.path.expanduser(pattern)
    if os.path.isfile(prefix + ".idx") or os.path.isfile(prefix + ".bin"):
        return "indexed"
    paths = matches(pattern)
    if paths and all((path / MANIFEST).is_file() for path in paths):
        return "shards"
    if paths and all(path.name.lower().endswith(JSON_LINES) for path in paths):
        return "conversations"
    return "text"


def matches(pattern: str) -> list[Path]:
    """Lists the paths that a glob names, sorted."""
    return sorted(Path(path) for path in glob.glob(os.path.expanduser(pattern), recursive=True))
