"""One-letter programs: each letter is a statement of the small language on one variable."""

import functools

from train.post.environments.language import run

STATEMENTS = {
    "a": "x=x+1;",
    "d": "x=x*2;",
    "s": "x=x-3;",
    "f": "x=x+5;",
    "t": "x=x*3;",
    "n": "x=x-7;",
}
MAX_LETTERS = 64


def value_after(letters: str, start: int) -> int | None:
    """Runs letters on a value; None if one of them is none, or there are more than `MAX_LETTERS`."""
    if len(letters) > MAX_LETTERS or any(letter not in STATEMENTS for letter in letters):
        return None
    value = run("".join(STATEMENTS[letter] for letter in letters), {"x": start}).variables.get("x")
    return value if isinstance(value, int) else None


def values_after(letters: str, start: int) -> list[int]:
    """Runs known letters one by one and lists the value after each."""
    values = []
    for letter in letters:
        values.append(_after(letter, values[-1] if values else start))
    return values


@functools.lru_cache(2**16)  # drawing problems asks for few values often
def _after(letter: str, value: int) -> int:
    after = value_after(letter, value)
    if after is None:
        raise ValueError(f"expected one of the letters {''.join(STATEMENTS)} and a short integer, got {letter!r}")
    return after


def check_letters(name: str, letters: str) -> None:
    """Checks a choice of letters.

    Raises:
      ValueError: naming the field, if there are none, one twice, or one that is not known.
    """
    if not letters or len(set(letters)) < len(letters) or any(letter not in STATEMENTS for letter in letters):
        raise ValueError(f"{name} must be different letters of {''.join(STATEMENTS)}, got {letters[:40]!r}")
