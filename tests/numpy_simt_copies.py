"""Runs the words of `dsa_jax.pallas_kernels.hopper.simt_copies` in NumPy, like `numpy_simt`.

Copies take effect at once: whether code waits for them is not seen here.
"""

import ml_dtypes
import numpy as np
import numpy_simt
from numpy_simt import Reg

ONE_BITS = 0x3F800000
arrivals: list[int] = []  # addresses of the barriers, one entry a thread


def _bits(x, dtype=np.uint32):
    return x.value if isinstance(x, Reg) else np.full(numpy_simt.machine.threads, x, dtype)


def xor(a, b):
    return Reg(_bits(a) ^ _bits(b))


def signed_negative(x):
    return Reg(x.value >= np.uint32(1 << 31))


def lane_value(x, lane):
    assert (lane.value < 32).all()
    warps = x.value.reshape(-1, 32)
    return Reg(np.take_along_axis(warps, lane.value.reshape(-1, 32).astype(np.int64), 1).ravel())


def sync_warp():
    numpy_simt.machine.together()
    numpy_simt.machine.barriers += 1  # of each warp: that warps keep to their own memory is for the test to see


def row_address(base, row, row_bytes):
    assert (row.value < 1 << 31)[numpy_simt.machine.active].all()
    return Reg(base.value + row.value.astype(np.uint64) * np.uint64(row_bytes))


def start_copy16(to, source, count, to_offset=0, source_offset=0):
    machine = numpy_simt.machine
    copied = count.value == 16
    assert (copied | (count.value == 0)).all()
    with numpy_simt.when(Reg(copied)):
        words = numpy_simt._load(machine.gmem, source, source_offset, 4)
    words = [numpy_simt.where(Reg(copied), x, 0) for x in words]
    numpy_simt.store4(to, words, to_offset)


def close_copies():
    pass


def wait_copies(pending):
    pass


def arrive(barrier):
    arrivals.extend(barrier.value.tolist())


def arrive_after_copies(address, offset=0):
    arrivals.extend((address.value + offset).tolist())


def arrive_expecting(address, count, offset=0):
    arrivals.extend((address.value + offset)[numpy_simt.machine.active].tolist())


def start_bulk_copy(to, source, count, barrier, offset=0):
    for at in range(0, count, 16):
        words = numpy_simt._load(numpy_simt.machine.gmem, source, at, 4)
        numpy_simt.store4(to, words, at)


def fence_asynchronous():
    pass


def load2(address, offset=0):
    return numpy_simt._load_smem(address, offset, 2)


def store2_gmem(address, values, offset=0):
    for i, value in enumerate(values):
        numpy_simt.store_gmem(Reg(address.value + np.uint64(offset + 4 * i)), value)


def e4m3_as_half(x):
    return e4m3_to_half(x, Reg(np.full_like(x.value, 0x3C003C00)))


def permute_bytes(x, y, selector):
    both = np.concatenate([x.value.view(np.uint8).reshape(-1, 4), y.value.view(np.uint8).reshape(-1, 4)], 1)
    return _join(both[:, [selector >> 4 * i & 7 for i in range(4)]])


def multiply_halves(x, y):
    with np.errstate(all="ignore"):
        return _join(_two(x, np.float16) * _two(y, np.float16))


def half_pair(low, high):
    with np.errstate(all="ignore"):
        both = np.stack([low.value, high.value], 1).view(np.float32).astype(np.float16)
    return _join(both)


def half_pair_to_bfloat16(x, low, high):
    with np.errstate(all="ignore"):
        scales = np.stack([low.value, high.value], 1).view(np.float32)
        return _join((_two(x, np.float16).astype(np.float32) * scales).astype(ml_dtypes.bfloat16))


def bfloat16_pair_of(low, high):
    return _join(np.stack([low.value, high.value], 1).astype(ml_dtypes.bfloat16))


def half_twice(x):
    with np.errstate(over="ignore"):
        half = x.value.view(np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)
    return Reg(half | half << 16)


def _two(x, dtype):
    """Splits each int32 into two 16-bit numbers."""
    return x.value.view(np.uint16).reshape(-1, 2).view(dtype)


def _join(x):
    """Joins two 16-bit numbers to an int32."""
    return Reg(np.ascontiguousarray(x).view(np.uint32).ravel())


def e4m3_to_half(x, scale):
    values = x.value.view(np.uint8).reshape(-1, 4).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    with np.errstate(all="ignore"):
        values = values * _two(scale, np.float16)[:, :1]
    return [_join(values[:, :2]), _join(values[:, 2:])]


def bfloat16_to_half(x):
    with np.errstate(all="ignore"):
        half = _two(x, ml_dtypes.bfloat16).astype(np.float32).astype(np.float16)
        return _join(half * np.float16(0) + half)


def half_to_bfloat16(x, scale=ONE_BITS):
    with np.errstate(all="ignore"):
        values = _two(x, np.float16).astype(np.float32) * _bits(scale).view(np.float32)[:, None]
    return _join(values.astype(ml_dtypes.bfloat16))


def multiply_16x8(a, b, accumulator):
    """Adds the products as lanes hold them: the words of a and b lie as PTX's m16n8k16 has them."""
    warps = numpy_simt.machine.threads // 32
    lane = np.arange(32)
    row, pair = lane // 4, lane % 4
    left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
    for i, word in enumerate(a):
        numbers = _two(word, ml_dtypes.bfloat16).astype(np.float64).reshape(warps, 32, 2)
        for j in range(2):
            left[:, row + 8 * (i % 2), 2 * pair + 8 * (i // 2) + j] = numbers[:, :, j]
    for i, word in enumerate(b):
        numbers = _two(word, ml_dtypes.bfloat16).astype(np.float64).reshape(warps, 32, 2)
        for j in range(2):
            right[:, 2 * pair + 8 * i + j, row] = numbers[:, :, j]
    with np.errstate(all="ignore"):
        product = left @ right
    out = []
    for i, x in enumerate(accumulator):
        out.append(Reg(x.value + product[:, row + 8 * (i // 2), 2 * pair + i % 2].ravel().astype(np.float32)))
    return out


def ballot(condition):
    bits = condition.value.reshape(-1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)
    return Reg(np.repeat(bits.sum(1).astype(np.uint32), 32))


def store_byte(address, value, offset=0):
    machine = numpy_simt.machine
    at = (address.value.astype(np.int64) + offset)[machine.active]
    machine.touch("atomic", np.where(machine.active, (address.value.astype(np.int64) + offset) // 4, 0))
    machine.smem.view(np.uint8)[at] = value.value[machine.active].astype(np.uint8)
