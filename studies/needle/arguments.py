"""Shares arguments among the commands of the studies on long text, and what follows from these alone."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from studies.needle.corpus import CorpusConfig, make_corpus
from studies.needle.settings import Preset
from train.compiling import keep_compiled


@dataclasses.dataclass(frozen=True)
class StudyArguments:
    """Holds the arguments of every study on long text; each has a `preset` and an `out` of its own beside them."""

    data: tuple[str, ...] = ()
    """Globs of text files, of which a folder's are one document; without it the packages of the running Python."""
    out: Path = Path("runs")
    """Folder of the study."""
    corpus: Path | None = None
    """Folder of the corpus, made if it is not there; without it that of the study."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue what the folder holds; the other arguments must be those it was begun with."""
    seed: int = 0
    """Of weights, rows and questions; the first of several."""
    stop_after: str | None = None
    """Save and stop after this time, like 9m, with exit status 75; `--resume` goes on."""
    beside: str | None = None
    """Other work on the same device meanwhile: the report then calls the times upper bounds."""
    workers: int = 2
    """Processes that tokenise."""
    compile_cache: Path | None = None
    """Folder where compiled programs are kept, for the next piece; without it `compiled` in that of the study, and on
    CPUs none."""

    @property
    def corpus_folder(self) -> Path:
        """The folder of the corpus."""
        return self.corpus or self.out / "corpus"

    def keep_compiled(self) -> None:
        """Has compiled programs kept for the next piece."""
        if self.compile_cache is not None or jax.default_backend() != "cpu":
            keep_compiled(self.compile_cache or self.out / "compiled")

    def make_corpus(self, preset: Preset, console: Console) -> dict[str, Any]:
        """Makes the corpus if it is not there, and says how long it is; returns its record.

        Raises:
          ValueError: as `corpus.make_corpus`.
        """
        wanted = CorpusConfig(self.data, vocab_size=preset.vocabulary, max_bytes=preset.text_bytes)
        begun = time.monotonic()
        say = lambda text: console.print(f"corpus: {text}")  # noqa: E731
        record = make_corpus(wanted, self.corpus_folder, workers=self.workers, say=say)
        console.print(
            f"corpus: {record['tokens']['train']:,} tokens, {record['tokens']['held_out']:,} held out, "
            f"{time.monotonic() - begun:.0f} s",
            highlight=False,
        )
        return record
