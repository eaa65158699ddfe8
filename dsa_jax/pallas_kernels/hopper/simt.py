"""Writes one thread's code on registers where Pallas has no words for it: arithmetic, control flow, memory, warps.

For use inside `plgpu.inline_mgpu`: each function emits MLIR for one thread's view (SIMT: single instruction, multiple
threads). `tests/numpy_simt.py` has the same vocabulary for all threads at once in NumPy, and runs kernels written with
it, as they stand, on any machine. `simt_copies.py`, `simt_softmax.py`, `floats.py` and `cluster.py` add words to it.

Addresses of shared memory are int32, of global memory int64, in bytes. Numbers are unsigned unless a docstring says
otherwise. Docstrings say what the emitted code does.
"""

import struct
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from dsa_jax.pallas_kernels.hopper import ptx


class Reg:
    """Holds a register of each thread: int32, int64, float32 or predicate. Operators emit MLIR."""

    def __init__(self, value):
        self.value = value

    def _with(self, other, op):
        return Reg(op(self.value, _value(other, self.value.type)))

    def _by_type(self, other, of_int, of_float):
        return self._with(other, of_float if isinstance(self.value.type, ir.F32Type) else of_int)

    def __add__(self, other):
        return self._by_type(other, arith.addi, arith.addf)

    def __sub__(self, other):
        return self._by_type(other, arith.subi, arith.subf)

    def __rsub__(self, other):
        return Reg(_value(other, self.value.type)) - self

    def __mul__(self, other):
        return self._by_type(other, arith.muli, arith.mulf)

    def __truediv__(self, other):
        """Divides float32."""
        return self._with(other, arith.divf)

    def __floordiv__(self, other):
        return self._with(other, arith.divui)

    def __and__(self, other):
        return self._with(other, arith.andi)

    def __or__(self, other):
        return self._with(other, arith.ori)

    def __lshift__(self, other):
        return self._with(other, arith.shli)

    def __rshift__(self, other):
        return self._with(other, arith.shrui)

    def __invert__(self):
        """Negates a predicate."""
        return self._with(True, arith.xori)

    def _compare(self, other, predicate):
        return self._with(other, lambda a, b: arith.cmpi(predicate, a, b))

    def __lt__(self, other):
        return self._compare(other, arith.CmpIPredicate.ult)

    def __le__(self, other):
        return self._compare(other, arith.CmpIPredicate.ule)

    def __gt__(self, other):
        return self._compare(other, arith.CmpIPredicate.ugt)

    def __ge__(self, other):
        return self._compare(other, arith.CmpIPredicate.uge)

    def equals(self, other):
        """Compares integers, as `==` would if Python did not want a bool of it."""
        return self._compare(other, arith.CmpIPredicate.eq)

    def reaches(self, other):
        """Compares float32 by ≥: false for NaN, and -0.0 equals +0.0. Subnormal numbers are not flushed to zero."""
        return self._with(other, lambda a, b: arith.cmpf(arith.CmpFPredicate.OGE, a, b))

    def bits(self):
        """Reads the bits of this float32 as int32."""
        return Reg(arith.bitcast(ptx.i32_type(), self.value))

    def float(self):
        """Reads the bits of this int32 as float32."""
        return Reg(arith.bitcast(ir.F32Type.get(), self.value))

    def long(self):
        """Widens this int32 to int64, with zeros."""
        return Reg(arith.extui(ptx.i64_type(), self.value))


def _value(x, dtype=None):
    if isinstance(x, Reg):
        return x.value
    dtype = ptx.i32_type() if dtype is None else dtype
    if isinstance(dtype, ir.IntegerType) and dtype.width == 32 and x >= 1 << 31:
        x -= 1 << 32  # MLIR takes the signed number with the same bits
    return arith.constant(dtype, x)


def _values(registers):
    return [_value(x) for x in registers]


def asm(text, *args, results="", convergent=False, pure=False) -> Any:
    """Emits inline PTX with results of the types of `results`: "r" an int32, "l" an int64, "f" a float32.

    Args:
      text: the instructions; $0 is the first result, arguments follow the results.
      args: registers or integers.
      results: types of the results, none by default; two and more come as a list.
      convergent: whether the threads of a warp must execute it together.
      pure: whether the compiler may drop or merge it, since it depends on the arguments alone.
    """
    # Everything has side effects unless it is pure: then nothing is dropped, moved across barriers or merged.
    types = [{"r": ptx.i32_type, "l": ptx.i64_type, "f": ir.F32Type.get}[r]() for r in results]
    if not types:
        return ptx.ptx(text, *_values(args), has_side_effects=True, convergent=convergent)
    out = ptx.ptx(text, *_values(args), result_types=types, has_side_effects=not pure, convergent=convergent)
    return Reg(out[0]) if len(out) == 1 else [Reg(x) for x in out]


def _hex(x):
    """Writes a float32 constant as PTX has it, by its bits."""
    return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"


# Constants and addresses.


def i32(value):
    """Makes an int32 constant."""
    return Reg(_value(value))


def f32(value):
    """Makes a float32 constant."""
    return Reg(_value(value, ir.F32Type.get()))


def predicate(value):
    """Makes a constant predicate."""
    return Reg(_value(value, ir.IntegerType.get_signless(1)))


def scalar(array):
    """Takes the one register of a splat."""
    return Reg(ptx.scalar(array))


def smem_address(ref):
    """Gives the address at which an array in shared memory begins."""
    return Reg(ptx.smem_address(ref))


def gmem_address(ref):
    """Gives the address at which an array in global memory begins."""
    return Reg(ptx.gmem_address(ref))


def thread_id():
    """Reads the thread's number in its block anew, so that nothing computed from it stays in a register meanwhile."""
    return opaque(Reg(ptx.thread_id()))


def opaque(x):
    """Copies an int32 out of the compiler's sight, so that it computes anew what it might have kept in registers."""
    return asm("mov.b32 $0, $1;", x, results="r")


# Control flow. A `when` may part a warp; `choose`, `repeat` and barriers want all threads of a team to agree.


def when(condition):
    """Enters a block, `with when(condition):`, for the threads that meet the condition."""
    return mgpu.utils.when(condition.value)


def choose(condition, then, otherwise):
    """Returns `then()` where the condition holds, else the register `otherwise`."""
    # A branch, not a select: what `then` does is not done elsewhere, barriers included.
    choice = scf.IfOp(condition.value, [otherwise.value.type], has_else=True)
    with ir.InsertionPoint(choice.then_block):
        scf.yield_([then().value])
    with ir.InsertionPoint(choice.else_block):  # pyright: ignore[reportCallIssue, reportArgumentType]
        scf.yield_([otherwise.value])
    return Reg(choice.results[0])


def loop(start, stop, step, carried, body):
    """Runs `for i in range(start, stop, step): carried = body(i, *carried)`, all below 2**31; returns the last."""
    start, stop, step = _values((start, stop, step))  # signed comparisons: hence below 2**31
    loop = scf.ForOp(start, stop, step, _values(carried))
    with ir.InsertionPoint(loop.body):
        scf.yield_(_values(body(Reg(loop.induction_variable), *map(Reg, loop.inner_iter_args))))
    return [Reg(x) for x in loop.results]


def repeat(state, test, body):
    """Runs `again, state = test(*state)`, and while `again`, the same with `body(*state)`; returns the last state."""
    types = [x.type for x in _values(state)]
    loop = scf.WhileOp(types, _values(state))
    before, after = loop.before.blocks.append(*types), loop.after.blocks.append(*types)
    with ir.InsertionPoint(before):
        again, state = test(*map(Reg, before.arguments))
        scf.condition(again.value, _values(state))  # the body gets what the test returned
    with ir.InsertionPoint(after):
        scf.yield_(_values(body(*map(Reg, after.arguments))))
    return [Reg(x) for x in loop.results]


def barrier(number, threads):
    """Waits until `threads` threads have come to the barrier of this number (0 is Pallas' own, of the block)."""
    # A named barrier: teams of one block wait for their own threads alone, and shared memory is visible behind it.
    asm(f"bar.sync $0, {threads};", number, convergent=True)


def barrier_any(number, threads, condition):
    """Waits as `barrier` does, and tells every thread whether any has come with `condition`."""
    text = f"{{.reg .pred p; bar.red.or.pred p, $1, {threads}, $2; selp.b32 $0, 1, 0, p;}}"
    return asm(text, number, condition, results="r", convergent=True) > 0


# Arithmetic.


def where(condition, a, b):
    """Selects `a` where the condition holds, else `b`."""
    return Reg(arith.select(condition.value, a.value, _value(b, a.value.type)))


def minimum(a, b):
    """Takes the lesser int32."""
    return a._with(b, arith.minui)


def maximum(a, b):
    """Takes the greater int32."""
    return a._with(b, arith.maxui)


def clamped(x, limit):
    """Forces a signed number into [0, limit]."""
    # Signed: ranges may begin below 0 and end beyond the row.
    return asm(f"{{max.s32 $0, $1, 0; min.s32 $0, $0, {limit};}}", x, results="r", pure=True)


def bfloat16_pair(x):
    """Widens the two bfloat16 in an int32, the lower half first, to float32."""
    return (x << 16).float(), (x & 0xFFFF0000).float()


def low_word(x):
    """Takes the lower half of an int64."""
    return asm("cvt.u32.u64 $0, $1;", x, results="r", pure=True)


def leading_zeros(x):
    """Counts the zeros above the highest bit that is set."""
    return asm("clz.b32 $0, $1;", x, results="r", pure=True)


def ones(x):
    """Counts the bits that are set."""
    return asm("popc.b32 $0, $1;", x, results="r", pure=True)


def key_of(score):
    """Maps a float32 to its key, the number whose order among keys is that of scores: adding zero makes -0.0 +0.0."""
    text = (
        "{.reg .b32 b, s; add.rn.f32 b, $1, 0f00000000; shr.s32 s, b, 31; or.b32 s, s, 0x80000000; xor.b32 $0, b, s;}"
    )
    return asm(text, score, results="r", pure=True)


def score_of(key):
    """Maps a key back to its float32."""
    # Of a positive number the key has the sign bit set and the others as they are, of a negative one all bits inverted.
    text = "{.reg .b32 s; not.b32 s, $1; shr.s32 s, s, 31; or.b32 s, s, 0x80000000; xor.b32 $0, $1, s;}"
    return asm(text, key, results="r", pure=True).float()


def share_and_deviations(total, part, deviations):
    """Computes n + deviations · √n + 2 for n = part / total, approximately, rounded down."""
    text = (
        f"{{.reg .f32 n, s; cvt.rn.f32.u32 n, $1; rcp.approx.f32 n, n; mul.f32 n, n, {_hex(part)}; sqrt.approx.f32 s, "
        f"n; fma.rn.f32 n, s, {_hex(deviations)}, n; add.f32 n, n, {_hex(2)}; cvt.rzi.u32.f32 $0, n;}}"
    )
    return asm(text, total, results="r", pure=True)


def how_many_reach(pairs):
    """Counts the (score, bound) with score ≥ bound; a power of two of them.

    In float32, 1.0 each: done with predicates, the compiler would keep all of them, and a thread has but seven.
    """
    counts = [asm("set.ge.f32.f32 $0, $1, $2;", *pair, results="f", pure=True) for pair in pairs]
    while len(counts) > 1:  # a tree of additions, so that none waits long for another
        counts = [
            asm("add.f32 $0, $1, $2;", *pair, results="f", pure=True)
            for pair in zip(counts[::2], counts[1::2], strict=True)
        ]
    return asm("cvt.rzi.u32.f32 $0, $1;", *counts, results="r", pure=True)


# Memory. `_if` predicates one instruction, which is cheaper than a branch around it.


def load(address, offset=0):
    """Loads an int32 from shared memory."""
    return asm(f"ld.shared.b32 $0, [$1+{offset}];", address, results="r")


def load4(address, offset=0):
    """Loads 4 int32 from shared memory, from a multiple of 16 bytes."""
    return asm(f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];", address, results="rrrr")


def load_long(address, offset=0):
    """Loads an int64 from shared memory."""
    return asm(f"ld.shared.b64 $0, [$1+{offset}];", address, results="l")


def store(address, value, offset=0):
    """Stores an int32 or int64 to shared memory."""
    bits = _value(value).type.width
    asm(f"st.shared.b{bits} [$0+{offset}], $1;", address, value)


def store4(address, values, offset=0):
    """Stores 4 int32 to shared memory, to a multiple of 16 bytes."""
    asm(f"st.shared.v4.b32 [$0+{offset}], {{$1, $2, $3, $4}};", address, *values)


def store_if(condition, address, value):
    """Stores an int32 to shared memory where the condition holds."""
    asm("@$2 st.shared.b32 [$0], $1;", address, value, condition)


def store_pair_if_reaches(score, bound, number, address, distance):
    """Stores `score` where it is ≥ `bound`, and `number` `distance` bytes behind it; returns the next free address."""
    # Four predicated instructions instead of a branch a score: most scores fail the comparison.
    text = (
        "{.reg .pred p; setp.ge.f32 p, $1, $2; mov.b32 $0, $4; @p st.shared.f32 [$4], $1; "
        f"@p st.shared.b32 [$4+{distance}], $3; @p add.u32 $0, $4, 4;}}"
    )
    return asm(text, score, bound, number, address, results="r")


def count_if(condition, address):
    """Adds 1 to an int32 of shared memory, atomically."""
    # `red` returns nothing, so no register waits for it.
    asm("@$1 red.shared.add.u32 [$0], 1;", address, condition)


def or_if(condition, address, bits):
    """Sets bits of an int32 of shared memory, atomically."""
    asm("@$2 red.shared.or.b32 [$0], $1;", address, bits, condition)


def take_number(address):
    """Adds 1 to an int32 of shared memory, atomically, and returns what it was."""
    # Numbers are given out in whatever order threads come.
    return asm("atom.shared.add.u32 $0, [$1], 1;", address, results="r")


def load_gmem(address):
    """Loads an int32 from global memory that nobody writes."""
    # nc: through the read-only path of the first-level cache, which is why nobody may write there meanwhile.
    return asm("ld.global.nc.b32 $0, [$1];", address, results="r")


def load_gmem_vector(address):
    """Loads 4 float32, used once, from global memory that nobody writes: the first-level cache does not keep them."""
    return asm("ld.global.nc.L1::no_allocate.v4.f32 {$0, $1, $2, $3}, [$4];", address, results="ffff")


def load_gmem_if(condition, address):
    """Loads an int32 from global memory that nobody writes where the condition holds, else gives 0."""
    text = "{.reg .b32 x; mov.b32 x, 0; @$2 ld.global.nc.b32 x, [$1]; mov.b32 $0, x;}"
    return asm(text, address, condition, results="r")


def load4_gmem_if(condition, address, otherwise):
    """Loads 4 int32, used once, from global memory that nobody writes where the condition holds, else `otherwise`."""
    text = (
        f"{{.reg .b32 x<4>; mov.b32 x0, {otherwise}; mov.b32 x1, x0; mov.b32 x2, x0; mov.b32 x3, x0; "
        "@$5 ld.global.nc.L1::no_allocate.v4.b32 {x0, x1, x2, x3}, [$4]; "
        "mov.b32 $0, x0; mov.b32 $1, x1; mov.b32 $2, x2; mov.b32 $3, x3;}"
    )
    return asm(text, address, condition, results="rrrr")


def read4_gmem(address, offset=0):
    """Loads 4 int32 from global memory that this kernel may have written."""
    # Not `nc`: that path may have an older value.
    return asm(f"ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];", address, results="rrrr")


def store_gmem(address, value):
    """Stores an int32 to global memory."""
    asm("st.global.b32 [$0], $1;", address, value)


def store_gmem_if(condition, address, value, offset=0):
    """Stores an int32 to global memory where the condition holds."""
    asm(f"@$2 st.global.b32 [$0+{offset}], $1;", address, value, condition)


def store2_gmem(address, values):
    """Stores 2 int32 to global memory, to a multiple of 8 bytes."""
    asm("st.global.v2.b32 [$0], {$1, $2};", address, *values)


def store4_gmem(address, values, offset=0):
    """Stores 4 int32 to global memory, to a multiple of 16 bytes."""
    asm(f"st.global.v4.b32 [$0+{offset}], {{$1, $2, $3, $4}};", address, *values)


# Warps: all 32 lanes call these together.


def warp_sum_so_far(x):
    """Sums `x` over this lane and those before it."""
    for distance in (1, 2, 4, 8, 16):  # p is whether a lane so far before this one exists
        text = (
            f"{{.reg .pred p; .reg .b32 t; shfl.sync.up.b32 t|p, $1, {distance}, 0, 0xffffffff; mov.b32 $0, $1; "
            "@p add.u32 $0, t, $1;}"
        )
        x = asm(text, x, results="r", convergent=True)
    return x


def warp_last(x):
    """Gives every lane the last lane's `x`."""
    return asm("shfl.sync.idx.b32 $0, $1, 31, 31, 0xffffffff;", x, results="r", convergent=True)


def warp_sum(x):
    """Sums `x` over the warp."""
    return asm("redux.sync.add.u32 $0, $1, 0xffffffff;", x, results="r", convergent=True)


def warp_minimum(x):
    """Takes the least `x` of the warp."""
    # One instruction; there is none like it for float32.
    return asm("redux.sync.min.u32 $0, $1, 0xffffffff;", x, results="r", convergent=True)


def warp_maximum(x):
    """Takes the greatest `x` of the warp."""
    return asm("redux.sync.max.u32 $0, $1, 0xffffffff;", x, results="r", convergent=True)


def warp_reserve(address, count, lane):
    """Adds the warp's `count` to an int32 of shared memory, atomically and once, and returns what it was."""
    # The last lane has the warp's whole count; it adds for all of them, and hands the old number around.
    text = (
        "{.reg .pred p; .reg .b32 t; mov.b32 t, 0; setp.eq.u32 p, $3, 31; @p atom.shared.add.u32 t, [$1], $2; "
        "shfl.sync.idx.b32 $0, t, 31, 31, 0xffffffff;}"
    )
    return asm(text, address, count, lane, results="r", convergent=True)
