# %% [markdown]
# # Inside an indexer
#
# Which tokens does an indexer pick, and are they the ones that the attention wants? This notebook trains a small model
# on real text, Python's own standard library, and then its indexer. It draws the selection of one query over the
# tokens of the text, layer by layer, beside the best selection there is and beside a window of the last tokens; and it
# measures how much of the attention each of them keeps.
#
# The model trains for a minute or less, so it knows little Python. That is enough to see the indexer work: it imitates
# the attention, whatever that has learnt. `SCALE = 10` trains ten times as long.

# %%
import sysconfig
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsa_jax import Config, KeyRange, select_topk
from train.data import DataConfig, load
from train.optimizer import OptimizerSettings
from train.phases import BASE, WARMUP, merge_groups, window_selection
from train.run import Run
from train.settings import PhaseSettings, RunConfig, Stage

SCALE = 1  # on the number of steps
T, K, VOCABULARY, LAYERS = 256, 16, 512, 2
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Text and tokenizer
#
# A few packages of the standard library, and a tokenizer learnt from them: byte-pair encoding with a small vocabulary,
# so that tokens are pieces of words. (On bytes, a selection would be single letters.)

# %%
library = Path(sysconfig.get_path("stdlib"))
packages = ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging", "unittest", "xml")
files = sorted(str(path) for name in packages for path in (library / name).rglob("*.py"))

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train(files, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False))
tokenizer.save(str(folder / "tokenizer.json"))

data = DataConfig(data=tuple(files), tokenizer=folder / "tokenizer.json")
corpus = load(data, vocab_size=VOCABULARY)
print(f"{len(files)} files: {corpus.tokens('train'):,} tokens to train on, {corpus.tokens('held_out'):,} held out")
print([tokenizer.decode([token]) for token in tokenizer.encode("return self._loop.create_future()").ids])

# %% [markdown]
# ## Train the model, then its indexer
#
# BASE trains the dense model, first on short rows, which are cheap, then on rows of `T` tokens. WARMUP freezes it and
# trains the indexer alone to predict where the attention goes.

# %%
model_rate = OptimizerSettings(learning_rate=4e-3, muon_learning_rate=0.02, schedule="cosine", weight_decay=0.0)
indexer_rate = OptimizerSettings(learning_rate=1e-2, weight_decay=0.0)
config = RunConfig(
    model=Config.tiny(
        vocab_size=VOCABULARY, num_hidden_layers=LAYERS, first_k_dense_replace=LAYERS, index_topk=K
    ),  # no experts
    phases=(
        PhaseSettings(BASE, (Stage(120 * SCALE, 16, 64), Stage(40 * SCALE, 4, T)), backbone=model_rate),
        PhaseSettings(WARMUP, (Stage(40 * SCALE, 4, T),), indexer=indexer_rate),
    ),
    data=data,
    checkpoint_every=1000,
)
run = Run(config, folder / "run")
state = run.train(corpus)

records = run.records()
losses = [record["lm_loss"] for record in records if record["phase"] == "BASE"]
kls = [record["kl"] for record in records if record["phase"] == "WARMUP"]
print(f"BASE:   language loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f} nats a token")
print(f"WARMUP: KL {kls[0]:.2f} -> {kls[-1]:.2f} nats a query, of all layers")
assert np.mean(losses[-10:]) < 0.7 * losses[0] and kls[-1] < 0.5 * kls[0]

# %% [markdown]
# ## Look inside
#
# `attention_maps` gives what a layer does for every pair of tokens: the attention of each head, the index scores and
# the selection. The attention averaged over heads is `p`, what the indexer was trained to predict. The best selection
# of `K` keys, the *oracle*, is the top-K of `p`. It stands here as a yardstick: to know it one needs the dense
# attention.
#
# The text is held out: neither model nor indexer has seen it.

# %%
trained = merge_groups(run.graphdef, state.params)
untrained = merge_groups(run.graphdef, run.params_after("BASE"))  # the same model with the indexer as it was drawn

tokens = next(corpus.batches("held_out", batch_size=8, seq_len=T, seed=0)).tokens
keys = KeyRange.causal(*tokens.shape)
attention, selections = [], []
for layer in range(LAYERS):
    maps = trained.attention_maps(tokens, layer, keys=keys, attention="dense")
    p = maps.weights.mean(axis=1)  # [B, T, S]
    attention.append(p)
    selections.append(
        {
            "last K keys": window_selection(keys, K),
            "untrained indexer": untrained.attention_maps(tokens, layer, keys=keys, attention="dense").selected,
            "trained indexer": maps.selected,
            "oracle": select_topk(p, K, keys=keys),
        }
    )
print("p", p.shape, "selected", maps.selected.shape)

# %% [markdown]
# ## How much of the attention is kept
#
# The *kept mass* of a selection is the sum of `p` over its keys: 1 would be all of it. Queries that reach fewer than
# `4 K` keys are left out, since they have little to choose from.


# %%
def kept(p, selected):
    """Sums the attention [B, T, S] of each query over its selected keys: [B, T]."""
    mass = jnp.take_along_axis(p, jnp.maximum(selected, 0), axis=2)
    return jnp.where(selected >= 0, mass, 0).sum(axis=2)


names = list(selections[0])
mass = np.array(
    [[kept(p, s[name])[:, 4 * K :].mean() for name in names] for p, s in zip(attention, selections, strict=True)]
)

figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for place, name in enumerate(names):
    bars = axis.bar(np.arange(LAYERS) + 0.2 * (place - 1.5), mass[:, place], 0.18, label=name)
    axis.bar_label(bars, fmt="%.2f", fontsize=7)
axis.set(xticks=range(LAYERS), xticklabels=[f"layer {layer}" for layer in range(LAYERS)], ylim=(0, 1))
axis.set(ylabel="kept mass", title=f"attention kept by {K} of up to {T} keys")
axis.legend(fontsize=7, ncols=2)
plt.show()

by_name = dict(zip(names, mass.T, strict=True))
print({name: [round(float(x), 3) for x in by_name[name]] for name in names})
assert (by_name["trained indexer"] > by_name["last K keys"]).all()
assert (by_name["trained indexer"] > by_name["untrained indexer"]).all()
assert (by_name["trained indexer"] <= by_name["oracle"] + 1e-6).all()

# %% [markdown]
# ## The selection as a picture
#
# One query, chosen because most of its attention lies beyond the window: such queries are what a selection is for. It
# is the last token, in a box. Every selected token is coloured, the darker the more attention it gets; what is not
# selected is grey and never read. `↵` is the end of a line.

# %%
WIDTH, FONT = 52, 6.5  # characters of a line, points


def place_tokens(ids):
    """Lays tokens out on lines of WIDTH characters: for each a list of (line, column, text)."""
    line, column, places = 0, 0, []
    for token in ids:
        pieces = []
        for letter in tokenizer.decode([int(token)]):
            if column == WIDTH:
                line, column = line + 1, 0
            pieces.append((line, column, "↵" if letter == "\n" else letter))
            line, column = (line + 1, 0) if letter == "\n" else (line, column + 1)
        places.append(pieces)
    return places


def draw_selection(axis, places, selected, p, title):
    """Draws the tokens up to a query, the last: those selected on a ground as dark as their attention."""
    peak = max(float(p[s]) for s in selected)
    for s, pieces in enumerate(places):
        for line, column, letter in pieces:
            if s in selected:
                shade = plt.cm.Oranges(0.15 + 0.75 * (float(p[s]) / peak) ** 0.5)
                axis.add_patch(Rectangle((column, line), 1, 1, color=shade, linewidth=0))
            if letter != " ":
                color = "black" if s in selected or s == len(places) - 1 else "0.65"
                axis.text(
                    column + 0.5,
                    line + 0.55,
                    letter,
                    family="monospace",
                    size=FONT,
                    color=color,
                    ha="center",
                    va="center",
                )
    (line, column, _), width = places[-1][0], len(places[-1])
    axis.add_patch(Rectangle((column, line), width, 1, fill=False, linewidth=1))
    axis.set(xlim=(-0.5, WIDTH + 0.5), ylim=(places[-1][-1][0] + 1.5, -0.5))
    axis.set_title(title, fontsize=8)
    axis.axis("off")


# %% [markdown]
# Rows are layers. The first column is what the model would attend to, the second the best choice, the third a window.

# %%
beyond = sum(
    kept(p, s["trained indexer"]) - kept(p, s["last K keys"]) for p, s in zip(attention, selections, strict=True)
)
reach = jnp.arange(T) >= T * 3 // 4  # far into its row
row, t = (int(i) for i in jnp.unravel_index(jnp.argmax(jnp.where(reach, beyond, -jnp.inf)), beyond.shape))
places = place_tokens(tokens[row, : t + 1])

shown = ("trained indexer", "oracle", "last K keys")
lines = places[-1][-1][0] + 2
size = (len(shown) * WIDTH * 0.66 * FONT / 72, LAYERS * (lines * 1.3 * FONT + 24) / 72)
figure, axes = plt.subplots(LAYERS, len(shown), figsize=size, squeeze=False, layout="constrained")
for layer, (p, chosen) in enumerate(zip(attention, selections, strict=True)):
    for axis, name in zip(axes[layer], shown, strict=True):
        selected = [int(s) for s in chosen[name][row, t] if s >= 0]
        share = float(kept(p, chosen[name])[row, t])
        draw_selection(axis, places, selected, p[row, t], f"layer {layer}, {name}: {share:.0%} of the attention")
plt.show()

# %% [markdown]
# In words: the selected tokens of the indexer, by layer, with the share of the attention that each gets.

# %%
print("the query:", repr(tokenizer.decode([int(tokens[row, t])])), "at", t)
for layer, (p, chosen) in enumerate(zip(attention, selections, strict=True)):
    selected = [int(s) for s in chosen["trained indexer"][row, t] if s >= 0]
    best = sorted(selected, key=lambda s: -float(p[row, t, s]))[:8]
    pieces = [f"{tokenizer.decode([int(tokens[row, s])])!r} {t - s} back {float(p[row, t, s]):.0%}" for s in best]
    print(f"layer {layer}:", ", ".join(pieces))

# %% [markdown]
# ## How far back it looks
#
# Over all queries: at which distance the selected keys lie. A window has all of its keys within `K`; the indexer
# spreads them as the attention does.

# %%
figure, axes = plt.subplots(1, LAYERS, figsize=(5 * LAYERS, 2.6), sharey=True, squeeze=False, layout="constrained")
edges = np.geomspace(1, T, 17)
for layer, axis in enumerate(axes[0]):
    for name, style in (("oracle", "--"), ("trained indexer", "-"), ("untrained indexer", ":")):
        chosen = np.asarray(selections[layer][name])[:, 4 * K :]
        distance = np.arange(4 * K, T)[:, None] - chosen + 1
        counts = np.histogram(distance[chosen >= 0], bins=edges)[0]
        axis.stairs(np.cumsum(counts) / counts.sum(), edges, label=name, linestyle=style, color="black")
    axis.axvline(K, color="0.7")
    axis.set(xscale="log", xlabel="tokens back", title=f"layer {layer}")
axes[0, 0].set(ylabel="share of selected keys")
axes[0, 0].legend(fontsize=7)
plt.show()

far = np.asarray(selections[-1]["trained indexer"])[:, 4 * K :] <= np.arange(4 * K, T)[:, None] - K
print(f"{far.mean():.0%} of the keys that the last layer selects lie beyond the last {K}")
