"""Draws docs/figures/mechanism.svg, DeepSeek Sparse Attention as one picture:  python docs/figures/draw_mechanism.py

Every place is given in the units of the view box; nothing is measured, so the bytes are the same everywhere.
"""

import pathlib

OUT = pathlib.Path(__file__).with_name("mechanism.svg")
WIDTH, HEIGHT = 1140, 478

# The score of each key, out of 100; no two are equal where the selection ends.
SCORES = (90, 14, 5, 30, 11, 66, 20, 7, 10, 78, 36, 12, 6, 24, 58, 10, 17, 70, 100, 84)
TOP_K = 7
STRIP_LEFT, CELL = 424, 10  # the scores and the cache stand over each other, a cell a key

STYLE = """
  text { font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; fill: #1f2328; }
  .title { font-size: 16px; font-weight: 600; }
  .plain { font-size: 14px; }
  .small { font-size: 13px; fill: #59636e; }
  .formula { font-size: 14px; font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  .middle { text-anchor: middle; }
  .learn { fill: #a8325e; }
  .card { fill: #ffffff; stroke: #d1d9e0; }
  .box { fill: #f6f8fa; stroke: #8c959f; stroke-width: 1.2; }
  .queries { fill: #e8f1fd; stroke: #4a86cf; stroke-width: 1.2; }
  .latents { fill: #e3f5ec; stroke: #3c9a6b; stroke-width: 1.2; }
  .panel { fill: #fff6e0; stroke: #d29922; stroke-width: 1.4; }
  .inner { fill: #fffdf7; stroke: #d29922; stroke-width: 1; }
  .low { fill: #ead9b0; }
  .high { fill: #c77700; }
  .unread { fill: #d9eee3; stroke: #ffffff; }
  .read { fill: #2a8a5b; stroke: #ffffff; }
  .arrow { fill: none; stroke: #59636e; stroke-width: 1.6; }
  .head { fill: #59636e; }
  .kl { fill: none; stroke: #a8325e; stroke-width: 1.8; stroke-dasharray: 6 4; }
  .klhead { fill: #a8325e; }
  .stop { stroke: #a8325e; stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .small { fill: #9da7b3; }
    .learn { fill: #ff8fb5; }
    .card { fill: #0d1117; stroke: #30363d; }
    .box { fill: #161b22; stroke: #6e7681; }
    .queries { fill: #10233d; stroke: #5b9be6; }
    .latents { fill: #0f2a1e; stroke: #46b583; }
    .panel { fill: #2a2110; stroke: #c9932b; }
    .inner { fill: #1c170c; stroke: #c9932b; }
    .low { fill: #5d4d28; }
    .high { fill: #f0a63a; }
    .unread { fill: #1d4633; stroke: #0d1117; }
    .read { fill: #4cc38a; stroke: #0d1117; }
    .arrow { stroke: #9da7b3; }
    .head { fill: #9da7b3; }
    .kl, .stop { stroke: #ff8fb5; }
    .klhead { fill: #ff8fb5; }
  }
"""


def box(kind: str, x: float, y: float, width: float, height: float, title: str, below: str) -> str:
    """A rounded rectangle with a title in the middle and a line below it."""
    rectangle = f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>'
    middle, foot = x + width / 2, y + height / 2
    return "\n".join(
        (rectangle, text("title middle", middle, foot - 4, title), text("small middle", middle, foot + 15, below))
    )


def label(kind: str, x: float, y: float, width: float, height: float, line: str) -> str:
    """A rounded rectangle with one plain line in its middle."""
    rectangle = f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>'
    return rectangle + "\n" + text("plain middle", x + width / 2, y + height / 2 + 5, line)


def text(kind: str, x: float, y: float, line: str) -> str:
    """One line of text, `y` at its foot."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{line}</text>'


def arrow(*points: tuple[float, float], kind: str = "arrow", head: str = "head") -> str:
    """A line through points, with a head at its end that points the way of its last piece."""
    (before_x, before_y), (x, y) = points[-2:]
    along_x, along_y = (x > before_x) - (x < before_x), (y > before_y) - (y < before_y)
    line = [*points[:-1], (x - 7 * along_x, y - 7 * along_y)]
    corners = [(x, y)] + [(x - 9 * along_x + s * 4.5 * along_y, y - 9 * along_y + s * 4.5 * along_x) for s in (1, -1)]
    path, tip = (" ".join(f"{a:g},{b:g}" for a, b in each) for each in (line, corners))
    return f'<polyline class="{kind}" points="{path}"/>\n<polygon class="{head}" points="{tip}"/>'


def detached(x: float, y: float, *, upright: bool) -> str:
    """Two strokes across an arrow, through which no gradient flows back."""
    offsets = ((-2.5, -7, -2.5, 7), (2.5, -7, 2.5, 7)) if upright else ((-7, -2.5, 7, -2.5), (-7, 2.5, 7, 2.5))
    lines = [f'<line class="stop" x1="{x + a}" y1="{y + b}" x2="{x + c}" y2="{y + d}"/>' for a, b, c, d in offsets]
    return "\n".join(lines)


def selected() -> list[int]:
    """The keys of the highest scores, in increasing order."""
    return sorted(sorted(range(len(SCORES)), key=lambda s: -SCORES[s])[:TOP_K])


def bars(foot: float, height: float) -> str:
    """A bar a key, as high as its score."""
    chosen = selected()
    return "\n".join(
        f'<rect class="{"high" if s in chosen else "low"}" x="{STRIP_LEFT + CELL * s + 1}" '
        f'y="{foot - height * score / 100:g}" width="{CELL - 2}" height="{height * score / 100:g}"/>'
        for s, score in enumerate(SCORES)
    )


def cells(x: float, y: float, height: float, read: list[bool]) -> str:
    """A row of latents, those that are read in a stronger colour."""
    return "\n".join(
        f'<rect class="{"read" if each else "unread"}" x="{x + CELL * s}" y="{y}" width="{CELL}" height="{height}"/>'
        for s, each in enumerate(read)
    )


def draw() -> str:
    """The whole picture as SVG."""
    chosen = selected()
    right = STRIP_LEFT + CELL * len(SCORES)  # where scores and cache end
    middle = (STRIP_LEFT + right) / 2
    parts = [
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>',
        '<rect class="panel" x="206" y="124" width="444" height="232" rx="10"/>',
        # From the hidden state: up to the queries, on to the indexer, down to the latents.
        box("box", 20, 206, 132, 66, "hidden state", "one a token"),
        arrow((86, 206), (86, 62), (206, 62)),
        arrow((86, 272), (86, 413), (206, 413)),
        arrow((152, 241), (226, 241)),
        arrow((178, 241), (178, 285), (226, 285)),
        # Queries.
        box("queries", 206, 34, 166, 56, "query latent", "Q numbers"),
        arrow((372, 62), (440, 62)),
        box("queries", 440, 34, 190, 56, "queries", "N heads × (C + R)"),
        arrow((630, 62), (940, 62), (940, 150)),
        # The lightning indexer.
        text("title middle", middle, 152, "lightning indexer"),
        text("small middle", middle, 171, "J small heads in FP8: cheap"),
        arrow((304, 90), (304, 180)),
        label("inner", 226, 180, 156, 34, "index queries, J × E"),
        label("inner", 226, 224, 156, 34, "head weights, J"),
        label("inner", 226, 268, 156, 34, "index keys, E"),
        arrow((382, 241), (416, 241)),
        bars(276, 84),
        f'<line class="arrow" x1="{STRIP_LEFT - 4}" y1="277" x2="{right + 4}" y2="277"/>',
        text("small middle", middle, 296, "a score for every key s ≤ t"),
        text("formula middle", 428, 337, "I[t,s] = Σⱼ w[t,j] · relu(q[t,j] · k[s])   (Eq. 1)"),
        detached(304, 107, upright=False),
        detached(165, 241, upright=True),
        text("small learn", 318, 112, "no gradient"),
        # The selection.
        arrow((650, 241), (690, 241)),
        box("panel", 690, 206, 126, 70, "top-k", "the K best keys"),
        arrow((753, 276), (753, 390)),
        text("small", 764, 326, "their"),
        text("small", 764, 343, "positions"),
        # Latents.
        box("latents", 206, 385, 166, 56, "key/value latent", "C + R numbers"),
        arrow((372, 413), (416, 413)),
        cells(STRIP_LEFT, 392, 42, [s in chosen for s in range(len(SCORES))]),
        text("small middle", middle, 458, "cache: one latent a token, for all heads"),
        arrow((right + 8, 413), (753 - CELL * TOP_K / 2 - 8, 413)),
        cells(753 - CELL * TOP_K / 2, 392, 42, [True] * TOP_K),
        text("small middle", 753, 458, "K selected latents"),
        arrow((753 + CELL * TOP_K / 2 + 8, 413), (940, 413), (940, 332)),
        # The attention.
        '<rect class="box" x="856" y="150" width="168" height="182" rx="8"/>',
        text("title middle", 940, 206, "multi-query"),
        text("title middle", 940, 227, "sparse attention"),
        text("small middle", 940, 253, "softmax over K keys"),
        text("small middle", 940, 273, "instead of all of them"),
        text("small middle", 940, 299, "(Eq. 2)"),
        arrow((1024, 241), (1060, 241)),
        text("title", 1066, 246, "output"),
        # How the indexer learns.
        arrow((856, 178), (650, 178), kind="kl", head="klhead"),
        detached(838, 178, upright=True),
        text("plain learn middle", 753, 148, "KL loss (Eqs. 3, 4)"),
        text("small learn middle", 753, 167, "the indexer imitates"),
    ]
    body = "\n".join(parts)
    title = "DeepSeek Sparse Attention: an indexer scores all earlier keys, the best K are attended to"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
