"""Prediction layers in float64 NumPy, on the parameters of a random model."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import reference
from layer_reference import f64, reference_attention, reference_indexer, rms_norm
from model_cases import model_parts

from dsa_jax.parallel.sharding import path_names


def wide_parameters(config) -> dict[str, Any]:
    """The random model's parameters in float64, by their paths with dots."""
    leaves = jax.tree_util.tree_leaves_with_path(model_parts(config)[1])
    return {".".join(path_names(path)): reference.f64(x) for path, x in leaves}


def module(arrays, prefix, layer) -> Any:
    """One layer of a stack as nested attributes, which hold arrays."""
    root: dict[str, Any] = {}
    for name, x in arrays.items():
        if name.startswith(prefix + "."):
            *parents, last = name.removeprefix(prefix + ".").split(".")
            at = root
            for parent in parents:
                at = at.setdefault(parent, {})
            at[last] = x[layer]
    return _attributes(root)


def _attributes(tree):
    return SimpleNamespace(**{k: _attributes(v) if isinstance(v, dict) else v for k, v in tree.items()})


def silu(x):
    return x / (1 + np.exp(-x))


def feed_forward(mlp, x, config):
    """The dense block, or the shared experts and each token's own, one token at a time."""
    swiglu = lambda x, gate, up, down: (silu(x @ gate) * (x @ up)) @ down
    if hasattr(mlp, "gate_proj"):
        return swiglu(x, f64(mlp.gate_proj), f64(mlp.up_proj), f64(mlp.down_proj))
    shared, experts = mlp.shared_experts, mlp.experts
    out = swiglu(x, f64(shared.gate_proj), f64(shared.up_proj), f64(shared.down_proj))
    scores = 1 / (1 + np.exp(-x @ f64(mlp.gate.weight)))
    for at in np.ndindex(x.shape[:-1]):
        biased = scores[at] + f64(mlp.gate.e_score_correction_bias)
        groups = biased.reshape(config.n_group, -1)
        best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(1), kind="stable")[: config.topk_group]
        allowed = np.isin(np.arange(biased.size) // groups.shape[1], best)
        chosen = np.argsort(-np.where(allowed, biased, -np.inf), kind="stable")[: config.num_experts_per_tok]
        gates = config.routed_scaling_factor * scores[at][chosen] / scores[at][chosen].sum()
        for expert, gate in zip(chosen, gates, strict=True):
            arrays = (f64(x)[expert] for x in (experts.gate_proj, experts.up_proj, experts.down_proj))
            out[at] += gate * swiglu(x[at], *arrays)
    return out


def predict(layer, hidden, embedded, positions, keys, config, *, attention, selected=None):
    """One prediction layer: hidden states after its norm, the KL of its indexer, and what it selects.

    `selected` imposes a selection, for differences, across which it must not change.
    """
    joined = np.concatenate([rms_norm(embedded, layer.enorm.weight), rms_norm(hidden, layer.hnorm.weight)], -1)
    x = joined @ f64(layer.eh_proj)
    y, size = rms_norm(x, layer.input_layernorm.weight), x.shape[1]
    rows = reference.reachable(keys.start, keys.stop, size)
    q_latent = rms_norm(y @ f64(layer.self_attn.q_a_proj), layer.self_attn.q_a_layernorm.weight)
    index = reference_indexer(layer.self_attn.indexer, y, q_latent, positions, config)
    if attention == "sparse":
        if selected is None:
            selected = reference.select_topk(reference.index_scores(*index, rows), config.index_topk, rows)
        rows = reference.listed(selected, size)
    out, q, k, lse = reference_attention(layer.self_attn, y, positions, rows, config)
    kl = reference.indexer_kl(*index, q, k, lse, rows, config.softmax_scale)
    x = x + out
    x = x + feed_forward(layer.mlp, rms_norm(x, layer.post_attention_layernorm.weight), config)
    return rms_norm(x, layer.norm.weight), kl, selected


def cross_entropy(hidden, head, targets, counted):
    """The sum of the negative log-likelihoods that count."""
    logits = hidden @ head
    logits = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return np.where(counted, losses, 0).sum()
