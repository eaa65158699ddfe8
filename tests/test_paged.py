"""The pages: their bytes against NumPy, and the operations over them against those over contiguous keys, bit by bit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from cases import INT_MAX, INT_MIN, array, as_numpy, causal_range, normal, same_bits, unchecked
from model_cases import small_config

from dsa_jax import Config, KeyRange, index_scores, paged, quantize, select_keys, sparse_attention
from dsa_jax.cache import Pages
from dsa_jax.cache_shapes import page_shapes, token_bytes

pytestmark = pytest.mark.usefixtures("in_a_hurry")

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
LATENTS = [(512, 64), (16, 8), (200, 6)]  # C and R; the last two have one scale
INDEX_KEYS = [128, 256, 16]


def bits(x) -> Any:
    """The bytes of an array, of its last axis side by side."""
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def noise(seed, *shape, dtype: Any = "uint8") -> Any:
    """Numbers of random bits, NaN of every sort among them."""
    dtype = np.dtype(dtype)
    bytes_ = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)
    return bytes_.view(dtype)


def entries(seed, tokens, width) -> Any:
    """Rows of many magnitudes, one of zeros and one with a number beyond e4m3's."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(tokens, width)) * np.exp(4 * random.normal(size=(tokens, 1)))
    x[1], x[2, 0] = 0, 3e4
    return x.astype(np.float32)


def latent_rows(kv, value_dim) -> np.ndarray:
    """The bytes of FP8 latents: e4m3 numbers, the scales of 128 columns each (or of all), rotary bfloat16."""
    groups = value_dim // 128 if value_dim % 128 == 0 else 1
    values, scale = reference.quantize(kv[:, :value_dim].reshape(len(kv), groups, -1))
    rotary = kv[:, value_dim:].astype(BF16)
    parts = values.reshape(len(kv), -1).view(np.uint8), scale.astype("<f4").view(np.uint8), rotary.view(np.uint8)
    return np.concatenate(parts, axis=1)


# Formats


def test_sizes_of_the_published_models():
    assert paged.latent_bytes(512, 64) == 656
    assert paged.index_page_rows(128, fp8=True) == 66 and paged.index_page_rows(128, fp8=False) == 64
    fp8, bf16 = Config.deepseek_v32(index_fp8=True), Config.deepseek_v32()
    assert [x.shape[1:] for x in page_shapes(fp8, 3, "fp8")] == [(3, 64, 656), (3, 66, 128)]
    assert [x.dtype for x in page_shapes(fp8, 3, "fp8")] == [np.uint8, E4M3]
    assert [x.shape[1:] for x in page_shapes(bf16, 3, "bfloat16")] == [(3, 64, 576), (3, 64, 128)]
    assert {x.shape[0] for x in page_shapes(fp8, 3, "fp8")} == {61}
    assert token_bytes(fp8, "fp8") == 656 + 128 + 4 == 788
    assert token_bytes(bf16, "bfloat16") == 2 * (576 + 128) == 1408
    assert token_bytes(bf16, "float32") == 2 * 1408
    assert token_bytes(fp8, "bfloat16") == 2 * 576 + 132


@pytest.mark.parametrize(
    ("changes", "format", "words"),
    [
        (dict(), "int8", ["format", "'float32', 'bfloat16' or 'fp8'", "'int8'"]),
        (dict(), "fp8", ["'fp8'", "index_fp8=True", "index_fp8=False"]),
        (dict(index_fp8=True, index_head_dim=512), "fp8", ["index_head_dim", "256", "512"]),
    ],
    ids=str,
)
def test_pools_that_cannot_be_are_refused(changes, format, words):
    with pytest.raises(ValueError) as error:
        page_shapes(small_config(**changes), 1, format)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(("value_dim", "rotary_dim"), LATENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_packed_as_numpy_packs_them(value_dim, rotary_dim, dtype):
    kv = entries(0, 5, value_dim + rotary_dim).astype(dtype)
    kv[3, -1] = np.nan
    rows = jax.jit(paged.pack_latents, static_argnums=1)(array(kv), value_dim)
    same_bits(rows, latent_rows(kv, value_dim))
    assert rows.shape[1] == paged.latent_bytes(value_dim, rotary_dim)
    groups = 4 if value_dim == 512 else 1
    values, scale = as_numpy(jax.jit(quantize)(kv[:, :value_dim].reshape(5, groups, -1)))
    rows = np.asarray(rows)
    same_bits(rows[:, :value_dim], bits(values).reshape(5, -1))
    stored = bits(rows)[:, value_dim : value_dim + 4 * groups].copy().view("<f4")
    same_bits(stored, scale)
    assert np.all(np.frexp(stored)[0] == 0.5), "a scale that is written is a power of two"


@pytest.mark.parametrize(("value_dim", "rotary_dim"), LATENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_scale_of_latents_is_read(value_dim, rotary_dim, dtype):
    """Scales that are no powers of two; every e4m3 number, NaN too."""
    groups = (paged.latent_bytes(value_dim, rotary_dim) - value_dim - 2 * rotary_dim) // 4
    values = noise(0, 40, value_dim, dtype=E4M3)
    scale = np.random.default_rng(1).uniform(0.01, 3, (40, groups)).astype("<f4")
    rotary = noise(2, 40, rotary_dim, dtype=BF16)
    rows = np.concatenate([values.view(np.uint8), scale.view(np.uint8), rotary.view(np.uint8)], axis=1)
    unpack = jax.jit(functools.partial(paged.unpack_latents, value_dim=value_dim, dtype=dtype))
    latents = np.asarray(unpack(array(rows)))
    with np.errstate(invalid="ignore"):  # of NaN that signals
        wide = values.astype(np.float32) * np.repeat(scale, value_dim // groups, axis=1)
        expected = reference.f64(np.concatenate([wide.astype(dtype), rotary.astype(dtype)], axis=1))
        np.testing.assert_array_equal(reference.f64(latents), expected)
    assert latents.dtype == dtype and 0 < np.isnan(expected).mean() < 0.1


@pytest.mark.parametrize("dim", INDEX_KEYS)
def test_index_keys_are_read_byte_by_byte(dim):
    """A page is 64 keys, then 64 little-endian scales, which may be any bits."""
    table: Any = np.array([[2, 0], [1, 2]], np.int32)
    pages = noise(0, 3, 64 * dim + 256)
    pool = pages.view(E4M3).reshape(3, -1, dim)
    assert pool.shape[1] == paged.index_page_rows(dim, fp8=True) == 64 + 256 // dim
    keys, scales = jax.jit(paged.read_index_keys)(array(pool), table)
    assert keys.dtype == E4M3 and scales.dtype == np.float32
    for row, entry in enumerate(table):
        same_bits(bits(keys)[row], np.concatenate([pages[page, : 64 * dim].reshape(64, dim) for page in entry]))
        same_bits(bits(scales)[row], np.concatenate([pages[page, 64 * dim :] for page in entry]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_read_as_they_stand(dtype):
    table: Any = np.array([[3, 1]], np.int32)
    latents, index_keys = normal(0, 4, 64, 24, dtype=dtype), normal(1, 4, 64, 16, dtype=dtype)
    rows = lambda pool: np.asarray(pool)[table].reshape(1, 128, -1)
    read = jax.jit(functools.partial(paged.read_latents, value_dim=16), static_argnames="dtype")
    same_bits(read(latents, table, dtype=dtype), rows(latents))
    same_bits(read(latents, table, dtype="float32"), rows(latents).astype(np.float32))
    keys, scales = jax.jit(paged.read_index_keys)(index_keys, table)
    same_bits(keys, rows(index_keys))
    same_bits(scales, np.ones((1, 128), np.float32))


# Writing

SLOTS: Any = np.array([70, -1, 3, 191, 192, 0, -64, INT_MIN, 64, INT_MAX, 127, 256, -192], np.int32)


def written(pool, slots, rows):
    """The bytes of a pool [n, 64, W] with rows at those slots that it has."""
    flat = bits(pool).reshape(-1, bits(pool).shape[-1]).copy()
    for slot, row in zip(slots, bits(rows), strict=True):
        if 0 <= slot < len(flat):
            flat[slot] = row
    return flat.reshape(bits(pool).shape)


@pytest.mark.parametrize(("value_dim", "rotary_dim"), [(512, 64), (16, 8)])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "fp8"])
def test_latents_are_written_to_their_slots_and_nothing_else_is(value_dim, rotary_dim, format):
    """Slots that are none drop their token, and NaN of any bits in the other tokens stays as it is."""
    kv = entries(3, len(SLOTS), value_dim + rotary_dim)
    if format == "fp8":
        pool, rows = noise(4, 3, 64, paged.latent_bytes(value_dim, rotary_dim)), latent_rows(kv, value_dim)
    else:
        pool, rows = noise(4, 3, 64, kv.shape[1], dtype=format), kv.astype(format)
    write = jax.jit(functools.partial(paged.write_latents, value_dim=value_dim))
    found = write(array(pool), SLOTS, array(kv))
    assert found.dtype == pool.dtype
    same_bits(bits(found), written(pool, SLOTS, rows))


@pytest.mark.parametrize(("dim", "format"), [(16, "float32"), (16, "bfloat16"), *((dim, "fp8") for dim in INDEX_KEYS)])
def test_index_keys_are_written_to_their_slots_and_nothing_else_is(dim, format):
    k_index = entries(5, len(SLOTS), dim)
    write = jax.jit(paged.write_index_keys)
    if format != "fp8":
        pool = noise(6, 3, 64, dim, dtype=format)
        found = write(array(pool), SLOTS, array(k_index))
        same_bits(bits(found), written(pool, SLOTS, k_index.astype(format)))
        return
    pages = noise(6, 3, 64 * dim + 256)
    found = write(array(pages.view(E4M3).reshape(3, -1, dim)), SLOTS, array(k_index))
    values, scale = as_numpy(jax.jit(quantize)(k_index))
    assert np.all(np.frexp(scale)[0] == 0.5)
    for slot, row, own in zip(SLOTS, bits(values), bits(np.asarray(scale)[:, None]), strict=True):
        if 0 <= slot < 192:
            page, place = divmod(slot, 64)
            pages[page, place * dim : (place + 1) * dim] = row
            pages[page, 64 * dim + 4 * place : 64 * dim + 4 * place + 4] = own
    same_bits(bits(found).reshape(3, -1), pages)


@pytest.mark.parametrize("format", ["float32", "fp8"])
def test_both_pools_are_written_together(format):
    config = small_config(index_fp8=format == "fp8")
    shapes = [(x.shape[1:], x.dtype) for x in page_shapes(config, 3, format)]
    latents, index_keys = (array(noise(7, *shape, dtype=dtype)) for shape, dtype in shapes)
    kv, k_index = array(entries(8, 13, 24)), array(entries(9, 13, 16))
    write, options = jax.jit(paged.write_entries, static_argnames="value_dim"), dict(value_dim=16)
    found = write(latents, index_keys, array(SLOTS), kv, k_index, **options)
    write = jax.jit(paged.write_latents, static_argnames="value_dim")
    same_bits(bits(found[0]), bits(write(latents, SLOTS, kv, **options)))
    same_bits(bits(found[1]), bits(jax.jit(paged.write_index_keys)(index_keys, SLOTS, k_index)))


def test_what_is_written_is_read_back():
    """Through a table, by the functions that read: the two halves of the format fit together."""
    kv, k_index = array(entries(10, 64, 24)), array(entries(11, 64, 16))
    slots, table = array(np.arange(128, 192)), array([[2]])

    @jax.jit
    def through(latents, index_keys):
        latents = paged.write_latents(latents, slots, kv, value_dim=16)
        index_keys = paged.write_index_keys(index_keys, slots, k_index)
        read = paged.read_latents(latents, table, value_dim=16, dtype="float32")
        return read, *paged.read_index_keys(index_keys, table)

    pools = np.full((3, 64, paged.latent_bytes(16, 8)), 255, np.uint8), np.full((3, 80, 16), np.nan).astype(E4M3)
    (found,), (keys,), (scales,) = as_numpy(through(*pools))
    rotary = np.asarray(kv)[:, 16:].astype(BF16)
    values, scale = as_numpy(jax.jit(quantize)(np.asarray(kv)[:, :16]))
    same_bits(found[:, :16], values.astype(np.float32) * scale[:, None])
    same_bits(found[:, 16:], rotary.astype(np.float32))
    values, scale = jax.jit(quantize)(k_index)
    same_bits(keys, values)
    same_bits(scales, scale)


def test_slots_of_positions():
    table: Any = np.array([[5, 0, 2], [1, 4, 3]], np.int32)
    positions = np.random.default_rng(0).integers(0, 192, (2, 3, 7)).astype(np.int32)
    expected = np.take_along_axis(table, positions.reshape(2, -1) // 64, 1).reshape(2, 3, 7) * 64 + positions % 64
    to_slots = jax.jit(paged.to_slots)
    same_bits(to_slots(positions, table), expected.astype(np.int32))
    none = np.array([[-1, 192, -64, INT_MIN], [INT_MAX, -192, 193, -2]], np.int32)
    assert np.all(np.asarray(to_slots(none, table)) == -1)


def test_tokens_are_written_where_they_stand():
    """At the last position that each reaches; one that reaches nothing, wherever its range is, is not written."""
    keys = KeyRange(array([[0, 64, 5, 0, 0]]), array([[3, 131, 5, 0, 193]]))
    pools = array(np.zeros((1, 8, 64, 24))), array(np.zeros((1, 8, 64, 16)))
    pages = jax.jit(functools.partial(Pages.at, value_dim=16))(*pools, array([[5, 0, 2]]), keys)
    assert pages.slots.tolist() == [[5 * 64 + 2, 2 * 64 + 2, -1, -1, -1]] and pages.size == 192


# The operations

B, P, S, C, R, E = 2, 3, 192, 16, 8, 16
LENGTHS = np.array([150, 67])  # the second row's third page is none of its own
TABLE: Any = np.array([[6, 1, 4], [0, 5, 7]], np.int32)  # pages 2, 3 and 7 hold nothing
SHAPES = [(1, "fp8"), (2, "bfloat16"), (3, "float32"), (4, "fp8")]
LONG = [(12, "bfloat16"), (12, "fp8")]  # T · K reaches S: whole sequences are gathered


def spread(rows, fill) -> jax.Array:
    """A pool of eight pages filled with `fill`, with the rows [B, S, …] that exist at their places by `TABLE`."""
    pool = np.full((8, 64, rows.shape[-1]), fill, rows.dtype)
    for row, entry, length in zip(rows, TABLE, LENGTHS, strict=True):
        for position in range(length):
            pool[entry[position // 64], position % 64] = row[position]
    return array(pool)


def latents_of(format):
    """Queries' dtype, the latents by position with NaN past the end, and the pool that has them."""
    past = np.arange(S) >= LENGTHS[:, None]
    if format != "fp8":
        kv = np.array(normal(20, B, S, C + R, dtype=format))
        kv[past] = np.nan
        return format, array(kv), spread(kv, np.nan)
    bytes_ = latent_rows(np.asarray(normal(20, B * S, C + R)), C).reshape(B, S, -1)
    bytes_[..., C : C + 4].view("<f4")[...] *= 0.7
    kv = np.array(jax.jit(paged.unpack_latents, static_argnums=(1, 2))(bytes_, C, "bfloat16"))
    kv[past] = np.nan
    return "bfloat16", array(kv), spread(bytes_, 255)


def selections(length, k=16):
    """Unsorted positions of those that exist, twice and absent ones among them, and a query without any."""
    random = np.random.default_rng(length)
    indices = random.integers(0, LENGTHS[:, None, None], (B, length, k))
    absent = random.choice(np.array([-1, S, -S, INT_MIN, INT_MAX]), indices.shape)
    indices = np.where(random.random(indices.shape) < 0.3, absent, indices)
    indices[1, 0] = -1
    return array(indices, jnp.int32)


@pytest.mark.parametrize(("length", "format"), SHAPES + LONG)
def test_attention_equals_that_to_contiguous_latents(length, format):
    dtype, kv, pool = latents_of(format)
    q, indices = normal(21, B, length, 3, C + R, dtype=dtype), selections(length)
    options: dict[str, Any] = dict(value_dim=C, scale=0.2)
    out, lse = jax.jit(functools.partial(paged.paged_sparse_attention, **options))(q, pool, TABLE, indices)
    expected = jax.jit(functools.partial(sparse_attention, **options))(q, kv, indices)
    same_bits(out, expected[0])
    same_bits(lse, expected[1])
    out, lse = as_numpy((out, lse))
    assert np.isfinite(out.astype(np.float32)).all() and out.dtype == dtype
    assert not np.any(out[1, 0]) and np.all(lse[1, 0] == -np.inf)


def test_attention_gathers_what_is_less(monkeypatch):
    """What is selected, or whole sequences: up to 192 positions, of which 12 queries of 16 keys select as many."""
    whole = []
    monkeypatch.setattr(paged, "read_latents", lambda *x, **options: whole.append(x) or read(*x, **options))
    attend = functools.partial(paged.paged_sparse_attention, value_dim=C, scale=0.2)
    for length, times in ((11, 0), (12, 1)):
        q = array(np.ones((B, length, 3, C + R)))
        jax.eval_shape(attend, q, array(np.ones((8, 64, C + R))), TABLE, selections(length))
        assert len(whole) == times


read = paged.read_latents


def index_keys_of(format):
    """The index keys by position with NaN past the end, their scales, and the pool that has them."""
    past = np.arange(S) >= LENGTHS[:, None]
    keys = np.asarray(normal(30, B, S, E))
    if format != "fp8":
        keys = keys.astype(format)
        keys[past] = np.nan
        return array(keys), None, spread(keys, np.nan)
    keys, scale = reference.quantize(keys)
    scale = (scale * np.random.default_rng(31).uniform(0.5, 2, scale.shape)).astype(np.float32)  # no powers of two
    keys[past], scale[past] = np.nan, np.nan
    pool = np.full((8, 64 * (E + 4)), 255, np.uint8)
    values, scales = pool[:, : 64 * E].reshape(8, 64, E), pool[:, 64 * E :].reshape(8, 64, 4)
    for row, entry in enumerate(TABLE):
        for position in range(LENGTHS[row]):
            at = entry[position // 64], position % 64
            values[at], scales[at] = keys[row, position].view(np.uint8), scale[row, position, None].view(np.uint8)
    return array(keys), array(scale), array(pool.view(E4M3).reshape(8, -1, E))


def index_queries(length, format):
    """Queries, their weights, and ranges of every kind within what exists."""
    q = normal(32, B, length, 4, E, dtype=E4M3 if format == "fp8" else format)
    edge = np.random.default_rng(length).integers(0, LENGTHS[:, None, None] + 1, (B, length, 2)).astype(np.int32)
    edge[0, 0] = 0, LENGTHS[0]
    return q, normal(33, B, length, 4), KeyRange(array(edge[..., 0]), array(edge[..., 1]))


@pytest.mark.parametrize(("length", "format"), SHAPES + LONG)
def test_index_scores_equal_those_of_contiguous_keys(length, format):
    k_index, k_scale, pool = index_keys_of(format)
    q, weights, keys = index_queries(length, format)
    scores = np.asarray(jax.jit(paged.paged_index_scores)(q, pool, weights, TABLE, keys))
    same_bits(scores, jax.jit(index_scores)(q, k_index, weights, keys, k_scale=k_scale))
    assert not np.isnan(scores).any() and np.isfinite(scores[0, 0, : LENGTHS[0]]).all()


@pytest.mark.parametrize(("length", "format", "k"), [(*shape, 8) for shape in SHAPES + LONG] + [(1, "fp8", S + 8)])
def test_selections_equal_those_of_contiguous_keys(length, format, k):
    k_index, k_scale, pool = index_keys_of(format)
    q, weights, keys = index_queries(length, format)
    select = jax.jit(functools.partial(paged.paged_select_keys, k=k))
    selected = np.asarray(select(q, pool, weights, TABLE, keys))
    same_bits(selected, jax.jit(functools.partial(select_keys, k=k))(q, k_index, weights, keys, k_scale=k_scale))
    assert np.sum(selected[0, 0] >= 0) == min(k, LENGTHS[0])


def test_bfloat16_pages_serve_float32_queries():
    dtype, kv, pool = latents_of("bfloat16")
    q, indices = normal(21, B, 2, 3, C + R), selections(2)
    options: dict[str, Any] = dict(value_dim=C, scale=0.2)
    found, _ = jax.jit(functools.partial(paged.paged_sparse_attention, **options))(q, pool, TABLE, indices)
    attend = jax.jit(functools.partial(sparse_attention, **options))
    same_bits(found, attend(q, array(kv, "float32"), indices)[0])
    k_index, _, pool = index_keys_of("bfloat16")
    q, weights, keys = index_queries(2, "float32")
    found = jax.jit(paged.paged_index_scores)(q, pool, weights, TABLE, keys)
    same_bits(found, jax.jit(index_scores)(q, array(k_index, "float32"), weights, keys))


def test_entries_of_a_table_that_hold_nothing_may_be_any():
    """Where no position of a page is reached or selected, its number is not read."""
    any_: Any = TABLE.copy()
    any_[1, 2] = INT_MAX
    dtype, _, pool = latents_of("float32")
    for length in (2, 12):
        q, indices = normal(21, B, length, 3, C + R), selections(length)
        attend = jax.jit(functools.partial(paged.paged_sparse_attention, value_dim=C, scale=0.2))
        for found, expected in zip(attend(q, pool, any_, indices), attend(q, pool, TABLE, indices), strict=True):
            same_bits(found, expected)
    _, _, pool = index_keys_of("float32")
    arguments = index_queries(2, "float32")
    run = jax.jit(paged.paged_index_scores)
    score = lambda table: run(arguments[0], pool, arguments[1], table, arguments[2])
    same_bits(score(any_), score(TABLE))


# Refusals


def zeros(shape, dtype: Any = np.float32) -> Any:
    """NumPy's zeros in the dtype that JAX has by default."""
    return np.zeros(shape, dtype)


def attention_arguments(**changes) -> dict[str, Any]:
    """Arguments that fit, with changes."""
    values: dict[str, Any] = dict(
        q=zeros((B, 2, 3, C + R)),
        latents=zeros((8, 64, C + R)),
        table=array(TABLE),
        indices=zeros((B, 2, 4), jnp.int32),
        value_dim=C,
        scale=0.2,
    )
    return values | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(q=zeros((B, 3, C + R))), ["q must be [B, T, N, C+R]", "(2, 3, 24)"]),
        (dict(value_dim=0), ["value_dim", "24", "0"]),
        (dict(value_dim=C + R + 1), ["value_dim", "24", "25"]),
        (dict(latents=zeros((8, 64, C))), ["[n, 64, 24]", "(8, 64, 16)"]),
        (dict(latents=zeros((8, 32, C + R))), ["[n, 64, 24]", "(8, 32, 24)"]),
        (dict(latents=zeros((8, 64, C + R), jnp.uint8)), ["[n, 64, 36]", "(8, 64, 24)"]),
        (dict(latents=zeros((8, 64, C + R), jnp.int32)), ["pages of latents", "uint8", "int32"]),
        (dict(latents=zeros((8, 64, C + R), E4M3)), ["pages of latents", "uint8", "float8_e4m3fn"]),
        (dict(table=array(TABLE[:1])), ["table", "int32 [2, P]", "(1, 3)"]),
        (dict(table=array(TABLE[0])), ["table", "int32 [2, P]", "(3,)"]),
        (dict(table=array(TABLE[:, :0])), ["table", "int32 [2, P]", "(2, 0)"]),
        (dict(table=TABLE.astype(np.int64)), ["table", "int32", "int64"]),
        (dict(table=TABLE.astype(np.float32)), ["table", "int32", "float32"]),
        (dict(indices=zeros((B, 3, 4), jnp.int32)), ["indices", "[2, 2, K]", "(2, 3, 4)"]),
        (dict(indices=zeros((B, 2, 4))), ["indices", "float32"]),
        (dict(q=zeros((B, 2, 3, C + R), jnp.int32)), ["q", "int32"]),
        (dict(implementation="pallas"), ["implementation='pallas'", "paged_sparse_attention has no kernel for this"]),
        (dict(implementation="cuda"), ["implementation", "'cuda'"]),
    ],
)
def test_attention_refuses_by_name(changes, words):
    arguments = attention_arguments(**changes)
    arrays = [arguments.pop(name) for name in ("q", "latents", "table", "indices")]
    with unchecked(), pytest.raises(ValueError) as error:
        paged.paged_sparse_attention(*arrays, **arguments)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(q_index=zeros((B, 4, E))), ["q_index must be [B, T, J, E]", "(2, 4, 16)"]),
        (dict(weights=zeros((B, 2, 3))), ["weights", "[2, 2, 4]", "(2, 2, 3)"]),
        (dict(index_keys=zeros((8, 64, 8))), ["[n, 64, 16]", "(8, 64, 8)"]),
        (dict(index_keys=zeros((8, 80, E), E4M3)), ["float32 [n, 64, 16]", "float8_e4m3fn"]),
        (dict(index_keys=zeros((8, 64, E), E4M3)), ["float32 [n, 64, 16]", "float8_e4m3fn"]),
        (dict(q_index=zeros((B, 2, 4, E), E4M3)), ["float8_e4m3fn [n, 80, 16]", "float32"]),
        (dict(keys=None), ["KeyRange", "NoneType"]),
        (dict(keys=causal_range(B, 3)), ["[2, 2]", "(2, 3)"]),
        (dict(table=array(TABLE[:1])), ["table", "int32 [2, P]", "(1, 3)"]),
        (dict(table=TABLE.astype(np.int64)), ["table", "int32", "int64"]),
        (dict(implementation="pallas"), ["implementation='pallas'", "has no kernel for this"]),
    ],
)
@pytest.mark.parametrize("operation", [paged.paged_index_scores, functools.partial(paged.paged_select_keys, k=4)])
def test_scores_and_selections_refuse_by_name(operation, changes, words):
    values: dict[str, Any] = dict(
        q_index=zeros((B, 2, 4, E)),
        index_keys=zeros((8, 64, E)),
        weights=zeros((B, 2, 4)),
        table=array(TABLE),
        keys=causal_range(B, 2),
    )
    with unchecked(), pytest.raises(ValueError) as error:
        operation(**values | changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_selections_refuse_k_by_name():
    arrays: Any = zeros((B, 2, 4, E)), zeros((8, 64, E)), zeros((B, 2, 4)), TABLE, causal_range(B, 2)
    wrong: list[Any] = [0, 2.0]
    for k in wrong:
        with unchecked(), pytest.raises(ValueError, match="^k must be"):
            paged.paged_select_keys(*arrays, k=k)


def test_kernels_are_refused_on_a_cpu():
    """Shapes that a kernel takes, and no GPU that could run it."""
    bf16 = functools.partial(jnp.zeros, dtype=jnp.bfloat16)
    latents, index_keys = zeros((4, 64, 656), jnp.uint8), zeros((4, 66, 128), E4M3)
    table, q_index = zeros((1, 2), jnp.int32), zeros((1, 1, 64, 128), E4M3)
    weights, keys = zeros((1, 1, 64)), causal_range(1, 1)
    options: dict[str, Any] = dict(implementation="pallas")
    calls = dict(
        paged_sparse_attention=lambda: paged.paged_sparse_attention(
            bf16((1, 1, 64, 576)), latents, table, zeros((1, 1, 256), jnp.int32), value_dim=512, scale=1, **options
        ),
        paged_index_scores=lambda: paged.paged_index_scores(q_index, index_keys, weights, table, keys, **options),
        paged_select_keys=lambda: paged.paged_select_keys(q_index, index_keys, weights, table, keys, k=64, **options),
        write_entries=lambda: paged.write_entries(
            latents, index_keys, zeros(1, jnp.int32), bf16((1, 576)), bf16((1, 128)), value_dim=512, **options
        ),
    )
    for operation, call in calls.items():
        with pytest.raises(ValueError, match=f"implementation='pallas': {operation} needs an NVIDIA Hopper GPU.* cpu"):
            call()


def test_many_queries_have_no_kernel():
    arguments = attention_arguments(
        q=zeros((1, 5, 64, 576), jnp.bfloat16),
        latents=zeros((4, 64, 656), jnp.uint8),
        table=zeros((1, 2), jnp.int32),
        indices=zeros((1, 5, 256), jnp.int32),
        value_dim=512,
        implementation="pallas",
    )
    with pytest.raises(ValueError, match="T must be at most 4, got 5"):
        paged.paged_sparse_attention(**arguments)
