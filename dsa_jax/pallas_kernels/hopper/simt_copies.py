"""Adds words to `simt` that gathering and converting rows needs: asynchronous copies, values of other lanes, e4m3.

For use inside `plgpu.inline_mgpu`, like `simt`; `tests/numpy_simt_copies.py` has the same words in NumPy.
"""

from typing import Any

from jaxlib.mlir import ir

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.simt import Reg

ONE_BITS = 0x3F800000  # 1.0 as a float32


def _asm(text, *args, results="", convergent=False, pure=False) -> Any:
    """Emits inline PTX on registers, with results of the types of `results`: "r" int32, "l" int64, "f" float32."""
    types = [{"r": ptx.i32_type, "l": ptx.i64_type, "f": ir.F32Type.get}[r]() for r in results]
    values = [x.value if isinstance(x, Reg) else ptx.i32(x) for x in args]
    if not types:
        return ptx.ptx(text, *values, has_side_effects=True, convergent=convergent)
    out = ptx.ptx(text, *values, result_types=types, has_side_effects=not pure, convergent=convergent)
    return Reg(out[0]) if len(out) == 1 else [Reg(x) for x in out]


# Integers and lanes.


def xor(a, b):
    """Computes the bits that are set in one of two int32 alone."""
    return _asm("xor.b32 $0, $1, $2;", a, b, results="r", pure=True)


def signed_negative(x):
    """Tells whether an int32 is below zero."""
    return x >= 0x80000000


def lane_value(x, lane):
    """Takes the int32 `x` of another lane of the warp. All lanes call it."""
    return _asm("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", x, lane, results="r", convergent=True)


def sync_warp():
    """Waits for the lanes of the warp, whose shared memory is then visible to each other."""
    _asm("bar.warp.sync 0xffffffff;", convergent=True)


# Copies from global to shared memory that no register goes through.


def row_address(base, row, row_bytes):
    """Computes base + row · row_bytes in 64 bits, of an int32 row that is at least 0."""
    return _asm(f"mad.wide.u32 $0, $1, {row_bytes}, $2;", row, base, results="l")


def start_copy16(to, source, count, to_offset=0, source_offset=0):
    """Starts the copy of `count` of 16 bytes, 0 or 16; the others become zeros. Nothing is read for a count of 0."""
    # `cg` leaves rows out of the first-level cache, which lies in the memory that kernels use as shared memory.
    # L2::128B has the second-level cache fetch whole lines.
    _asm(f"cp.async.cg.shared.global.L2::128B [$0+{to_offset}], [$1+{source_offset}], 16, $2;", to, source, count)


def close_copies():
    """Makes a group of the copies that this thread has started since the last group."""
    _asm("cp.async.commit_group;")


def wait_copies(pending):
    """Waits for this thread's groups of copies, all but the last `pending`."""
    _asm(f"cp.async.wait_group {pending};")


def arrive(barrier):
    """Arrives at an mbarrier; what this thread wrote may then be read by wgmma."""
    # The writes went through the generic proxy, and wgmma reads through the asynchronous one.
    _asm("fence.proxy.async.shared::cta;")
    _asm("mbarrier.arrive.shared::cta.b64 _, [$0];", barrier)


# Barriers of other numbers of threads than Pallas' own have.


def init_barrier(address, arrivals, offset=0):
    """Initialises an mbarrier that completes a phase with every `arrivals` arrivals. One thread calls it."""
    _asm(f"mbarrier.init.shared::cta.b64 [$0+{offset}], {arrivals};", address)


def publish_barriers():
    """Makes barriers known to all threads of the block and to asynchronous copies. All threads call it."""
    _asm("fence.mbarrier_init.release.cluster;")
    _asm("bar.sync 0;", convergent=True)


def arrive_only(address, offset=0):
    """Arrives at an mbarrier, of which nobody reads what this thread wrote."""
    _asm(f"mbarrier.arrive.shared::cta.b64 _, [$0+{offset}];", address)


def arrive_after_copies(address, offset=0):
    """Arrives at an mbarrier when the copies that this thread has started so far have landed; goes on at once."""
    # noinc: the barrier counts this arrival from the beginning.
    _asm(f"cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0+{offset}];", address)


def wait_barrier(address, parity, offset=0):
    """Waits until an mbarrier has completed its phase of this parity; of a new one, 1 has been."""
    # try_wait sleeps for up to 10 ms before it asks again.
    text = (
        "{.reg .pred p;\nWAIT_${:uid}:\n"
        f"mbarrier.try_wait.parity.shared::cta.b64 p, [$0+{offset}], $1, 10000000;\n"
        "@!p bra WAIT_${:uid};}"
    )
    _asm(text, address, parity, convergent=True)


# Bulk copies, which one thread starts for a whole row.


def arrive_expecting(address, count, offset=0):
    """Arrives at an mbarrier, whose phase then also waits for `count` bytes of bulk copies."""
    _asm(f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0+{offset}], $1;", address, count)


def start_bulk_copy(to, source, count, barrier, offset=0):
    """Starts the copy of `count` bytes, a multiple of 16, that an mbarrier of this block waits for."""
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    _asm(f"{copy} [$0], [$1], {count}, [$2+{offset}];", to, source, barrier)


def fence_asynchronous():
    """Has this thread's writes to shared memory come before asynchronous copies and reads that it starts later."""
    _asm("fence.proxy.async.shared::cta;")


def load2(address, offset=0):
    """Loads 2 int32 from shared memory, from a multiple of 8 bytes."""
    return _asm(f"ld.shared.v2.b32 {{$0, $1}}, [$2+{offset}];", address, results="rr")


def store2_gmem(address, values, offset=0):
    """Stores 2 int32 to global memory, to a multiple of 8 bytes."""
    _asm(f"st.global.v2.b32 [$0+{offset}], {{$1, $2}};", address, *values)


# Number formats: an int32 holds four e4m3, two half or two bfloat16, the lowest byte first.


def half_twice(x):
    """Rounds a float32, given by its bits, to half precision, for both halves of an int32."""
    text = "{.reg .f32 f; mov.b32 f, $1; cvt.rn.f16x2.f32 $0, f, f;}"
    return _asm(text, x, results="r")


def e4m3_to_half(x, scale):
    """Converts four e4m3 to half precision and multiplies by `scale`, from `half_twice`."""
    # Two instructions a pair. NaN stays NaN.
    text = (
        "{.reg .b16 l, h; .reg .b32 t; mov.b32 {l, h}, $2; "
        "cvt.rn.f16x2.e4m3x2 t, l; mul.rn.f16x2 $0, t, $3; cvt.rn.f16x2.e4m3x2 t, h; mul.rn.f16x2 $1, t, $3;}"
    )
    return _asm(text, x, scale, results="rr")


def e4m3_as_half(x):
    """Converts four e4m3 to half precision, exactly. NaN stays NaN."""
    text = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h;}"
    return _asm(text, x, results="rr", pure=True)


def permute_bytes(x, y, selector):
    """Takes four of the eight bytes of x, 0 to 3, and y, 4 to 7, by the selector's digits, the lowest first."""
    return _asm(f"prmt.b32 $0, $1, $2, {selector};", x, y, results="r", pure=True)


def multiply_halves(x, y):
    """Multiplies two pairs of half-precision numbers."""
    return _asm("mul.rn.f16x2 $0, $1, $2;", x, y, results="r", pure=True)


def half_pair(low, high):
    """Rounds two float32, given by their bits, to half precision."""
    text = "{.reg .f32 a, b; mov.b32 a, $1; mov.b32 b, $2; cvt.rn.f16x2.f32 $0, b, a;}"
    return _asm(text, low, high, results="r", pure=True)


def half_pair_to_bfloat16(x, low, high):
    """Converts two half-precision numbers to bfloat16, each multiplied in float32 by a scale given by its bits."""
    text = (
        "{.reg .b16 u, v; .reg .f32 a, b, s; mov.b32 {u, v}, $1; cvt.f32.f16 a, u; cvt.f32.f16 b, v; "
        "mov.b32 s, $2; mul.f32 a, a, s; mov.b32 s, $3; mul.f32 b, b, s; cvt.rn.bf16x2.f32 $0, b, a;}"
    )
    return _asm(text, x, low, high, results="r", pure=True)


def bfloat16_pair_of(low, high):
    """Rounds two float32 to bfloat16."""
    return _asm("cvt.rn.bf16x2.f32 $0, $2, $1;", low, high, results="r", pure=True)


def multiply_add(x, y, z):
    """Computes x · y + z of float32, rounded once."""
    return _asm("fma.rn.f32 $0, $1, $2, $3;", x, y, z, results="f", pure=True)


def bfloat16_to_half(x):
    """Converts two bfloat16 to half precision; what is beyond its range becomes NaN, not infinity."""
    # An infinite query could give a key a logit of -inf, which nothing would tell from an absent key. ∞ · 0 is NaN.
    text = (
        "{.reg .f32 a, b; .reg .b32 t, z; shl.b32 t, $1, 16; mov.b32 a, t; and.b32 t, $1, 0xffff0000; mov.b32 b, t; "
        "cvt.rn.f16x2.f32 t, b, a; mov.b32 z, 0; fma.rn.f16x2 $0, t, z, t;}"
    )
    return _asm(text, x, results="r", pure=True)


def half_to_bfloat16(x, scale: Reg | int = ONE_BITS):
    """Converts two half-precision numbers to bfloat16, multiplied in float32 by `scale`, given by its bits."""
    text = (
        "{.reg .b16 u, v; .reg .f32 a, b, s; mov.b32 {u, v}, $1; mov.b32 s, $2; cvt.f32.f16 a, u; cvt.f32.f16 b, v; "
        "mul.f32 a, a, s; mul.f32 b, b, s; cvt.rn.bf16x2.f32 $0, b, a;}"
    )
    return _asm(text, x, scale, results="r", pure=True)


def multiply_16x8(a, b, accumulator):
    """Adds a warp's product of bfloat16, [16, 16] · [16, 8], to four float32 a lane, as an accumulator has them."""
    # wgmma would want more registers beside a warpgroup's accumulators than there are.
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        "{$10, $11, $12, $13};"
    )
    return _asm(text, *a, *b, *accumulator, results="ffff", convergent=True)


def ballot(condition):
    """Gives every lane the lanes that meet the condition, one bit each."""
    return _asm("vote.sync.ballot.b32 $0, $1, 0xffffffff;", condition, results="r", convergent=True)


def store_byte(address, value, offset=0):
    """Stores the lowest byte of an int32 to shared memory."""
    _asm(f"st.shared.b8 [$0+{offset}], $1;", address, value)
