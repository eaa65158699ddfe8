"""Tests gathering and converting rows of FP8 pages: the functions' own Python, on NumPy threads."""

import types

import ml_dtypes
import numpy as np
import numpy_simt
import numpy_simt_copies
import pytest

from dsa_jax.pallas_kernels.decode import bfloat16_products, gather_rows, half_query

BLOCK, BARRIERS = 1024, 90112  # places in shared memory
PAGES, POSITIONS = 16, 512


class Memref:
    """Stands for an array in memory: its address, and the type that functions ask for."""

    def __init__(self, address, *shape):
        self.address, self.type, self.shape = address, types.SimpleNamespace(shape=shape), shape


@pytest.fixture
def emulated(monkeypatch):
    """Puts NumPy in place of the words of the GPU; what functions return are their threads' registers."""
    for module in (gather_rows, bfloat16_products, half_query):
        monkeypatch.setattr(module, "simt", numpy_simt, raising=False)
        monkeypatch.setattr(module, "simt_copies", numpy_simt_copies, raising=False)
        monkeypatch.setattr(
            module,
            "ptx",
            types.SimpleNamespace(
                inline_mgpu=lambda **_: lambda f: lambda *args: f(None, *args),
                private_values=lambda values, _: values,
                elements=lambda values: values,
                swizzled=lambda *_: (),
                Result=lambda *_: None,
                SPLAT=None,
            ),
        )
    monkeypatch.setattr(numpy_simt, "smem_address", lambda ref: numpy_simt.i32(ref.address))
    monkeypatch.setattr(numpy_simt, "gmem_address", lambda ref: numpy_simt.Reg(np.full(128, ref.address, np.uint64)))
    monkeypatch.setattr(numpy_simt, "scalar", lambda x: x if isinstance(x, numpy_simt.Reg) else numpy_simt.i32(int(x)))
    monkeypatch.setattr(gather_rows, "_splat", lambda value: value)
    monkeypatch.setattr(gather_rows, "_word", lambda value: [value.value])
    monkeypatch.setattr(gather_rows, "_words", lambda values: [numpy_simt.Reg(x) for x in values])
    monkeypatch.setattr(gather_rows.jnp, "int32", lambda x: x)
    numpy_simt_copies.arrivals.clear()

    def machine(smem_words=24 * 1024):
        made = numpy_simt.Machine(128, smem_words, 0)
        monkeypatch.setattr(numpy_simt, "machine", made, raising=False)
        return made

    return machine


def pool(random, scales):
    """Makes rows [n, 656] with these scales [n, 4], and what they stand for, [n, 576] float64."""
    rows = len(scales)
    values = random.integers(0, 256, (rows, 512), dtype=np.uint8)
    values[(values & 0x7F) == 0x7F] = 0x7E
    rotary = random.standard_normal((rows, 64)).astype(ml_dtypes.bfloat16)
    bits = np.concatenate([values, scales.view(np.uint8).reshape(rows, 16), rotary.view(np.uint8)], 1)
    with np.errstate(invalid="ignore"):
        latent = values.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.repeat(scales, 128, 1).astype(np.float64)
    return bits, np.concatenate([latent, rotary.astype(np.float64)], 1)


def tiles(array):
    """Lays [rows, 576] of 16-bit numbers out as swizzled tiles, in bytes."""
    rows = len(array)
    out = np.zeros((rows // 8, 9, 8, 8, 16), np.uint8)
    chunks = array.view(np.uint8).reshape(rows // 8, 8, 9, 8, 16)
    for row in range(8):
        for chunk in range(8):
            out[:, :, row, chunk ^ row] = chunks[:, row, :, chunk]
    return out.reshape(-1)


def untiled(smem, rows):
    """Takes swizzled tiles of bytes apart: [rows, 576] of 16-bit numbers as uint16."""
    stored = smem.reshape(rows // 8, 9, 8, 8, 16)
    out = np.zeros((rows // 8, 8, 9, 8, 16), np.uint8)
    for row in range(8):
        for chunk in range(8):
            out[:, row, :, chunk] = stored[:, :, row, chunk ^ row]
    return out.reshape(rows, 1152).view(np.uint16)


def gather(emulated, scales, seed=0, order=(0, 1)):
    """Gathers 64 positions, some absent; returns what landed, what should have, the masks, types and arrivals."""
    random = np.random.default_rng(seed)
    bits, rows = pool(random, scales)
    table = random.permutation(PAGES)[: POSITIONS // 64].astype(np.int32)
    ids = random.permutation(POSITIONS)[:64].astype(np.int32)
    ids[[3, 40, 63]] = -1, POSITIONS, -(2**31)
    machine = emulated()
    pool_ref, table_ref, ids_ref = (Memref(machine.put(x)) for x in (bits, table, ids))
    block, barriers = Memref(BLOCK, 64, 576), Memref(BARRIERS, 1, gather_rows._SLOT_BYTES // 4)
    positions = gather_rows.load_positions(ids_ref)
    slots = gather_rows.slots_of(positions, gather_rows.load_pages(positions, table_ref, POSITIONS), POSITIONS)
    for half in order:
        loaded = gather_rows.load_scales(slots, pool_ref)
        gather_rows.start_copies(slots, pool_ref, block, half, barriers, half)
        fits = gather_rows.choose_type(slots, loaded, barriers, half, half)
        gather_rows.convert(loaded, fits, block, barriers, half, half)
    there = (ids >= 0) & (ids < POSITIONS)
    at = np.where(there, ids, 0)
    want = np.where(there[:, None], rows[table[at // 64] * 64 + at % 64], 0)
    smem = machine.smem.view(np.uint8)
    words = smem[BARRIERS : BARRIERS + 32].view(np.uint32)
    got = untiled(smem[BLOCK : BLOCK + 64 * 1152], 64)
    mask = int(words[6]) | int(words[7]) << 32
    assert mask == sum(1 << i for i in range(64) if there[i])
    landed = [BARRIERS] * 128 + [BARRIERS + 8] * 128
    raw = [BARRIERS + 32 + 8 * i for i in range(8) for _ in range(32)]  # a warp and half
    assert sorted(numpy_simt_copies.arrivals) == landed + raw
    assert words[4] == words[5]
    np.testing.assert_array_equal(got[:, 512:].view(ml_dtypes.bfloat16).astype(np.float64), want[:, 512:])
    return got[:, :512], want[:, :512], bool(words[4])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_powers_of_two_are_exact_in_half_precision(emulated, order):
    random = np.random.default_rng(1)
    scales = np.exp2(random.integers(-15, 8, (PAGES * 64, 4))).astype(np.float32)
    got, want, wide = gather(emulated, scales, order=order)
    assert not wide
    np.testing.assert_array_equal(got.view(np.float16).astype(np.float64), want)


@pytest.mark.parametrize("scale", [0.1, 0.0, -0.3, 1.9 * 2.0**-15])
def test_other_scales_in_range_round_to_half_precision(emulated, scale):
    got, want, wide = gather(emulated, np.full((PAGES * 64, 4), scale, np.float32))
    assert not wide
    # Two roundings to 11 bits, and steps of 2^-24 at the least.
    np.testing.assert_allclose(got.view(np.float16).astype(np.float64), want, rtol=2.0**-9.9, atol=2.0**-24)


@pytest.mark.parametrize("scale", [2.0**-30, 3.7e4, 2.0**-16, 2.0**7 * 1.01, 1e-38, 1e30, np.inf, np.nan])
def test_scales_out_of_range_make_bfloat16(emulated, scale):
    """One such scale among others is enough; every product is rounded once."""
    scales = np.full((PAGES * 64, 4), 0.5, np.float32)
    scales[:, 2] = scale
    got, want, wide = gather(emulated, scales)
    assert wide
    with np.errstate(all="ignore"):
        want = want.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(got.view(ml_dtypes.bfloat16).astype(np.float64), want)


def test_scales_of_absent_rows_do_not_count(emulated):
    """Rows that only absent keys could be taken for, the first of the pool, may have any scale."""
    scales = np.full((PAGES * 64, 4), 0.5, np.float32)
    scales[0] = np.nan
    assert not gather(emulated, scales, seed=2)[2]


@pytest.mark.parametrize("half", ["a", "b"])
@pytest.mark.parametrize("columns", [8, 64])
def test_products_of_two_types(emulated, monkeypatch, half, columns):
    random = np.random.default_rng(3)
    machine = emulated(64 * 1024)
    numbers = [random.standard_normal((n, 576)).astype(np.float32) for n in (64, columns)]
    exact, places = [], (1024, 1024 + 64 * 1152)
    for x, is_half, place in zip(numbers, (half == "a", half == "b"), places, strict=True):
        stored = x.astype(ml_dtypes.bfloat16).view(np.uint16)
        if is_half:
            stored[:, :512] = x[:, :512].astype(np.float16).view(np.uint16)
            x[:, :512] = x[:, :512].astype(np.float16)
        exact.append(x.astype(ml_dtypes.bfloat16).astype(np.float64))
        machine.smem.view(np.uint8)[place : place + stored.nbytes] = tiles(stored)
    sums = {}
    monkeypatch.setattr(
        bfloat16_products,
        "ir",
        types.SimpleNamespace(
            VectorType=types.SimpleNamespace(get=lambda *_: None), F32Type=types.SimpleNamespace(get=lambda: None)
        ),
    )
    monkeypatch.setattr(bfloat16_products, "vector", types.SimpleNamespace(from_elements=lambda _, xs: list(xs)))
    layout = types.SimpleNamespace(registers_shape=lambda shape: (-1,))
    monkeypatch.setattr(
        bfloat16_products,
        "plgpu",
        types.SimpleNamespace(
            RefType=lambda *_: None, Layout=types.SimpleNamespace(WGMMA=types.SimpleNamespace(to_mgpu=lambda: layout))
        ),
    )

    def keep(_registers, **_):
        sums["registers"] = _registers

    monkeypatch.setattr(bfloat16_products, "mgpu", types.SimpleNamespace(FragmentedArray=keep))
    bfloat16_products.multiply_as_bfloat16(Memref(places[0], 64, 576), Memref(places[1], columns, 576), half)
    registers = np.array(list(sums["registers"])).reshape(columns // 8, 2, 2, 128)
    thread = np.arange(128)
    got = np.zeros((64, columns))
    for i in range(columns // 8):
        for lower in range(2):
            for j in range(2):
                got[16 * (thread // 32) + thread % 32 // 4 + 8 * lower, 8 * i + 2 * (thread % 4) + j] = registers[
                    i, lower, j
                ]
    np.testing.assert_allclose(got, exact[0] @ exact[1].T, rtol=1e-5, atol=1e-3)


def test_query_is_converted_where_it_is(emulated):
    """Half precision of the chosen heads, NaN where it has no number, the rotary columns as they were."""
    random = np.random.default_rng(4)
    machine = emulated()
    q = random.standard_normal((64, 576)).astype(ml_dtypes.bfloat16)
    q[5, 7], q[9, 100], q[40, 3], q[2, 4] = 1e5, -7e4, np.nan, 1e-6
    smem = machine.smem.view(np.uint8)
    smem[1024 : 1024 + 64 * 1152] = tiles(q.view(np.uint16))
    half_query.convert_query(Memref(1024, 64, 576), 32, 32)
    half_query.convert_query(Memref(1024, 64, 576), 0, 32)
    got = untiled(smem[1024 : 1024 + 64 * 1152], 64)
    with np.errstate(over="ignore"):
        want = q[:, :512].astype(np.float32).astype(np.float16)
    want[np.isinf(want)] = np.nan
    np.testing.assert_array_equal(got[:, :512].view(np.float16), want)
    np.testing.assert_array_equal(got[:, 512:], q.view(np.uint16)[:, 512:])
    packed = np.asarray(half_query.pack_query(q)).view(np.uint16)
    np.testing.assert_array_equal(packed[:, :512].view(np.float16), want)
    np.testing.assert_array_equal(packed[:, 512:], q.view(np.uint16)[:, 512:])
