"""The colours and the style that the charts of docs/figures share."""

# Light and dark: what matplotlib draws in the first is shown in the second where the reader's screen is dark.
INK, QUIET, CARD = ("#1f2328", "#e6edf3"), ("#59636e", "#9da7b3"), ("#ffffff", "#0d1117")
OURS, RECORDED, PEER = ("#c77700", "#f0a63a"), ("#f0cf96", "#6b4f1c"), ("#9aa4b0", "#59636e")
LINE = ("#d1d9e0", "#30363d")
PALETTE = (INK, QUIET, CARD, OURS, RECORDED, PEER, LINE)

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read, searched and checked
    "svg.hashsalt": "dsa_jax",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK[0],
    "axes.labelcolor": QUIET[0],
    "axes.edgecolor": LINE[0],
    "xtick.color": QUIET[0],
    "ytick.color": INK[0],
    "figure.facecolor": CARD[0],
    "figure.constrained_layout.w_pad": 0.15,  # inches
    "figure.constrained_layout.h_pad": 0.09,
    "axes.facecolor": CARD[0],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}
