"""Shows in a terminal what a model writes, as it comes, and lets none of it control the terminal."""

import re
from collections.abc import Iterator
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

# C0 but for tab and line feed, DEL and C1 begin or end control sequences; the others change the order of letters or
# separate lines. Without these characters the rest of a sequence is text.
_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_BEGINS = re.compile(r"[^\s\-*+>\d]")
FRAMES = 8  # a second, at most

Kind = Literal["reasoning", "content"]


def without_controls(text: str) -> str:
    """Returns text without the characters by which it could control a terminal.

    Examples:
      >>> without_controls("a\\x1b[31mb\\u202e")
      'a[31mb'
    """
    return _CONTROLS.sub("", text)


class _Safe:
    """Renders something, and takes control characters out of that: Markdown can write any by its number."""

    def __init__(self, inner: RenderableType):
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(without_controls(segment.text), segment.style)


class Answer:
    """Shows an answer: reasoning dim, content as Markdown; whole blocks stay, the last one is drawn anew as it grows.

    On what is no terminal the text comes as it is, without control characters, reasoning before an empty line.
    """

    def __init__(self, console: Console):
        self._console = console
        self._kind: Kind = "content"
        self._text = ""  # what is not yet shown for good
        self._live: Live | None = None
        self._begun = False

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def add(self, kind: Kind, text: str) -> None:
        """Shows more."""
        if not self._console.is_terminal:
            border = "\n\n" if kind != self._kind and self._begun else ""
            self._console.out(border + without_controls(text), end="", highlight=False)
            self._kind, self._begun = kind, True
            return
        if kind != self._kind:
            self.close()
            self._kind = kind
        self._text += without_controls(text)
        end = finished(self._text) if kind == "content" else self._text.rfind("\n") + 1
        if end:
            self._stop()
            self._print(self._text[:end])
            self._text = self._text[end:]
        if self._text.strip():
            self._draw()

    def note(self, text: str) -> None:
        """Shows a line of ours below what has come."""
        self.close()
        self._console.print(Text(without_controls(text), style="cyan"))

    def close(self) -> None:
        """Shows for good what has come."""
        if not self._console.is_terminal:
            return
        self._stop()
        self._print(self._text)
        self._text = ""

    def _draw(self) -> None:
        if self._live is None:
            self._live = Live(
                console=self._console, refresh_per_second=FRAMES, transient=True, vertical_overflow="ellipsis",
                get_renderable=lambda: self._rendered(self._text),
            )  # fmt: skip
            self._live.start()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(self._rendered(text))

    def _rendered(self, text: str) -> RenderableType:
        # Links are written out: one that is hidden behind words may lead elsewhere than they say.
        markdown = self._kind == "content"
        return _Safe(Markdown(text, hyperlinks=False) if markdown else Text(text.rstrip("\n"), style="dim"))


def finished(text: str) -> int:
    """Counts the characters of the Markdown blocks that no further text can change.

    Such a block ends with an empty line, behind which something else begins: lists and quotations may go on there.

    Examples:
      >>> finished("one\\n\\ntwo")
      5
      >>> finished("```\\none\\n\\ntwo")
      0
    """
    end = place = 0
    fence, after_blank = "", False
    for line in text.split("\n"):
        if after_blank and not fence and _BEGINS.match(line):
            end = place
        mark = _FENCE.match(line)
        if mark:
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        after_blank = not line.strip()
        place += len(line) + 1
    return end
