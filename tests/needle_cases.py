"""A small tokenizer with words and single digits, and folders of text, for the study of needles."""

import dataclasses
import itertools
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from studies.needle.corpus import train_tokenizer
from studies.needle.found import Found, Selected
from studies.needle.inside import Inside
from studies.needle.maps import Maps
from studies.needle.packages import Text
from studies.needle.questions import Cell
from train.evaluation.kept_mass import KeptMass


def vocabulary(words: int) -> list[str]:
    """Makes words that nobody has thought of."""
    letters = "bdfglmnprstvz", "aeiou", "klmnrst"
    return [f"{''.join(syllable)}er" for syllable in itertools.islice(itertools.product(*letters), words)]


def make_tokenizer(words: int = 150, size: int = 470) -> Tokenizer:
    """Trains one until it knows most of some words."""
    text = " ".join(vocabulary(words) * 40) + " the code of is question Question: The code.\n\n 0123456789" * 40
    with tempfile.TemporaryDirectory() as folder:
        path = train_tokenizer([Text("words", "1", (text,))], size, Path(folder) / "tokenizer.json")
        return Tokenizer.from_file(str(path))


def write_packages(folder: Path, seed: int = 0, packages: int = 8, files: int = 3) -> str:
    """Writes folders of files; gives the glob that finds them."""
    rng, known = np.random.default_rng(seed), vocabulary(300)
    for package, file in itertools.product(range(packages), range(files)):
        path = folder / f"p{package}" / f"f{file}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (" ".join(rng.choice(known, size=8)) + f" {rng.integers(10**6)}" for _ in range(200))
        path.write_text("\n".join(lines))
    return f"{folder}/*/*.txt"


RANGES = "positions 0 to 511", "positions 512 to 1023"
SUBJECTS = "BASE, dense", "SPARSE, sparse", "DENSE_CONTROL, dense"


def make_found(seed: int = 0, *, gap: float = 0.002, right: int = 4, **changes) -> Found:
    """Makes what was measured of a seed: two layers, four questions of each kind, a loss that lies `gap` behind."""

    def losses(level):
        return {"text": level, RANGES[0]: level, RANGES[1]: level, "needles": level, "answers": level / 2}

    def selected(shift):
        mass = {name: [0.5, share] for name, share in (("indexer", 0.8), ("oracle", 0.9), ("window", 0.3))}
        kept = KeptMass(8, {"text": mass | {"random": [0.1, 0.1]}}, {"text": 7})
        of = {"dense": 2.0, "indexer": 2.03 + shift, "oracle": 2.01, "window": 2.5, "random": 3.0}
        return Selected(kept, {name: losses(level) for name, level in of.items()})

    share = {"all": [[0.6, 0.4], [0.5, 0.5]]} | dict.fromkeys(("indexer", "oracle", "window"), [[0.5, 0.3], [0.5, 0.4]])
    inside = Inside((512, 1024), share, [[1.0, 0.4], [0.4, 1.0]], 6)
    cells = {name: {n: {1024: (Cell(right if name == SUBJECTS[1] else 4, 4),)} for n in (1, 8)} for name in SUBJECTS}
    found = Found(
        seed,
        {"K": 8, "model": "small"},
        {
            "packages": [{"name": "a", "bytes": 10, "split": "train"}, {"name": "b", "bytes": 2, "split": "held_out"}],
            "left_out": {"identical": {"files": 1, "bytes": 3}},
            "tokens": {"train": 5, "held_out": 1},
            "tokenizer": "0123456789abcdef",
        },
        {"date": "2026-11-30", "device": "cpu", "jax": "0.11.2"},
        {
            "BASE, dense": losses(2.2),
            "WARMUP, sparse": losses(2.3),
            "SPARSE, sparse": losses(2.0 * (1 + gap)),
            "SPARSE, dense": losses(2.0),
            "DENSE_CONTROL, dense": losses(2.0),
        },
        selected(0.05),
        selected(0.0),
        {"SPARSE, sparse | DENSE_CONTROL, dense": {"text": 0.9, RANGES[0]: 0.95, RANGES[1]: 0.85}},
        {"text": inside, "answers": inside},
        Maps(cells),
        {"generated": Cell(right, 4), "forward": Cell(4, 4)},
        {"SPARSE": {"step": [1, 2], "lm_loss": [3.0, 2.0], "kl": [0.4, 0.3], "kl_layers": [[0.1, 0.3], [0.1, 0.2]]}},
        {"SPARSE": 10.0, "measuring": 5.0},
        0.001,
    )
    return dataclasses.replace(found, **changes)
