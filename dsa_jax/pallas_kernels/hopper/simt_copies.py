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


def first_of(landed, landed_parity, free, free_parity):
    """Waits until the mbarrier `landed` has completed its phase, or all of `free` have: 1 in all lanes for those, or 0."""
    # Lanes may see a phase at different times: what one has seen, all take. Copies take a microsecond to land; this
    # sleeps on them for 50 ns at a time.
    tests = [f"mbarrier.test_wait.parity.shared::cta.b64 {{}}, [${4 + i}], $3;" for i in range(len(free))]
    tests = tests[0].format("f") + "".join(x.format("q") + " and.pred f, f, q;" for x in tests[1:])
    text = (
        "{.reg .pred l, f, q;\nPOLL_${:uid}:\n"
        f"{tests} vote.sync.any.pred f, f, 0xffffffff;\n@f bra DONE_${{:uid}};\n"
        "mbarrier.try_wait.parity.shared::cta.b64 l, [$1], $2, 50; vote.sync.any.pred l, l, 0xffffffff;\n"
        "@!l bra POLL_${:uid};\nDONE_${:uid}:\nselp.b32 $0, 1, 0, f;}"
    )
    return _asm(text, landed, landed_parity, free_parity, *free, results="r", convergent=True)


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
