"""Native Sparse Attention in float64 NumPy, from the paper's equations, by lists of the keys of every query."""

import numpy as np
import reference
from reference import f64


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _windows(length, sizes):
    """The keys of every entry."""
    return [np.arange(begin, begin + sizes.compression) for begin in range(0, length, sizes.stride)]


def compress(kv, position, up, down, sizes):
    """Eq. 7: each entry from its own keys, one after the other."""
    kv, position, up, down = (f64(x) for x in (kv, position, up, down))
    entries = []
    for keys in _windows(kv.shape[1], sizes):
        if keys[-1] < kv.shape[1]:
            hidden = (kv[:, keys, : len(up)] + position) @ up
            entries.append(kv[:, keys].mean(1))
            entries[-1][:, : len(up)] += (hidden * sigmoid(hidden)).mean(1) @ down
    return np.stack(entries, 1)


def compress_vjp(kv, position, up, down, sizes, d_entries):
    """Gradients of Σ d_entries · entries by kv, position, up and down."""
    kv, position, up, down, d_entries = (f64(x) for x in (kv, position, up, down, d_entries))
    d_kv, d_position, d_up, d_down = (np.zeros_like(x) for x in (kv, position, up, down))
    for entry in range(d_entries.shape[1]):
        keys, d_mean = _windows(kv.shape[1], sizes)[entry], d_entries[:, entry]
        seen, d = kv[:, keys, : len(up)] + position, d_mean[:, : len(up)]
        hidden = seen @ up
        gate = sigmoid(hidden)
        d_down += (hidden * gate).mean(1).T @ d
        d_hidden = (d @ down.T)[:, None] / len(keys) * gate * (1 + hidden * (1 - gate))
        d_up += np.einsum("bph,bpu->hu", seen, d_hidden)
        d_position += (d_hidden @ up.T).sum(0)
        d_kv[:, keys] += d_mean[:, None] / len(keys)
        d_kv[:, keys, : len(up)] += d_hidden @ up.T
    return d_kv, d_position, d_up, d_down


def entry_rows(rows, size, sizes):
    """The entries of each query all of whose keys it reaches."""
    whole = [keys for keys in _windows(size, sizes) if keys[-1] < size]
    return [[np.flatnonzero([np.isin(keys, row).all() for keys in whole]) for row in batch] for batch in rows]


def select_blocks(q, entries, rows, size, sizes, scale):
    """Eqs. 8 to 11: an entry's attention counts for a block by the strides that they share; lists of blocks."""
    mine, count = entry_rows(rows, size, sizes), -(-size // sizes.block)
    shared = np.zeros((entries.shape[1], count))
    for entry in range(entries.shape[1]):
        keys = entry * sizes.stride + np.arange(sizes.compression)
        np.add.at(shared[entry], np.minimum(keys // sizes.block, count - 1), 1 / sizes.stride)
    _, lse = reference.latent_attention(q, entries, mine, 1, scale)
    chosen = []
    for b, batch in enumerate(rows):
        chosen.append([])
        for t, row in enumerate(batch):
            entry, score = mine[b][t], np.zeros(count)
            if len(entry):
                p = np.exp(scale * f64(q)[b, t] @ f64(entries)[b, entry].T - lse[b, t][:, None]).sum(0)
                score = p @ shared[entry]
            held = sorted({key // sizes.block for key in row})
            fixed = {held[0], held[-1], held[-1] - 1} & set(held) if held else set()
            order = sorted(held, key=lambda j: (j not in fixed, -score[j], j))
            chosen[b].append(sorted(order[: sizes.blocks]))
    return chosen


def block_rows(rows, blocks, sizes):
    """The keys in reach of the selected blocks."""
    return [
        [row[np.isin(row // sizes.block, chosen)] for row, chosen in zip(*pair, strict=True)]
        for pair in zip(rows, blocks, strict=True)
    ]


def window_rows(rows, sizes):
    """The last keys in reach."""
    return [[row[-sizes.window :] for row in batch] for batch in rows]
