# %% [markdown]
# # DSA in a model of your own
#
# The mechanism is a handful of functions, so it needs neither this library's model nor its trainer. Here is a causal
# language model written as plain Flax modules, with attention made of four functions: `index_scores`, `select_keys`,
# `sparse_attention` and `sparse_indexer_kl`. Optax trains it.
#
# The text is made so that far keys matter: `PERIOD` random letters, said twice. The second half can be foretold, but
# only by who looks `PERIOD` letters back, far outside of a window of the last `K` keys.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from dsa_jax import KeyRange, index_scores, select_keys, sparse_attention, sparse_indexer_kl

LETTERS, PERIOD, K = 26, 32, 6  # K: selected keys
T = 2 * PERIOD
D, N, C, R = 64, 4, 24, 8  # model, attention heads, latent, columns that only keys have
J, E = 4, 16  # index heads, and the width of one
DENSE_STEPS, SPARSE_STEPS, B = 130, 30, 16


def draw_text(rng):
    """Draws B rows of letters, each said twice."""
    once = rng.integers(LETTERS, size=(B, PERIOD))
    return jnp.asarray(np.concatenate([once, once], axis=1))


print("".join(chr(97 + letter) for letter in draw_text(np.random.default_rng(0))[0]))

# %% [markdown]
# ## The indexer
#
# Three projections: `J` queries, one key and `J` weights a token. It reads what the attention reads, *detached*. That
# `stop_gradient` is the one thing you must not forget: without it the indexer's loss would train the layers below.


# %%
class Indexer(nnx.Module):
    """Makes the index queries, keys and head weights of one layer."""

    def __init__(self, rngs):
        self.q = nnx.Linear(D, J * E, use_bias=False, rngs=rngs)
        self.k = nnx.Linear(D, E, use_bias=False, rngs=rngs)
        self.weights = nnx.Linear(D, J, use_bias=False, rngs=rngs)

    def __call__(self, x):
        """Projects hidden states [B, T, D] to q_index [B, T, J, E], k_index [B, T, E] and weights [B, T, J]."""
        x = jax.lax.stop_gradient(x)
        return self.q(x).reshape(*x.shape[:2], J, E), self.k(x), self.weights(x)


# %% [markdown]
# ## The attention
#
# `sparse_attention` is multi-query: all heads read the same rows of `C + R` numbers, of which the first `C` are the
# values as well. `select_keys` chooses the rows, `sparse_indexer_kl` says for each query how far the index scores are
# from where the attention went. Nothing is stored in the module: divergence and selection are returned.
#
# With `k = T` every reachable key is selected. Then the attention is dense, and the divergence runs over all keys:
# that is the warm-up's loss (Eq. 3 of the report). With a small `k` it is Eq. 4. So one module serves both stages.


# %%
class Attention(nnx.Module):
    """Attends to the keys that the indexer selects."""

    def __init__(self, rngs):
        self.q = nnx.Linear(D, N * (C + R), use_bias=False, rngs=rngs)
        self.kv = nnx.Linear(D, C + R, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(N * C, D, use_bias=False, rngs=rngs)
        self.indexer = Indexer(rngs)

    def __call__(self, x, keys, k, selected=None):
        """Returns the attention's output [B, T, D], the KL [B, T] and the selection [B, T, k], unless that is given."""
        q, kv, index = self.q(x).reshape(*x.shape[:2], N, C + R), self.kv(x), self.indexer(x)
        selected = select_keys(*index, keys, k=k) if selected is None else selected
        out, lse = sparse_attention(q, kv, selected, value_dim=C, scale=(C + R) ** -0.5)
        kl = sparse_indexer_kl(*index, q, kv, lse, selected, scale=(C + R) ** -0.5)
        return self.out(out.reshape(*x.shape[:2], N * C)), kl, selected


# %% [markdown]
# ## The model
#
# An ordinary transformer around it, with learnt positions.


# %%
class Block(nnx.Module):
    """One layer: attention, then a feed-forward, each behind a norm."""

    def __init__(self, rngs):
        self.norm_1, self.norm_2 = nnx.RMSNorm(D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)
        self.attention = Attention(rngs)
        self.up, self.down = nnx.Linear(D, 4 * D, rngs=rngs), nnx.Linear(4 * D, D, rngs=rngs)

    def __call__(self, x, keys, k, selected=None):
        """Returns the new hidden states, the KL and the selection."""
        attended, kl, selected = self.attention(self.norm_1(x), keys, k, selected)
        x = x + attended
        return x + self.down(jax.nn.gelu(self.up(self.norm_2(x)))), kl, selected


class LanguageModel(nnx.Module):
    """A causal language model of two layers."""

    def __init__(self, rngs):
        self.letters, self.positions = nnx.Embed(LETTERS, D, rngs=rngs), nnx.Embed(T, D, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm, self.head = nnx.RMSNorm(D, rngs=rngs), nnx.Linear(D, LETTERS, rngs=rngs)

    def __call__(self, tokens, *, k, selected=None):
        """Returns logits [B, T, LETTERS], and KL and selection of each layer; `selected` is imposed on all layers."""
        keys = KeyRange.causal(*tokens.shape)
        x, kls, selections = self.letters(tokens) + self.positions(jnp.arange(tokens.shape[1])), [], []
        for block in self.blocks:
            x, kl, chosen = block(x, keys, k, selected)
            kls.append(kl)
            selections.append(chosen)
        return self.head(self.norm(x)), jnp.stack(kls), jnp.stack(selections)


model = LanguageModel(nnx.Rngs(0))
tokens = draw_text(np.random.default_rng(0))
logits, kl, selected = model(tokens, k=K)
print("logits", logits.shape, "KL [layers, B, T]", kl.shape, "selected [layers, B, T, K]", selected.shape)

# %% [markdown]
# ## Two losses, two groups of parameters
#
# The backbone learns from the language loss, the indexer from the KL: the mean over queries, summed over layers. The
# module is split into the two groups, used as a value, and merged inside the loss.

# %%
graph, indexer, backbone = nnx.split(model, lambda path, _: "indexer" in path, ...)


def losses(backbone, indexer, tokens, k, selected=None):
    """Computes the language loss in the second half, and the indexer's loss."""
    logits, kl, _ = nnx.merge(graph, indexer, backbone)(tokens, k=k, selected=selected)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return nats[:, PERIOD - 1 :].mean(), kl.mean(axis=(1, 2)).sum()


language, kl = losses(backbone, indexer, tokens, K)
print(f"language loss {language:.2f} nats (chance is {np.log(LETTERS):.2f}), KL {kl:.3f} nats")

# %% [markdown]
# ## The gradients are kept apart
#
# Differentiate each loss by each group. Of the four gradients two must be exactly zero: the KL has none by the
# backbone, since the indexer's inputs are detached and the attention is a constant to it; and the language loss has
# none by the indexer, since a selection has no gradient. So the two losses may simply be added.


# %%
@jax.jit
def gradient_norms(backbone, indexer, tokens):
    """Computes the norm of the gradient of both losses by both groups."""
    by_group = jax.jacrev(lambda *groups: losses(*groups, tokens, K), argnums=(0, 1))(backbone, indexer)
    return [[optax.tree.norm(group) for group in each] for each in by_group]


(language_by_backbone, language_by_indexer), (kl_by_backbone, kl_by_indexer) = gradient_norms(backbone, indexer, tokens)
print(f"language loss: by the backbone {language_by_backbone:.3f}, by the indexer {language_by_indexer}")
print(f"KL:            by the backbone {kl_by_backbone}, by the indexer {kl_by_indexer:.3f}")
assert kl_by_backbone == 0 and language_by_indexer == 0
assert language_by_backbone > 0 and kl_by_indexer > 0

# %% [markdown]
# ## Train
#
# Each group has an optimizer of its own, so that clipping and Adam's moments do not couple what the losses keep apart.
# First `k = T`: dense attention, which the indexer learns to imitate. Then `k = K`: everything trains through the
# selection. (A large model is trained first and its indexer afterwards. This one is too small for it to matter.)

# %%
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))


@jax.jit(static_argnames="k")
def step(groups, states, tokens, k):
    """Takes one step down the sum of both losses; each group moves by its own."""

    def total(groups):
        parts = losses(*groups, tokens, k)
        return sum(parts), parts

    gradients, parts = jax.grad(total, has_aux=True)(groups)
    moved = [optimizer.update(g, state) for g, state in zip(gradients, states, strict=True)]
    groups = tuple(optax.apply_updates(group, updates) for group, (updates, _) in zip(groups, moved, strict=True))
    return groups, tuple(state for _, state in moved), parts


rng, history = np.random.default_rng(1), []
groups = backbone, indexer
states = tuple(optimizer.init(group) for group in groups)
for k, steps in ((T, DENSE_STEPS), (K, SPARSE_STEPS)):
    for _ in range(steps):
        groups, states, parts = step(groups, states, draw_text(rng), k)
        history.append([float(part) for part in parts])
    print(f"k = {k:2}: language loss {history[-1][0]:.3f}, KL {history[-1][1]:.3f}")

# %% [markdown]
# The KL rises where the language loss falls: the attention has moved to the far keys, and the indexer follows it.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for axis, curve, title in zip(
    axes, np.transpose(history), ("language loss, second half", "KL of the indexer"), strict=True
):
    axis.plot(curve, color="black", linewidth=1)
    axis.axvline(DENSE_STEPS, color="0.6", linestyle="--")
    axis.set(title=f"{title}, nats", xlabel="step; from the dashed line on sparse")
plt.show()
assert history[-1][0] < 0.5 * history[0][0]

# %% [markdown]
# ## Does it find the far key?
#
# Query `t` in the second half must predict letter `t + 1`, which stands at `t + 1 - PERIOD`. That key should be in its
# selection in one layer or another. The last `K` keys never hold it, and a model that may see only those guesses.

# %%
backbone, indexer = groups
fresh = draw_text(np.random.default_rng(2))
*_, selected = nnx.merge(graph, indexer, backbone)(fresh, k=K)

answer = jnp.arange(PERIOD, T - 1)
hit = (selected[:, :, PERIOD : T - 1] == (answer + 1 - PERIOD)[:, None]).any(axis=3)
print("share of queries whose selection holds the answer, by layer:", hit.mean(axis=(1, 2)))

window = jnp.arange(T)[:, None] - jnp.arange(K)[::-1]
window = jnp.broadcast_to(jnp.sort(jnp.where(window < 0, T, window), axis=1), (B, T, K))
window = jnp.where(window == T, -1, window)  # increasing positions, then -1
by_indexer, by_window = (float(losses(*groups, fresh, K, chosen)[0]) for chosen in (None, window))
print(f"language loss over the indexer's {K} keys {by_indexer:.3f}, over the last {K} keys {by_window:.3f}")
assert hit.any(axis=0).mean() > 0.8 and by_indexer < 0.5 * by_window

# %% [markdown]
# ## What the scores look like
#
# `index_scores` gives all `T × S` scores. Beside the causal edge there should be a line of high scores `PERIOD - 1`
# keys below the diagonal, in the layer that looks back.

# %%
trained = nnx.merge(graph, indexer, backbone)
keys = KeyRange.causal(B, T)
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
x = trained.letters(fresh) + trained.positions(jnp.arange(T))
for layer, (axis, block) in enumerate(zip(axes, trained.blocks, strict=True)):
    scores = index_scores(*block.attention.indexer(block.norm_1(x)), keys)
    axis.imshow(jax.nn.softmax(scores[0]) ** 0.5, cmap="Greys", interpolation="nearest")
    axis.set(title=f"layer {layer}: softmax(I), square root", xlabel="key s", ylabel="query t")
    x, *_ = block(x, keys, K)
plt.show()
