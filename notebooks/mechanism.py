# %% [markdown]
# # The mechanism in ten cells
#
# DeepSeek Sparse Attention (DSA) lets each query attend to a few keys only. A small second attention, the *lightning
# indexer*, scores every earlier token, the `K` best are selected, and attention runs over these alone. This notebook
# does each step for one layer, small enough for a laptop: score, select, attend, and teach the indexer what to select.
#
# Everything is a function that takes arrays and returns arrays. The letters: `B` batch, `T` queries, `S` keys, `K`
# selected keys, `N` attention heads, `J` index heads, `E` their width, `C + R` the width of a latent. Equations are
# numbered as in the DeepSeek-V3.2-Exp report.

# %% [markdown]
# ## 1. Project
#
# Multi-head latent attention (MLA) compresses each token to one *latent* of `C + R` numbers, which all heads share.
# The indexer makes `J` small queries, a single key and `J` head weights a token. It reads the hidden states detached,
# so no gradient of its loss reaches the rest of the model.
#
# A new layer attends to all keys almost alike, and then no selection is better than another. A trained layer has
# favourites. Queries four times as large give our layer some.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx

from dsa_jax import (
    Config,
    KeyRange,
    Transformer,
    attention_target,
    dense_indexer_kl,
    index_scores,
    multihead_attention,
    select_keys,
    select_topk,
    sparse_attention,
    sparse_indexer_kl,
)
from dsa_jax.rope import rotation
from train.phases import window_selection

T, K = 192, 32
config = Config.tiny(num_hidden_layers=1, index_topk=K)
scale = config.softmax_scale

layer = next(Transformer(config, rngs=nnx.Rngs(0)).layers())
attention = layer.self_attn  # a dsa_jax.SparseMLA
x = layer.input_layernorm(jax.random.normal(jax.random.key(1), (1, T, config.hidden_size)))
attention.q_b_proj[...] *= 4

angles = rotation(jnp.arange(T)[None], config)
p = attention.project(x, angles)
print("queries      ", p.q.shape, "[B, T, N, P + R]")
print("latents      ", p.kv.shape, "   [B, S, C + R]")
print("index queries", p.q_index.shape, "[B, T, J, E]")
print("index keys   ", p.k_index.shape, "    [B, S, E]")
print("head weights ", p.weights.shape, "    [B, T, J]")

# %% [markdown]
# ## 2. Score (Eq. 1)
#
# `I[t,s] = Σ_j w[t,j] · relu(q[t,j] · k[s])`: one number for each query and key. `KeyRange` is the only mask of the
# library; it says which keys a query may reach. Here it is causal: query `t` reaches the keys `0 … t`. What is out of
# reach scores `-inf`.

# %%
keys = KeyRange.causal(1, T)
scores = index_scores(p.q_index, p.k_index, p.weights, keys)

by_hand = jnp.einsum("btj,btjs->bts", p.weights, jax.nn.relu(jnp.einsum("btje,bse->btjs", p.q_index, p.k_index)))
reach = keys.mask(T)
assert jnp.allclose(jnp.where(reach, scores, 0), jnp.where(reach, by_hand, 0), atol=1e-4)
print("scores", scores.shape, "of query 3:", scores[0, 3, :6])

# %% [markdown]
# ## 3. Select
#
# A selection holds positions, in increasing order, then `-1` where a query reaches fewer than `K` keys. Of equal
# scores the lowest position wins, so the choice is always the same. `select_keys` joins scoring and selecting and
# never holds the `T × S` scores of a long sequence at once.

# %%
selected = select_keys(p.q_index, p.k_index, p.weights, keys, k=K)
assert jnp.array_equal(selected, select_topk(scores, K))
print("selected", selected.shape)
print("query 3 takes", selected[0, 3, :6])
print("query 150 takes", selected[0, 150, :6], "…")

# %% [markdown]
# ## 4. Attend to the selection (Eq. 2)
#
# In the *multi-query form* the queries are taken to the space of the latents (`absorb`), so that all heads read one
# latent: a selected key is gathered once and serves every head. `unabsorb` takes the result back to each head's
# values. `lse`, the logarithm of the softmax's denominator, is what the backward pass and the indexer's loss need.

# %%
q = attention.absorb(p.q)
out, lse = sparse_attention(q, p.kv, selected, value_dim=config.kv_lora_rank, scale=scale)
print("out", out.shape, "[B, T, N, C]   lse", lse.shape, "[B, T, N]")
print("values of the heads", attention.unabsorb(out).shape, "[B, T, N, V]")

# %% [markdown]
# ## 5. A selection of everything is dense attention
#
# With `K` as large as the sequence, each query selects every key that it reaches. The result must be that of dense
# attention, which runs in the *multi-head form*: the latents are expanded to keys and values of each head, which is
# cheaper where all keys are used.

# %%
everything = select_keys(p.q_index, p.k_index, p.weights, keys, k=T)
whole, _ = sparse_attention(q, p.kv, everything, value_dim=config.kv_lora_rank, scale=scale)
k, v = attention.expand(p.kv)
dense, dense_lse = multihead_attention(p.q, k, v, keys, scale=scale)

difference = float(jnp.abs(attention.unabsorb(whole) - dense).max())
print(f"largest difference between the two forms: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# ## 6. How good is a selection?
#
# The attention says itself where it looks: its probabilities, summed over the heads and divided by `N`, are a
# distribution `p[t,:]` over the keys. A selection is good if much of `p` lies on it: the *kept mass*. The best
# possible selection, the *oracle*, takes the `K` largest entries of `p`; it needs the dense attention that we want to
# avoid. The last `K` keys, a *window*, cost nothing and are what the indexer has to beat.

# %%
# Over all keys attention_target is p itself. Its columns are the positions of `everything`: those of the keys.
target = attention_target(q, p.kv, dense_lse, everything, scale=scale)
far = jnp.arange(T) >= 2 * K  # queries that have something to choose from


def kept_mass(selection):
    """Averages over the far queries the share of the attention that lies on the selected keys."""
    mass = jnp.take_along_axis(target, jnp.maximum(selection, 0), axis=2)
    return float(jnp.where(selection >= 0, mass, 0).sum(axis=2)[0, far].mean())


kept = {
    "oracle": kept_mass(select_topk(target, K, keys=keys)),
    "untrained indexer": kept_mass(selected),
    "window": kept_mass(window_selection(keys, K)),
}
print({name: round(mass, 3) for name, mass in kept.items()})

# %% [markdown]
# ## 7. What the indexer learns from (Eq. 3)
#
# A selection has no gradient, so the indexer cannot learn from the language loss. It learns to imitate `p` instead:
# `KL(p[t,:] ‖ softmax(I[t,:]))`, for each query. The target `p` is a constant. The gradient by the scores is then
# simply `softmax(I) - p`.

# %%
kl = dense_indexer_kl(p.q_index, p.k_index, p.weights, p.q, k, dense_lse, keys, scale=scale)

logits = jnp.where(reach[:, None], jnp.einsum("btnh,bsnh->bnts", p.q, k) * scale, -jnp.inf)
by_hand = jax.nn.softmax(logits).mean(axis=1)
terms = by_hand * (jnp.log(jnp.maximum(by_hand, 1e-30)) - jax.nn.log_softmax(scores))
assert jnp.allclose(kl, jnp.where(reach, terms, 0).sum(axis=2), atol=1e-3)
print("KL of each query", kl.shape, f"mean {kl.mean():.3f} nats")

# %% [markdown]
# ## 8. Warm up the indexer
#
# Modules are `flax.nnx`, used as values: split the parameters off, differentiate a function of them, merge again. Only
# the indexer's parameters move here, and attention stays dense. One random sequence is soon learnt by heart; what
# counts is that the kept mass follows the KL. (The notebook `two_stages` does this for a model and real batches.)

# %%
graph, indexer, rest = nnx.split(attention, lambda path, _: "indexer" in path, ...)
optimizer = optax.adam(1e-2)
state = optimizer.init(indexer)


@jax.jit
def step(indexer, state):
    """Takes one step of Adam down the mean KL of Eq. 3, with the indexer alone."""

    def loss(indexer):
        p = nnx.merge(graph, indexer, rest).project(x, angles)
        return dense_indexer_kl(p.q_index, p.k_index, p.weights, p.q, k, dense_lse, keys, scale=scale).mean()

    value, gradient = jax.value_and_grad(loss)(indexer)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(indexer, updates), state, value


losses = []
for _ in range(60):
    indexer, state, value = step(indexer, state)
    losses.append(float(value))
print(f"KL {losses[0]:.3f} -> {losses[-1]:.3f} nats a query")

p = nnx.merge(graph, indexer, rest).project(x, angles)
selected = select_keys(p.q_index, p.k_index, p.weights, keys, k=K)
kept["trained indexer"] = kept_mass(selected)
print({name: round(mass, 3) for name, mass in kept.items()})
assert losses[-1] < 0.5 * losses[0]
assert kept["oracle"] > kept["trained indexer"] > max(kept["window"], kept["untrained indexer"])

# %% [markdown]
# ## 9. Look at it
#
# On the left what the attention wants, in the middle what the trained indexer selects, on the right how much of the
# attention each selection keeps.

# %%
rows, columns = jnp.arange(T)[:, None], jnp.where(selected[0] < 0, T, selected[0])
picked = jnp.zeros((T, T)).at[rows, columns].set(1, mode="drop")  # T is no column: absent keys are dropped

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
left.imshow(target[0] ** 0.5, cmap="Greys", interpolation="nearest")
left.set(title="attention p, square root", xlabel="key s", ylabel="query t")
middle.imshow(picked, cmap="Greys", interpolation="nearest")
middle.set(title=f"the {K} keys of the trained indexer", xlabel="key s")
names = ["window", "untrained indexer", "trained indexer", "oracle"]
right.barh(names, [kept[name] for name in names], color="0.6")
right.set(title="kept mass", xlim=(0, 1))
plt.show()

# %% [markdown]
# ## 10. Train through the selection (Eq. 4)
#
# From now on attention runs over the selection, and everything trains: the model by the language loss, the indexer by
# the same KL, now over the selected keys alone. The two never mix: no gradient of the KL reaches the attention, and
# the attention's output does not depend on the index scores at all.

# %%
out, lse = sparse_attention(q, p.kv, selected, value_dim=config.kv_lora_rank, scale=scale)


def indexer_loss(q_index, q, kv):
    """Averages Eq. 4 over the queries."""
    return sparse_indexer_kl(q_index, p.k_index, p.weights, q, kv, lse, selected, scale=scale).mean()


by_index, by_q, by_kv = jax.grad(indexer_loss, argnums=(0, 1, 2))(p.q_index, q, p.kv)
norms = {"index queries": by_index, "queries": by_q, "latents": by_kv}
print("gradient of the KL by", {name: float(jnp.linalg.norm(gradient)) for name, gradient in norms.items()})
assert jnp.any(by_index != 0) and not jnp.any(by_q) and not jnp.any(by_kv)
