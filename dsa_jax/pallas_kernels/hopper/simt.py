"""A small vocabulary for kernels that Pallas cannot say: registers in arithmetic notation, control flow, PTX.

For use inside `plgpu.inline_mgpu`: each function emits MLIR for one thread's view. `tests/numpy_simt.py` has the same
vocabulary for all threads at once in NumPy, and runs kernels written with it, as they stand, on any machine.

Addresses of shared memory are int32, of global memory int64, in bytes. Numbers are unsigned unless it is said.
"""

import struct
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from dsa_jax.pallas_kernels.hopper import ptx


class Reg:
    """A register of each thread: int32, int64, float32 or predicate. Operators emit MLIR."""

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
        """Of float32."""
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
        """Not, of predicates."""
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
        """==, which Python wants for itself."""
        return self._compare(other, arith.CmpIPredicate.eq)

    def reaches(self, other):
        """≥ of float32: false for NaN, and -0.0 equals +0.0. Subnormal numbers are not flushed."""
        return self._with(other, lambda a, b: arith.cmpf(arith.CmpFPredicate.OGE, a, b))

    def bits(self):
        """The int32 with the bits of this float32."""
        return Reg(arith.bitcast(ptx.i32_type(), self.value))

    def float(self):
        """The float32 with the bits of this int32."""
        return Reg(arith.bitcast(ir.F32Type.get(), self.value))

    def long(self):
        """This int32 as int64."""
        return Reg(arith.extui(ptx.i64_type(), self.value))


def _value(x, dtype=None):
    if isinstance(x, Reg):
        return x.value
    dtype = ptx.i32_type() if dtype is None else dtype
    if isinstance(dtype, ir.IntegerType) and dtype.width == 32 and x >= 1 << 31:
        x -= 1 << 32
    return arith.constant(dtype, x)


def _values(registers):
    return [_value(x) for x in registers]


def _asm(text, *args, results="", convergent=False, pure=False) -> Any:
    """Inline PTX with results of the types of `results`: "r" an int32, "l" an int64, "f" a float32."""
    types = [{"r": ptx.i32_type, "l": ptx.i64_type, "f": ir.F32Type.get}[r]() for r in results]
    if not types:
        return ptx.ptx(text, *_values(args), has_side_effects=True, convergent=convergent)
    out = ptx.ptx(text, *_values(args), result_types=types, has_side_effects=not pure, convergent=convergent)
    return Reg(out[0]) if len(out) == 1 else [Reg(x) for x in out]


def _hex(x):
    """A float32 constant of PTX."""
    return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"


# Constants and where things are.


def i32(value):
    """An int32 constant."""
    return Reg(_value(value))


def f32(value):
    """A float32 constant."""
    return Reg(_value(value, ir.F32Type.get()))


def predicate(value):
    """A constant predicate."""
    return Reg(_value(value, ir.IntegerType.get_signless(1)))


def scalar(array):
    """The one register of a splat."""
    return Reg(ptx.scalar(array))


def smem_address(ref):
    """Where an array of shared memory begins."""
    return Reg(ptx.smem_address(ref))


def gmem_address(ref):
    """Where an array of global memory begins."""
    return Reg(ptx.gmem_address(ref))


def thread_id():
    """The thread's number in its block, read anew: what is computed from it cannot be shared with elsewhere."""
    return opaque(Reg(ptx.thread_id()))


def opaque(x):
    """The same int32, but not for the compiler: what is computed from it cannot be shared with elsewhere."""
    return _asm("mov.b32 $0, $1;", x, results="r")


# Control flow.


def when(condition):
    """`with when(condition):` for the threads that meet it."""
    return mgpu.utils.when(condition.value)


def choose(condition, then, otherwise):
    """`then()` where the condition holds, else the register `otherwise`."""
    choice = scf.IfOp(condition.value, [otherwise.value.type], has_else=True)
    with ir.InsertionPoint(choice.then_block):
        scf.yield_([then().value])
    with ir.InsertionPoint(choice.else_block):  # pyright: ignore[reportCallIssue, reportArgumentType]
        scf.yield_([otherwise.value])
    return Reg(choice.results[0])


def loop(start, stop, step, carried, body):
    """`for i in range(start, stop, step): carried = body(i, *carried)`, all below 2**31. Returns the last."""
    start, stop, step = _values((start, stop, step))
    loop = scf.ForOp(start, stop, step, _values(carried))
    with ir.InsertionPoint(loop.body):
        scf.yield_(_values(body(Reg(loop.induction_variable), *map(Reg, loop.inner_iter_args))))
    return [Reg(x) for x in loop.results]


def repeat(state, test, body):
    """`again, state = test(*state)`, and while `again`, the same with `body(*state)`. Returns the last state."""
    types = [x.type for x in _values(state)]
    loop = scf.WhileOp(types, _values(state))
    before, after = loop.before.blocks.append(*types), loop.after.blocks.append(*types)
    with ir.InsertionPoint(before):
        again, state = test(*map(Reg, before.arguments))
        scf.condition(again.value, _values(state))
    with ir.InsertionPoint(after):
        scf.yield_(_values(body(*map(Reg, after.arguments))))
    return [Reg(x) for x in loop.results]


def barrier(number, threads):
    """Waits until `threads` threads have come to the barrier of this number (0 is Pallas' own, of the block)."""
    _asm(f"bar.sync $0, {threads};", number, convergent=True)


def barrier_any(number, threads, condition):
    """A barrier that tells every thread whether any has come with `condition`."""
    text = f"{{.reg .pred p; bar.red.or.pred p, $1, {threads}, $2; selp.b32 $0, 1, 0, p;}}"
    return _asm(text, number, condition, results="r", convergent=True) > 0


# Arithmetic.


def where(condition, a, b):
    """`a` where the condition holds, else `b`."""
    return Reg(arith.select(condition.value, a.value, _value(b, a.value.type)))


def minimum(a, b):
    """The lesser int32."""
    return a._with(b, arith.minui)


def maximum(a, b):
    """The greater int32."""
    return a._with(b, arith.maxui)


def clamped(x, limit):
    """A signed number forced into [0, limit]."""
    return _asm(f"{{max.s32 $0, $1, 0; min.s32 $0, $0, {limit};}}", x, results="r", pure=True)


def maximum_f32(a, b):
    """The greater float32; of a number and NaN the number."""
    return _asm("max.f32 $0, $1, $2;", a, b, results="f", pure=True)


def exp2(x):
    """2^x of float32, to about 2^-22 of it."""
    return _asm("ex2.approx.f32 $0, $1;", x, results="f", pure=True)


def log2(x):
    """The logarithm of a float32 by 2, to about 2^-22."""
    return _asm("lg2.approx.f32 $0, $1;", x, results="f", pure=True)


def bfloat16_pair(x):
    """The two bfloat16 in an int32, the lower half first, as float32."""
    return (x << 16).float(), (x & 0xFFFF0000).float()


def low_word(x):
    """The lower half of an int64."""
    return _asm("cvt.u32.u64 $0, $1;", x, results="r", pure=True)


def leading_zeros(x):
    """How many of the highest bits are 0."""
    return _asm("clz.b32 $0, $1;", x, results="r", pure=True)


def ones(x):
    """How many bits are set."""
    return _asm("popc.b32 $0, $1;", x, results="r", pure=True)


def key_of(score):
    """The number whose order among all keys is that of the float32 `score`: adding zero makes -0.0 +0.0."""
    text = (
        "{.reg .b32 b, s; add.rn.f32 b, $1, 0f00000000; shr.s32 s, b, 31; or.b32 s, s, 0x80000000; xor.b32 $0, b, s;}"
    )
    return _asm(text, score, results="r", pure=True)


def score_of(key):
    """The float32 of a key."""
    text = "{.reg .b32 s; not.b32 s, $1; shr.s32 s, s, 31; or.b32 s, s, 0x80000000; xor.b32 $0, $1, s;}"
    return _asm(text, key, results="r", pure=True).float()


def share_and_deviations(total, part, deviations):
    """n + deviations · √n + 2 for n = part / total, about, rounded down."""
    text = (
        f"{{.reg .f32 n, s; cvt.rn.f32.u32 n, $1; rcp.approx.f32 n, n; mul.f32 n, n, {_hex(part)}; sqrt.approx.f32 s, "
        f"n; fma.rn.f32 n, s, {_hex(deviations)}, n; add.f32 n, n, {_hex(2)}; cvt.rzi.u32.f32 $0, n;}}"
    )
    return _asm(text, total, results="r", pure=True)


def how_many_reach(pairs):
    """How many of the (score, bound) have score ≥ bound.

    Counted in float32, 1.0 each: were it done with predicates, the compiler would keep them, and there are but seven.
    """
    counts = [_asm("set.ge.f32.f32 $0, $1, $2;", *pair, results="f", pure=True) for pair in pairs]
    while len(counts) > 1:
        counts = [
            _asm("add.f32 $0, $1, $2;", *pair, results="f", pure=True)
            for pair in zip(counts[::2], counts[1::2], strict=True)
        ]
    return _asm("cvt.rzi.u32.f32 $0, $1;", *counts, results="r", pure=True)


# Memory.


def load(address, offset=0):
    """An int32 of shared memory."""
    return _asm(f"ld.shared.b32 $0, [$1+{offset}];", address, results="r")


def load4(address, offset=0):
    """4 int32 of shared memory."""
    return _asm(f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];", address, results="rrrr")


def load_long(address, offset=0):
    """An int64 of shared memory."""
    return _asm(f"ld.shared.b64 $0, [$1+{offset}];", address, results="l")


def store(address, value, offset=0):
    """An int32 or int64 to shared memory."""
    bits = _value(value).type.width
    _asm(f"st.shared.b{bits} [$0+{offset}], $1;", address, value)


def store4(address, values, offset=0):
    """4 int32 to shared memory."""
    _asm(f"st.shared.v4.b32 [$0+{offset}], {{$1, $2, $3, $4}};", address, *values)


def store_if(condition, address, value):
    """An int32 to shared memory where the condition holds."""
    _asm("@$2 st.shared.b32 [$0], $1;", address, value, condition)


def store_pair_if_reaches(score, bound, number, address, distance):
    """Where score ≥ bound, stores it, and `number` `distance` bytes behind, and returns address + 4; else address."""
    text = (
        "{.reg .pred p; setp.ge.f32 p, $1, $2; mov.b32 $0, $4; @p st.shared.f32 [$4], $1; "
        f"@p st.shared.b32 [$4+{distance}], $3; @p add.u32 $0, $4, 4;}}"
    )
    return _asm(text, score, bound, number, address, results="r")


def count_if(condition, address):
    """Adds 1 to an int32 of shared memory, atomically."""
    _asm("@$1 red.shared.add.u32 [$0], 1;", address, condition)


def or_if(condition, address, bits):
    """Sets bits of an int32 of shared memory, atomically."""
    _asm("@$2 red.shared.or.b32 [$0], $1;", address, bits, condition)


def take_number(address):
    """Adds 1 to an int32 of shared memory, atomically, and returns what it was."""
    return _asm("atom.shared.add.u32 $0, [$1], 1;", address, results="r")


def load_gmem(address):
    """An int32 of global memory that nobody writes."""
    return _asm("ld.global.nc.b32 $0, [$1];", address, results="r")


def load_gmem_vector(address):
    """4 float32 of global memory that nobody writes, used once: they are not kept in the first-level cache."""
    return _asm("ld.global.nc.L1::no_allocate.v4.f32 {$0, $1, $2, $3}, [$4];", address, results="ffff")


def load_gmem_if(condition, address):
    """An int32 of global memory that nobody writes where the condition holds, else 0."""
    text = "{.reg .b32 x; mov.b32 x, 0; @$2 ld.global.nc.b32 x, [$1]; mov.b32 $0, x;}"
    return _asm(text, address, condition, results="r")


def load4_gmem_if(condition, address, otherwise):
    """4 int32 of global memory that nobody writes, used once, where the condition holds, else 4 × `otherwise`."""
    text = (
        f"{{.reg .b32 x<4>; mov.b32 x0, {otherwise}; mov.b32 x1, x0; mov.b32 x2, x0; mov.b32 x3, x0; "
        "@$5 ld.global.nc.L1::no_allocate.v4.b32 {x0, x1, x2, x3}, [$4]; "
        "mov.b32 $0, x0; mov.b32 $1, x1; mov.b32 $2, x2; mov.b32 $3, x3;}"
    )
    return _asm(text, address, condition, results="rrrr")


def read4_gmem(address, offset=0):
    """4 int32 of global memory that this kernel may have written."""
    return _asm(f"ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];", address, results="rrrr")


def store_gmem(address, value):
    """An int32 to global memory."""
    _asm("st.global.b32 [$0], $1;", address, value)


def store4_gmem(address, values, offset=0):
    """4 int32 to global memory."""
    _asm(f"st.global.v4.b32 [$0+{offset}], {{$1, $2, $3, $4}};", address, *values)


# Warps: all 32 lanes call these together.


def warp_sum_so_far(x):
    """The sum of `x` over this lane and those before it."""
    for distance in (1, 2, 4, 8, 16):
        text = (
            f"{{.reg .pred p; .reg .b32 t; shfl.sync.up.b32 t|p, $1, {distance}, 0, 0xffffffff; mov.b32 $0, $1; "
            "@p add.u32 $0, t, $1;}"
        )
        x = _asm(text, x, results="r", convergent=True)
    return x


def warp_last(x):
    """The last lane's `x`."""
    return _asm("shfl.sync.idx.b32 $0, $1, 31, 31, 0xffffffff;", x, results="r", convergent=True)


def warp_minimum(x):
    """The least `x` of the warp."""
    return _asm("redux.sync.min.u32 $0, $1, 0xffffffff;", x, results="r", convergent=True)


def warp_maximum(x):
    """The greatest `x` of the warp."""
    return _asm("redux.sync.max.u32 $0, $1, 0xffffffff;", x, results="r", convergent=True)


def warp_sum_f32(x):
    """The sum of the warp's float32, the same bits in all lanes."""
    for distance in (16, 8, 4, 2, 1):
        text = f"{{.reg .f32 t; shfl.sync.bfly.b32 t, $1, {distance}, 31, 0xffffffff; add.f32 $0, $1, t;}}"
        x = _asm(text, x, results="f", convergent=True)
    return x


def warp_maximum_f32(x):
    """The greatest float32 of the warp."""
    for distance in (16, 8, 4, 2, 1):
        text = f"{{.reg .f32 t; shfl.sync.bfly.b32 t, $1, {distance}, 31, 0xffffffff; max.f32 $0, $1, t;}}"
        x = _asm(text, x, results="f", convergent=True)
    return x


def warp_reserve(address, count, lane):
    """Adds the warp's `count` to an int32 of shared memory, atomically and once, and returns what it was."""
    text = (
        "{.reg .pred p; .reg .b32 t; mov.b32 t, 0; setp.eq.u32 p, $3, 31; @p atom.shared.add.u32 t, [$1], $2; "
        "shfl.sync.idx.b32 $0, t, 31, 31, 0xffffffff;}"
    )
    return _asm(text, address, count, lane, results="r", convergent=True)
