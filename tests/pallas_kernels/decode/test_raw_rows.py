"""Tests raw rows of FP8 pages and the operands made of them: the functions' own Python, on NumPy threads."""

import types

import ml_dtypes
import numpy as np
import numpy_simt
import numpy_simt_copies
import pytest

from dsa_jax.pallas_kernels.decode import gather_rows, raw_rows

RAW, TABLE, QUERY, BARRIERS = 1024, 1024 + 2 * 46080, 102400, 180224  # places in shared memory
THREAD = np.arange(128)
WARP, EIGHTH, PAIR = THREAD // 32, THREAD % 32 // 4, THREAD % 4


class Memref:
    """Stands for an array in memory: its address, and the type that functions ask for."""

    def __init__(self, address, *shape, dtype=None):
        self.address, self.type, self.shape, self.dtype = address, types.SimpleNamespace(shape=shape), shape, dtype


@pytest.fixture
def machine(monkeypatch):
    """Puts NumPy in place of the words of the GPU; operands are words a thread."""
    for module in (gather_rows, raw_rows):
        monkeypatch.setattr(module, "simt", numpy_simt)
        monkeypatch.setattr(module, "simt_copies", numpy_simt_copies)
        fake = types.SimpleNamespace(
            inline_mgpu=lambda **_: lambda f: lambda *args: f(None, *args),
            swizzled=lambda *_: (), Result=lambda *_: None, SPLAT=None,
        )  # fmt: skip
        monkeypatch.setattr(module, "ptx", fake)
    monkeypatch.setattr(numpy_simt, "smem_address", lambda ref: numpy_simt.i32(ref.address))
    monkeypatch.setattr(numpy_simt, "gmem_address", lambda ref: numpy_simt.Reg(np.full(128, ref.address, np.uint64)))
    monkeypatch.setattr(numpy_simt, "scalar", lambda x: x if isinstance(x, numpy_simt.Reg) else numpy_simt.i32(int(x)))
    monkeypatch.setattr(gather_rows, "_splat", lambda value: value.value[0])
    monkeypatch.setattr(gather_rows, "_words", lambda values: [numpy_simt.Reg(x) for x in values])
    monkeypatch.setattr(raw_rows, "_operand", lambda words, dtype: words)
    monkeypatch.setattr(raw_rows, "ir", types.SimpleNamespace(F16Type=None, BF16Type=None))
    monkeypatch.setattr(raw_rows.jnp, "int32", lambda x: x)
    numpy_simt_copies.arrivals.clear()
    made = numpy_simt.Machine(128, 48 * 1024, 0)
    monkeypatch.setattr(numpy_simt, "machine", made, raising=False)
    return made


def unpacked(words, dtype):
    """Takes the words of an operand apart: [64, 64] float64, as wgmma sees it."""
    out = np.zeros((64, 64))
    for b, lower in np.ndindex(8, 2):
        numbers = words[b, lower].value.view(np.uint16).reshape(-1, 2).view(dtype).astype(np.float64)
        for i in range(2):
            out[16 * WARP + EIGHTH + 8 * lower, 8 * b + 2 * PAIR + i] = numbers[:, i]
    return out


def copied(machine, scales, stage=1):
    """Copies 64 rows, some absent, into a stage; returns e4m3, scales and rotary columns, with zeros for those."""
    random = np.random.default_rng(0)
    e4m3 = random.integers(0, 256, (64, 512), dtype=np.uint8)
    e4m3[(e4m3 & 0x7F) == 0x7F] = 0x7E
    rotary = random.standard_normal((64, 64)).astype(ml_dtypes.bfloat16)
    rows = np.concatenate([e4m3, scales.view(np.uint8).reshape(64, 16), rotary.view(np.uint8)], 1)
    order = random.permutation(64).astype(np.int32)  # of the pool's rows
    slots = order.copy()
    slots[[0, 9, 33, 63]] = -1
    place = gather_rows._Lane().row().value
    mine = slots[place].astype(np.int32).view(np.uint32)
    pool, barriers = Memref(machine.put(rows), 64, 656), Memref(BARRIERS, 2, 6)
    raw_rows.copy_rows([mine], pool, Memref(RAW, 2, raw_rows.BLOCK_BYTES), barriers, stage)
    machine.barriers += 1
    there = slots >= 0
    mask = machine.smem.view(np.uint8)[BARRIERS + 24 * stage + 16 :][:8].view(np.uint64)[0]
    assert int(mask) == sum(1 << i for i in range(64) if there[i])
    assert sorted(numpy_simt_copies.arrivals) == [BARRIERS + 24 * stage] * 4
    values = e4m3.view(ml_dtypes.float8_e4m3fn).astype(np.float64)[order] * there[:, None]
    return values, scales[order].astype(np.float64) * there[:, None], rotary.astype(np.float64)[order] * there[:, None]


@pytest.mark.parametrize("packed", [False, True])
def test_products_of_keys_and_permuted_queries_are_those_of_the_columns(machine, packed):
    random = np.random.default_rng(1)
    values, _, rotary = copied(machine, np.full((64, 4), 0.5, np.float32))
    raw = Memref(RAW, 2, raw_rows.BLOCK_BYTES)
    keys = [unpacked(raw_rows.keys_tile(raw, 1, tile), np.float16) for tile in range(8)]
    keys.append(unpacked(raw_rows.rotary_tile(raw, 1), ml_dtypes.bfloat16))
    q = random.integers(-8, 8, (32, 576)).astype(np.float32)
    stored = q.astype(ml_dtypes.bfloat16).view(np.uint16)
    if packed:
        stored[:, :512] = q[:, :512].astype(np.float16).view(np.uint16)
    smem = machine.smem.view(np.uint8)[QUERY : QUERY + 32 * 1152].reshape(4, 9, 8, 8, 16)
    chunks = stored.view(np.uint8).reshape(4, 8, 9, 8, 16)
    for row, chunk in np.ndindex(8, 8):
        smem[:, :, row, chunk ^ row] = chunks[:, row, :, chunk]
    raw_rows.permute_query(Memref(QUERY, 32, 576), 32, packed)
    moved = np.zeros((4, 8, 9, 8, 16), np.uint8)
    for row, chunk in np.ndindex(8, 8):
        moved[:, row, :, chunk] = smem[:, :, row, chunk ^ row]
    moved = moved.reshape(32, 1152).view(np.uint16)
    latent = moved[:, :512].view(np.float16).astype(np.float64)
    moved = np.concatenate([latent, moved[:, 512:].view(ml_dtypes.bfloat16).astype(np.float64)], 1)
    for tile in range(9):
        columns = slice(64 * tile, 64 * tile + 64)
        want = (values[:, columns] if tile < 8 else rotary) @ q[:, columns].T.astype(np.float64)
        np.testing.assert_allclose(keys[tile] @ moved[:, columns].T, want, rtol=1e-12)


@pytest.mark.parametrize("exponents", [(-15, 8), (-40, 30)])
def test_values_and_their_columns(machine, exponents):
    random = np.random.default_rng(2)
    scales = np.exp2(random.integers(*exponents, (64, 4))).astype(np.float32)
    values, scales, _ = copied(machine, scales)
    raw, table = Memref(RAW, 2, raw_rows.BLOCK_BYTES), Memref(TABLE, 128)
    wide = bool(raw_rows.scale_table(raw, 1, table))
    assert wide == (exponents != (-15, 8))
    machine.barriers += 1
    want = values * np.repeat(scales, 128, 1)
    row = np.arange(64)
    for first in (0, 256):
        made = raw_rows.values_tiles(raw, 1, table, first, wide)
        for tile, words in enumerate(made):
            columns = first + 64 * (row // 16) + 8 * (row % 8) + 2 * tile + row % 16 // 8
            got = unpacked(words, ml_dtypes.bfloat16 if wide else np.float16)
            np.testing.assert_array_equal(got, want[:, columns].T)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**-16, 2.0**8])
def test_one_scale_is_enough_for_bfloat16(machine, bad):
    scales = np.full((64, 4), 0.5, np.float32)
    scales[41, 2] = bad
    copied(machine, scales)
    assert raw_rows.scale_table(Memref(RAW, 2, raw_rows.BLOCK_BYTES), 1, Memref(TABLE, 128))


def test_results_come_in_order(machine, monkeypatch):
    """Accumulators whose numbers are head and column, of 16 heads behind those of another query."""
    bf16, first = ml_dtypes.bfloat16, 256
    start = machine.put(np.zeros((24, 512), bf16))
    out = Memref(start + 8 * 1024, 16, 512, dtype=bf16)
    accs = []
    for tile in range(4):
        acc = []
        for b, lower in np.ndindex(2, 2):
            column = first + 64 * WARP + 8 * EIGHTH + 2 * tile + lower
            heads = [8 * b + 2 * PAIR + i for i in range(2)]
            numbers = [(head + column % 16 * 16).astype(np.float32) for head in heads]
            acc.append([numpy_simt.Reg(x) for x in numbers])
        accs.append(acc)
    monkeypatch.setattr(raw_rows, "_values", lambda acc: acc)
    raw_rows.store_out(accs, first, out)
    got = machine.gmem[start // 4 :][: 24 * 256].view(bf16).reshape(24, 512)
    want = np.arange(16)[:, None] + np.arange(256, 512)[None] % 16 * 16
    np.testing.assert_array_equal(got[8:, 256:].astype(np.float64), want)
    assert not got[:8].any() and not got[:, :256].any()
