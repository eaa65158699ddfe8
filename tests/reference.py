"""The operations in float64 NumPy, written from the paper's equations; every implementation is held against these.

Dense, slow and plain: one query at a time over the list of keys it attends to. `rows[b][t]` is that list: a selection
(`listed`) or a key range (`reachable`). Gradients are analytic; the tests hold them against central differences.
"""

import ml_dtypes
import numpy as np


def f64(x):
    """Any array as float64, exactly."""
    return np.asarray(x).astype(np.float64, copy=False)


def reachable(start, stop, size):
    """The keys start ≤ s < stop of every query that exist."""
    start, stop = np.asarray(start), np.asarray(stop)
    return [
        [np.arange(max(int(a), 0), max(int(a), 0, min(int(z), size))) for a, z in zip(starts, stops, strict=True)]
        for starts, stops in zip(start, stop, strict=True)
    ]


def listed(indices, size):
    """The present keys of every row of a selection, in its order; a key listed twice stands there twice."""
    return [[row[(row >= 0) & (row < size)] for row in batch] for batch in np.asarray(indices).astype(np.int64)]


def slots(indices, size):
    """Where the keys of `listed` stand in their rows."""
    return [
        [np.nonzero((row >= 0) & (row < size))[0] for row in batch] for batch in np.asarray(indices).astype(np.int64)
    ]


def intersect(rows, others):
    """Each list of `rows` without the keys that `others` lacks."""
    return [[a[np.isin(a, b)] for a, b in zip(x, y, strict=True)] for x, y in zip(rows, others, strict=True)]


def _queries(rows):
    return [(b, t, row) for b, batch in enumerate(rows) for t, row in enumerate(batch) if len(row)]


def _log_sum_exp(x):
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


# Eq. 1


def row_scores(q_index, k_index, weights, b, t, row, k_scale=None):
    """I[t, s] = k_scale[s] · Σ_j w[t, j] · relu(q[t, j] · k[s]) for the keys of one row, and its logits [J, row]."""
    logits = f64(q_index)[b, t] @ f64(k_index)[b, row].T
    scale = np.ones(len(row)) if k_scale is None else f64(k_scale)[b, row]
    return f64(weights)[b, t] @ np.maximum(logits, 0.0) * scale, logits, scale


def index_scores(q_index, k_index, weights, rows, k_scale=None):
    """[B, T, S] with −inf where a query does not reach."""
    out = np.full((*np.shape(q_index)[:2], np.shape(k_index)[1]), -np.inf)
    for b, t, row in _queries(rows):
        out[b, t, row] = row_scores(q_index, k_index, weights, b, t, row, k_scale)[0]
    return out


def _score_gradients(q_index, k_index, weights, rows, d_scores, k_scale=None):
    """Gradients by q_index, k_index and weights of Σ d_scores · I, given a function (b, t, row) → d_scores."""
    q_index, k_index, weights = f64(q_index), f64(k_index), f64(weights)
    dq, dk, dw = np.zeros_like(q_index), np.zeros_like(k_index), np.zeros_like(weights)
    for b, t, row in _queries(rows):
        _, logits, scale = row_scores(q_index, k_index, weights, b, t, row, k_scale)
        d = d_scores(b, t, row) * scale
        d_logits = weights[b, t][:, None] * (logits > 0) * d
        dw[b, t] += np.maximum(logits, 0.0) @ d
        dq[b, t] += d_logits @ k_index[b, row]
        np.add.at(dk[b], row, d_logits.T @ q_index[b, t])
    return dq, dk, dw


def index_scores_vjp(q_index, k_index, weights, rows, cotangent, k_scale=None):
    """Gradients of Σ cotangent · I over reachable pairs."""
    cotangent = f64(cotangent)
    return _score_gradients(q_index, k_index, weights, rows, lambda b, t, row: cotangent[b, t, row], k_scale)


# Eq. 2: the selection


def select_topk(scores, k, rows):
    """The k highest scores of each row: ties to the lowest position, −inf and NaN never; ascending, then −1."""
    scores = np.asarray(scores)
    out = np.full((*scores.shape[:2], k), -1, np.int32)
    for b, t, row in _queries(rows):
        eligible = [int(s) for s in row if scores[b, t, s] > -np.inf]
        best = sorted(sorted(eligible, key=lambda s: (-float(scores[b, t, s]), s))[:k])
        out[b, t, : len(best)] = best
    return out


def select_blocks(scores, k, rows, block_size):
    """All keys of a row in the k / block_size aligned blocks with the highest score of a key of the row."""
    scores = np.asarray(scores)
    out = np.full((*scores.shape[:2], k), -1, np.int32)
    for b, t, row in _queries(rows):
        best = {}
        for s in row:
            if scores[b, t, s] > -np.inf:  # false of NaN
                best[s // block_size] = max(scores[b, t, s], best.get(s // block_size, -np.inf))
        blocks = sorted(best, key=lambda block: (-best[block], block))[: k // block_size]
        keys = [s for s in row if s // block_size in blocks]
        out[b, t, : len(keys)] = keys
    return out


# Eq. 2: the attention


def latent(kv, heads, value_dim):
    """The multi-query form as per-head keys and values."""
    kv = np.repeat(f64(kv)[:, :, None], heads, 2)
    return kv, kv[..., :value_dim]


def attention(q, k, v, rows, scale):
    """softmax(scale · q·k) · v over each row's keys, and the log-sum-exp of its logits; of no keys 0 and −inf."""
    q, k, v = f64(q), f64(k), f64(v)
    out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
    for b, t, row in _queries(rows):
        logits = scale * np.einsum("nd,snd->ns", q[b, t], k[b, row])
        lse[b, t] = _log_sum_exp(logits)
        out[b, t] = np.einsum("ns,snv->nv", np.exp(logits - lse[b, t][:, None]), v[b, row])
    return out, lse


def attention_vjp(q, k, v, rows, scale, d_out, d_lse):
    """Gradients by q, k, v of Σ d_out · out + Σ d_lse · lse."""
    q, k, v, d_out, d_lse = f64(q), f64(k), f64(v), f64(d_out), f64(d_lse)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, t, row in _queries(rows):
        logits = scale * np.einsum("nd,snd->ns", q[b, t], k[b, row])
        p = np.exp(logits - _log_sum_exp(logits)[:, None])
        dp = np.einsum("nv,snv->ns", d_out[b, t], v[b, row])
        d_logits = scale * p * (dp - (p * dp).sum(-1, keepdims=True) + d_lse[b, t][:, None])
        dq[b, t] = np.einsum("ns,snd->nd", d_logits, k[b, row])
        np.add.at(dk[b], row, np.einsum("ns,nd->snd", d_logits, q[b, t]))
        np.add.at(dv[b], row, np.einsum("ns,nv->snv", p, d_out[b, t]))
    return dq, dk, dv


def latent_attention(q, kv, rows, value_dim, scale):
    return attention(q, *latent(kv, np.shape(q)[2], value_dim), rows, scale)


def latent_attention_vjp(q, kv, rows, value_dim, scale, d_out, d_lse):
    """Gradients by q and kv: the keys' over all columns, the values' over the first `value_dim`."""
    dq, dk, dv = attention_vjp(q, *latent(kv, np.shape(q)[2], value_dim), rows, scale, d_out, d_lse)
    dkv = dk.sum(2)
    dkv[..., :value_dim] += dv.sum(2)
    return dq, dkv


# Eqs. 3–4


def row_target(q, k, lse, b, t, row, scale, target="sum"):
    """Σ_n or max_n exp(scale · q·k − lse) over the row's keys, L1-normalised; q and k in multi-head form."""
    logits = scale * np.einsum("nd,snd->ns", f64(q)[b, t], f64(k)[b, row])
    p = {"sum": np.sum, "max": np.max}[target](np.exp(logits - f64(lse)[b, t][:, None]), axis=0)
    return p / p.sum()


def attention_target(q, kv, lse, indices, scale, target="sum"):
    """[B, T, K] for the multi-query form; 0 in absent slots."""
    size = np.shape(kv)[1]
    k = np.repeat(f64(kv)[:, :, None], np.shape(q)[2], 2)
    out = np.zeros(np.shape(indices))
    where = slots(indices, size)
    for b, t, row in _queries(listed(indices, size)):
        out[b, t, where[b][t]] = row_target(q, k, lse, b, t, row, scale, target)
    return out


def indexer_kl(q_index, k_index, weights, q, k, lse, rows, scale, k_scale=None, target="sum"):
    """KL(p[t] ‖ softmax(I[t])) over each row's keys; 0 for an empty row."""
    out = np.zeros(np.shape(q)[:2])
    for b, t, row in _queries(rows):
        p = row_target(q, k, lse, b, t, row, scale, target)
        scores = row_scores(q_index, k_index, weights, b, t, row, k_scale)[0]
        log_softmax = scores - _log_sum_exp(scores)
        some = p > 0
        out[b, t] = (p[some] * (np.log(p[some]) - log_softmax[some])).sum()
    return out


def indexer_kl_vjp(q_index, k_index, weights, q, k, lse, rows, scale, cotangent, k_scale=None, target="sum"):
    """Gradients by q_index, k_index, weights of Σ cotangent · KL: by the scores it is softmax(I) − p."""
    cotangent = f64(cotangent)

    def d_scores(b, t, row):
        scores = row_scores(q_index, k_index, weights, b, t, row, k_scale)[0]
        p = row_target(q, k, lse, b, t, row, scale, target)
        return cotangent[b, t] * (np.exp(scores - _log_sum_exp(scores)) - p)

    return _score_gradients(q_index, k_index, weights, rows, d_scores, k_scale)


def shared_indexer_kl_vjp(q_index, k_index, weights, layers, rows, scale, cotangent):
    """Gradients of Σ cotangent · KL(mean over layers of p[t] ‖ softmax(I[t])); `layers` has each one's q, k and lse."""
    cotangent = f64(cotangent)

    def d_scores(b, t, row):
        scores = row_scores(q_index, k_index, weights, b, t, row)[0]
        p = np.mean([row_target(q, k, lse, b, t, row, scale) for q, k, lse in layers], axis=0)
        return cotangent[b, t] * (np.exp(scores - _log_sum_exp(scores)) - p)

    return _score_gradients(q_index, k_index, weights, rows, d_scores)


# FP8


def quantize(x):
    """e4m3 and the power-of-two scale 2^ceil(log2(max(amax, 1e-4) / 448)) of each last axis."""
    ratio = np.maximum(np.abs(f64(x)).max(-1), 1e-4) / 448.0
    mantissa, exponent = np.frexp(ratio)
    scale = np.ldexp(1.0, exponent - (mantissa == 0.5))
    return (f64(x) / scale[..., None]).astype(np.float32).astype(ml_dtypes.float8_e4m3fn), scale.astype(np.float32)


def central_difference(function, x, step=1e-5):
    """The gradient of a scalar function by every element of a float64 array."""
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        gradient[at] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient
