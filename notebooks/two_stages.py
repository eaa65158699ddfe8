# %% [markdown]
# # A dense checkpoint through both stages
#
# Sparse attention is not trained from nothing. You have a dense checkpoint; it gets a new indexer; then come two
# stages:
#
# | stage | attention | what trains | by which loss |
# |---|---|---|---|
# | WARMUP | dense | the indexer alone | KL to the attention, over all keys (Eq. 3) |
# | SPARSE | the selected keys | everything | language loss; for the indexer KL over the selection (Eq. 4) |
#
# Here is all of it in small: a dense checkpoint in Hugging Face's layout, both stages with the functions of `train`,
# the curves, dense against sparse, and a continuation. With your own checkpoint, skip the first part.

# %%
import dataclasses
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import save_file

from dsa_jax import Config, generate, load_hf, save_hf, to_hf
from train.data import DataConfig, load
from train.evaluation.evaluate import held_out_losses
from train.evaluation.held_out import HeldOut, draw_batches
from train.optimizer import OptimizerSettings
from train.phases import BASE, SPARSE, WARMUP
from train.run import Run, load_model
from train.saved.initial import InitialParams
from train.settings import PhaseSettings, RunConfig, Stage

SCALE = 1  # on the number of steps
T, K, B = 192, 16, 6  # tokens of a row, selected keys, rows of a batch
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The text
#
# Short stories that put things somewhere and ask for them later, so that far tokens matter. Tokens are bytes. One file
# is held out of training by itself.

# %%
PEOPLE, THINGS = ("Ada", "Ben", "Cleo", "Dan", "Eve"), ("key", "map", "coin", "ring", "book")
PLACES = ("attic", "barn", "cellar", "garden", "kitchen")


def write_story(rng):
    """Writes who put what where, in any order, and then asks for each thing."""
    puts = list(zip(rng.permutation(PEOPLE), rng.permutation(THINGS), rng.permutation(PLACES), strict=True))
    told = [f"{who} put the {what} in the {where}." for who, what, where in puts]
    asked = [f"Where is the {what}? In the {where}." for _, what, where in rng.permutation(puts)]
    return " ".join(told + asked) + "\n"


rng = np.random.default_rng(0)
for number in range(12):
    (folder / f"{number}.txt").write_text("\n".join(write_story(rng) for _ in range(100)))
data = DataConfig(data=(str(folder / "*.txt"),))
corpus = load(data)
print(f"{corpus.tokens('train'):,} bytes to train on, {corpus.tokens('held_out'):,} held out; for example")
print(write_story(rng))

# %% [markdown]
# ## A dense checkpoint
#
# BASE trains a dense model. A run is a value: the model's sizes, the phases with their stages and optimizers, the
# data. It trains into a folder, which holds its metrics and checkpoints.

# %%
sizes = Config.tiny(num_hidden_layers=2, first_k_dense_replace=2, index_topk=K)  # two layers, no experts
rate = OptimizerSettings(learning_rate=4e-3, muon_learning_rate=0.02, schedule="cosine", weight_decay=0.0)
base = RunConfig(
    model=sizes,
    phases=(PhaseSettings(BASE, (Stage(100 * SCALE, B, T),), backbone=rate),),
    data=data,
    checkpoint_every=1000,
)
base_run = Run(base, folder / "base")
base_run.train(corpus)
base_losses = [record["lm_loss"] for record in base_run.records()]
print(f"language loss {base_losses[0]:.2f} -> {base_losses[-1]:.2f} nats a byte")

# %% [markdown]
# What we have at this point is what you may have anyway: weights, in the layout of `deepseek_v3`, which knows no
# indexer. `save_hf` would write the untrained indexer too, so the file is written by hand: `to_hf` names the tensors.
# `load_hf` draws a new indexer, of the sizes that `config` says, and warns of it.

# %%
dense = folder / "dense"
dense.mkdir()
model = load_model(folder / "base")
save_file({name: np.asarray(x) for name, x in to_hf(model) if "indexer" not in name}, dense / "model.safetensors")
described = {key: value for key, value in sizes.to_hf().items() if not key.startswith("index_")}
(dense / "config.json").write_text(json.dumps(described | {"model_type": "deepseek_v3"}))

loaded = load_hf(dense, dtype="float32", config=sizes)
tokens = jnp.asarray(corpus.prompt(T))[None]
same = model(tokens, attention="dense").hidden == loaded(tokens, attention="dense").hidden
print(sorted(path.name for path in dense.iterdir()), "- dense, the same bits:", bool(same.all()))
assert same.all()

# %% [markdown]
# ## Both stages
#
# One run with two phases, which begins with the dense checkpoint. The published recipe has the same form, with other
# numbers: `train.presets.deepseek_v32()`.

# %%
warmup_rate = OptimizerSettings(learning_rate=1e-2, weight_decay=0.0)
sparse_rate = OptimizerSettings(learning_rate=1e-3, schedule="cosine", weight_decay=0.0)
config = dataclasses.replace(
    base,
    phases=(
        PhaseSettings(WARMUP, (Stage(40 * SCALE, B, T),), indexer=warmup_rate),
        PhaseSettings(SPARSE, (Stage(50 * SCALE, B, T),), backbone=sparse_rate, indexer=sparse_rate),
    ),
)
run = Run(config, folder / "sparse", init=InitialParams(dense))
state = run.train(corpus)

warmup = [record for record in run.records() if record["phase"] == "WARMUP"]
sparse = [record for record in run.records() if record["phase"] == "SPARSE"]
print(f"WARMUP: KL {warmup[0]['kl']:.3f} -> {warmup[-1]['kl']:.3f} nats a query, of all layers")
print(f"SPARSE: language loss {sparse[0]['lm_loss']:.3f} -> {sparse[-1]['lm_loss']:.3f}, KL {sparse[-1]['kl']:.3f}")
assert base_losses[-1] < 0.5 * base_losses[0] and warmup[-1]["kl"] < 0.5 * warmup[0]["kl"]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3), layout="constrained")
begin = len(base_losses) + len(warmup)
left.plot(base_losses, color="black", label="BASE")
left.plot(
    range(begin, begin + len(sparse)), [record["lm_loss"] for record in sparse], color="tab:orange", label="SPARSE"
)
left.axvspan(len(base_losses), begin, color="0.93", label="WARMUP: the model is frozen")
left.set(xlabel="step", title="language loss, nats a byte", yscale="log")
left.legend(fontsize=7)
right.plot([record["kl"] for record in warmup], color="black", label="WARMUP, over all keys")
right.plot(
    range(len(warmup), len(warmup) + len(sparse)),
    [record["kl"] for record in sparse],
    color="tab:orange",
    label="SPARSE, over the selection",
)
right.set(xlabel="step since WARMUP began", title="KL of the indexer, nats a query", ylim=(0, None))
right.legend(fontsize=7)
plt.show()

# %% [markdown]
# ## Dense against sparse
#
# The held-out loss at three points: with the indexer as it was drawn, after WARMUP, and after SPARSE; each with dense
# attention and with the `K` selected keys. WARMUP leaves the dense loss as it is, bit for bit, and brings the sparse
# loss near to it. SPARSE adapts the model to its selection.

# %%
held_out = HeldOut({"stories": draw_batches(corpus, 4, B, T)})
weights = {
    "new indexer": run.initial_params(),
    "after WARMUP": run.params_after("WARMUP"),
    "after SPARSE": state.params,
}
table = {
    name: [
        held_out_losses(run.graphdef, params, held_out, attention=attention)["stories"]
        for attention in ("dense", "sparse")
    ]
    for name, params in weights.items()
}
print(f"{'':14} {'dense':>8} {f'K = {K}':>8}")
for name, (by_dense, by_sparse) in table.items():
    print(f"{name:14} {by_dense:8.3f} {by_sparse:8.3f}")

new, warm, final = table.values()
assert new[0] == warm[0]  # the backbone did not move
assert warm[1] - warm[0] < 0.5 * (new[1] - new[0])
assert final[1] < warm[1]

# %% [markdown]
# ## Use it
#
# `load_model` reads the run, `save_hf` writes a checkpoint with its indexer, and `generate` continues a prompt by the
# selected keys. (This model has seen its text for a minute at most: it has the form, not the memory.)

# %%
trained = load_model(folder / "sparse")
save_hf(trained, folder / "checkpoint")
print(json.loads((folder / "checkpoint" / "config.json").read_text())["model_type"])

prompt = write_story(np.random.default_rng(7))[:150]
continued = generate(trained, [list(prompt.encode())], max_new_tokens=80, temperature=0.0)
print(prompt + "|" + bytes(np.asarray(continued[0]).tolist()).decode(errors="replace"))
