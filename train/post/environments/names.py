"""Names of people, places and trades that mean nothing outside of a problem."""

import random

PLACES = ("Arvik", "Belmora", "Corin", "Dunmere", "Eskel", "Farrow", "Galdes", "Hollin", "Istra", "Jorvale")
TRADES = ("baker", "printer", "glazier", "surveyor", "weaver", "joiner", "miller", "potter")


def make_names(count: int, state: random.Random) -> list[str]:
    """Makes so many different names of two words; some share one of them."""
    names: list[str] = []
    while len(names) < count:
        name = f"{_syllable(state)}{state.choice('aei')} {_syllable(state)}{state.choice('kmno')}"
        names += [] if name in names else [name]
    return names


def _syllable(state: random.Random) -> str:
    return state.choice("BDFKLMNRSTVZ") + state.choice("aeiou") + state.choice("lmnrst")
