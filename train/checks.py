"""Checks of the numbers in settings: each failure is one short line that names the field."""

import math
from typing import Any

import numpy as np

MAX_COUNT = 2**31 - 1  # steps, rows and tokens are counted in int32 on devices
MAX_SHOWN = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """Writes a value for a message, cut where it is long.

    Examples:
      >>> shown("x" * 100)[-8:], shown(10**5000)
      ('xxxxxxx…', 'an integer of 16610 bits')
    """
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write very long ones
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of a long integer within, or of what nests too deep
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def check_integer(name: str, value: Any, *, least: int = 1, most: int = MAX_COUNT) -> None:
    """Checks a whole number; True and False are none.

    Raises:
      ValueError: naming the field, if it is of another type or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer of at least {least}, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")


def check_number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, below: float | None = None
) -> None:
    """Checks a number as float32, in which training uses it: finite, and in range even after that rounding.

    Args:
      name: the field.
      value: an int or a float; True and False are none.
      above: what it must be greater than.
      least: what it must at least be.
      below: what it must be less than.

    Raises:
      ValueError: naming the field, if it is of another type, not finite, or out of range.
    """
    bounds = {"above": above, "at least": least, "below": below}
    wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    single = _as_float32(value)
    good = (
        math.isfinite(single)
        and (above is None or single > above)
        and (least is None or single >= least)
        and (below is None or single < below)
    )
    if not good:
        raise ValueError(f"{name} must be a finite number {wanted} (in float32), got {shown(value)}".replace("  ", " "))


def _as_float32(value: Any) -> float:
    """Rounds to float32; NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        with np.errstate(over="ignore", under="ignore"):
            return float(np.float32(float(value)))
    except OverflowError:  # an int past every float
        return math.inf
