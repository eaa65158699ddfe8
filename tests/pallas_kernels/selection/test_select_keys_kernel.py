"""Tests scores and top-k joined on Hopper: how queries are cut into blocks, and on the card the selections."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FP8, index_inputs, integers, random_range
from hypothesis import strategies as st

from dsa_jax import KeyRange, index_scores, select_keys, select_topk
from dsa_jax.pallas_kernels.selection import select_keys as select_keys_kernel
from dsa_jax.pallas_kernels.selection.select_keys import Config

SMALL = Config(buffer_bytes=1 << 20)
# The products of Hopper's tensor cores keep about 13 bits: max |Δ| / Σ_j |w_j| relu_j was measured as 3.2e-4.
FP8_ERROR = 5e-4


@hypothesis.given(
    buffer=st.integers(1, 1 << 30), batch=st.integers(1, 300), length=st.integers(1, 5000), size=st.integers(1, 200000)
)
def test_blocks_of_queries_fit_the_buffer(buffer, batch, length, size):
    rows, queries = Config(buffer).queries(batch, length, size)
    assert 1 <= rows <= batch and 1 <= queries <= length
    assert rows in (1, batch)
    assert rows * queries == 1 or 4 * rows * queries * size <= buffer
    if rows * queries < batch * length:  # and no larger block of its kind would
        grown = max(1, batch if rows == batch and queries == length else rows) * (queries + 1)
        assert queries == length or 4 * grown * size > buffer


def test_the_buffer_is_half_a_gibibyte_at_128k():
    assert Config().queries(1, 131072, 131072) == (1, 1024)
    assert Config().queries(4096, 1, 131072) == (1, 1)
    assert Config().queries(64, 1, 131072) == (64, 1)


def test_a_bad_config_is_refused():
    with pytest.raises(ValueError, match="buffer_bytes must be positive, got 0"):
        Config(0)


def shapes(b, t, s, j, e, dtype):
    q, k = (jax.ShapeDtypeStruct(x, dtype) for x in ((b, t, j, e), (b, s, e)))
    return q, k, jax.ShapeDtypeStruct((b, t, j), jnp.float32)


@pytest.mark.parametrize("b, t", [(1, 700), (2, 3000), (70, 1)])
@pytest.mark.parametrize("dtype", [FP8, "bfloat16"])
def test_it_lowers_for_cuda(b, t, dtype):
    def select(q, k, w):
        keys = KeyRange.causal(b, t, offset=40000 - t)
        return select_keys(q, k, w, keys, k=2048, implementation="pallas")

    arrays = shapes(b, t, 40000, 64, 128, dtype)
    lowered = jax.jit(select).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") >= 2  # scores, top-k
    assert lowered.out_info.shape == (b, t, 2048)


@pytest.mark.parametrize(
    ("arrays", "k", "match"),
    [
        (shapes(1, 4, 9, 64, 128, "float32"), 3, "float8_e4m3fn or both bfloat16, got float32"),
        (shapes(1, 4, 9, 48, 128, "bfloat16"), 3, "J must be one of"),
        (shapes(1, 4, 9, 64, 96, "bfloat16"), 3, "E must be one of"),
        (shapes(1, 4, 9, 64, 128, "bfloat16"), 50000, "50000"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(arrays, k, match):
    arrays = [jnp.zeros(x.shape, x.dtype) for x in arrays]
    with pytest.raises(ValueError, match=match):
        select_keys(*arrays, KeyRange.causal(1, 4), k=k, implementation="pallas")
    keys = KeyRange.causal(1, 4)
    with pytest.raises(ValueError, match=match):
        select_keys_kernel(*arrays, keys.start, keys.stop, k=k)


def whole_numbers(seed, b, t, s, j, e, dtype):
    """Inputs whose sums are exact in any order, scales included."""
    q, k, w = integers(seed, b, t, j, e), integers(seed + 1, b, s, e), integers(seed + 2, b, t, j)
    scale = 2.0 ** integers(seed + 3, b, s)
    return q.astype(dtype), k.astype(dtype), w, scale


def selected(arrays, keys, k, implementation="pallas", config=None):
    *arrays, scale = arrays
    if config is not None:
        call = functools.partial(select_keys_kernel, k=k, config=config)
        return np.asarray(jax.jit(call)(*arrays, keys.start, keys.stop, scale))
    call = functools.partial(select_keys, k=k, implementation=implementation)
    return np.asarray(jax.jit(call)(*arrays, keys, k_scale=scale))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "b, t, s, j, e, k", [(1, 300, 5000, 64, 128, 256), (3, 70, 1031, 32, 64, 2048), (2, 9, 77, 16, 128, 8)]
)
@pytest.mark.parametrize("dtype", [FP8, "bfloat16"])
def test_exact_sums_select_the_same_bits_as_xla(b, t, s, j, e, k, dtype):
    arrays, keys = whole_numbers(t, b, t, s, j, e, dtype), random_range(t, b, t, s)
    want = selected(arrays, keys, k, "xla")
    for config in (None, SMALL, Config(1)):
        np.testing.assert_array_equal(selected(arrays, keys, k, config=config), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP8, "bfloat16"])
def test_it_is_the_topk_of_the_scores_bit_for_bit(dtype):
    q, k, w, scale = index_inputs(0, 2, 500, 9000, 64, 128, dtype)
    keys = random_range(1, 2, 500, 9000)
    scores = index_scores(q, k, w, keys, k_scale=scale, implementation="pallas")
    want = np.asarray(select_topk(scores, 512, keys=keys, implementation="pallas"))
    for _ in range(20):
        np.testing.assert_array_equal(selected((q, k, w, scale), keys, 512), want)
    np.testing.assert_array_equal(selected((q, k, w, scale), keys, 512, config=SMALL), want)
    row = KeyRange(keys.start[1:, 77:78], keys.stop[1:, 77:78])
    alone = (q[1:, 77:78], k[1:], w[1:, 77:78], None if scale is None else scale[1:])
    np.testing.assert_array_equal(selected(alone, row, 512)[0, 0], want[1, 77])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP8, "bfloat16"])
def test_sets_differ_from_xla_only_beside_the_last_score(dtype):
    t, s, k = 256, 16384, 2048
    q, keys_, w, scale = index_inputs(5, 1, t, s, 64, 128, dtype)
    keys = KeyRange.causal(1, t, offset=s - t)
    ours, theirs = (selected((q, keys_, w, scale), keys, k, i)[0] for i in ("pallas", "xla"))
    scores, sizes = (
        np.asarray(index_scores(q, keys_, x, keys, k_scale=scale, implementation="xla")[0], np.float64)
        for x in (w, jnp.abs(w))
    )
    bound = 2 * (FP8_ERROR if dtype == FP8 else 1e-6)
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        last = scores[row, other].min()
        strays = np.setxor1d(mine, other)
        assert np.all(np.abs(scores[row, strays] - last) <= bound * sizes[row].max())


@pytest.mark.gpu
def test_the_published_shape_stays_within_the_buffer():
    t = s = 131072
    arrays = (*shapes(1, t, s, 64, 128, FP8), jax.ShapeDtypeStruct((1, s), jnp.float32))
    keys = KeyRange.causal(1, t)

    @jax.jit
    def select(q, k, w, scale):
        return select_keys(q, k, w, keys, k=2048, k_scale=scale, implementation="pallas")

    memory = select.lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 600 * 2**20
