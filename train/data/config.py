"""What a run's data are: places of documents, their weights, and how rows are made of them."""

import dataclasses
from pathlib import Path

from train.checks import check_integer, check_number, shown
from train.data.sources import parse_places

PACKINGS = ("concat", "best_fit")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Says which documents to read and how."""

    data: tuple[str, ...] = ()
    """Places of documents, each plain or as NAME=WEIGHT:PLACE: globs of text files, folders that `python -m train
    tokenize` wrote, prefixes of a .bin and an .idx file, globs of .jsonl files of conversations; none: the sources of
    the running interpreter's standard library."""
    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json; none: bytes are the tokens."""
    held_out: float = 0.1
    """About the share of the documents (of text, in whole files) that is kept out of training."""
    held_out_data: tuple[str, ...] = ()
    """Places of held-out documents; none: `held_out` of `data` is taken."""
    max_bytes: int = 64 * 2**20
    """Text files beyond this total are left unread, the same ones every time; how many is said."""
    append: bool = True
    """End every document of text with the tokenizer's end token, if it has one."""
    pack: str = "concat"
    """How rows are made: "concat" cuts documents end to end wherever a row is full, "best_fit" cuts those alone that
    are longer than a row, and pads."""
    min_document: int = 1
    """Tokens that a document must have, or it is left out."""
    chat_template: Path | None = None
    """The Jinja template of conversations; none: that beside the tokenizer."""

    def __post_init__(self):
        for name in ("data", "held_out_data"):
            places = getattr(self, name)
            if not isinstance(places, tuple) or not all(isinstance(place, str) for place in places):
                raise ValueError(f"{name} must be a tuple of globs, folders and prefixes, got {shown(places)}")
            parse_places(name, places)
        for name in ("tokenizer", "chat_template"):
            path = getattr(self, name)
            if path is not None:
                if not isinstance(path, str | Path):
                    raise ValueError(f"{name} must be a path, got {shown(path)}")
                object.__setattr__(self, name, Path(path))
        check_number("held_out", self.held_out, above=0, below=1)
        check_integer("max_bytes", self.max_bytes, most=2**63 - 1)
        check_integer("min_document", self.min_document)
        if not isinstance(self.append, bool):
            raise ValueError(f"append must be True or False, got {shown(self.append)}")
        if self.pack not in PACKINGS:
            raise ValueError(f"pack must be one of {', '.join(PACKINGS)}, got {shown(self.pack)}")
