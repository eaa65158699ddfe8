"""A small tokenizer with words and single digits, and folders of text, for the study of needles."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from studies.needle.corpus import train_tokenizer
from studies.needle.packages import Text


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
