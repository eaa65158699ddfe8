"""Adds up what a device's program costs: bytes alive at once, bytes sent by kind of collective, products.

Memory is a walk over the operations in their order. XLA's fusion is modelled by one rule: an elementwise result is
written to memory only if something other than elementwise operations and reductions reads it, or a block returns it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from dsa_jax.parallel.expert_parallel import CAPACITY_FACTOR
from train.planner.trace import COLLECTIVES, KERNEL, Block, Op, Program, nbytes, program_of

REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"}
FUSED = set(
    "abs add add_any and broadcast_in_dim ceil clamp concatenate convert_element_type copy cos div dynamic_slice eq "
    "erf exp exp2 expand_dims expm1 floor gather ge gt integer_pow iota is_finite le log log1p logistic lt max min mul "
    "ne neg not or pad pow reduce_precision rem rev round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin slice split sqrt square stack sub tanh unstack xor".split()
)
SELECTING = {"dynamic_slice", "gather", "slice", "split"}  # read no more than they give
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add", "swap", "addupdate"}
MIN_LAYER_ARRAYS = 10  # that a loop over layers scans over; other loops have six or fewer


# Memory


def peak_bytes(program: Program) -> int:
    """Counts the most bytes that the program's values take at once, beside its inputs."""
    return _peak(program, program.block, frozenset())


def _peak(program: Program, block: Block, owned: frozenset[int]) -> int:
    """Counts the most bytes alive at once of a block's values, and of the inputs `owned`, which it may free."""
    sizes, ops = program.sizes, block.ops
    written = _written(block)
    reads = _reads(block, written)
    last = {value: i for i, values in enumerate(reads) for value in values}
    last |= dict.fromkeys(_sources(block, written)(block.outputs), len(ops))
    freeable = written | owned
    live = peak = sum(sizes[value] for value in owned)
    for i, op in enumerate(ops):
        made = [value for value in op.outputs if value in written]
        if not made and op.name in FUSED:
            continue
        dying = [value for value in reads[i] if value in freeable and last[value] == i]
        reused = _reused(op, made, dying, sizes)
        live += sum(sizes[value] for value in made) - sum(sizes[value] for value in reused)
        peak = max(peak, live + _workspace(program, op))
        unread = [value for value in made if value not in last]
        live -= sum(sizes[value] for value in dying if value not in reused) + sum(sizes[value] for value in unread)
    return peak


def _written(block: Block) -> set[int]:
    """Finds the values in memory: results of operations that do not fuse, and elementwise ones that those read."""
    made_by = {value: op for op in block.ops for value in op.outputs}
    written = {value for value, op in made_by.items() if op.name not in FUSED}
    for op in block.ops:
        if op.name not in FUSED and op.name not in REDUCTIONS:
            written |= {value for value in op.inputs if value in made_by}
    return written


def _sources(block: Block, written: set[int]) -> Callable[..., set[int]]:
    """Makes a function from values to those that must be in memory to have them."""
    made_by = {value: op for op in block.ops for value in op.outputs}

    @functools.cache
    def of(value):
        if value in written or value not in made_by:
            return frozenset([value])
        return frozenset().union(*(of(each) for each in made_by[value].inputs if each is not None))

    return lambda values: set().union(*(of(value) for value in values if value is not None))


def _reads(block: Block, written: set[int]) -> list[set[int]]:
    """Lists the values that each operation reads from memory; none where its result is not written."""
    sources = _sources(block, written)
    lazy = lambda op: op.name in FUSED and not written.intersection(op.outputs)  # noqa: E731
    return [set() if lazy(op) else sources(op.inputs) for op in block.ops]


def _reused(op: Op, made: list[int], dying: list[int], sizes: list[int]) -> set[int]:
    """Finds the inputs that are read last by an operation and whose memory its results take."""
    if op.name in ("scan", "while"):
        carried = op.inputs[op.consts : op.consts + op.carries]
        return {value for value in carried if value in dying and carried.count(value) == 1}
    if op.name not in FUSED and op.name not in IN_PLACE:
        return set()
    free, reused = list(dying), set()
    for value in made:
        same = next((each for each in free if sizes[each] == sizes[value]), None)
        if same is not None:
            free.remove(same)
            reused.add(same)
    return reused


def _workspace(program: Program, op: Op) -> int:
    """Counts bytes that an operation needs while it runs, beside its arguments and results."""
    if op.name == KERNEL:
        return _kernel_workspace(op.params["pallas"], *((x.shape, x.dtype) for x in op.shapes))
    if op.name == "cond":
        results = sum(program.sizes[value] for value in op.outputs)
        return max(max(0, _peak(program, block, frozenset()) - results) for block in op.blocks)
    if op.name in ("scan", "while"):
        return _loop_workspace(program, op, op.blocks[0])
    return 0


def _loop_workspace(program: Program, op: Op, body: Block) -> int:
    """Counts bytes of a step beside the carry. Slices of scanned arrays are read where they are, if that fuses."""
    split = op.consts + op.carries
    carries = frozenset(body.inputs[op.consts : split])
    slices = [Op("slice", [], [value], {}, [], []) for value in body.inputs[split:]]
    body = Block([*slices, *body.ops], body.inputs[:split], body.outputs)
    return max(0, _peak(program, body, carries) - sum(program.sizes[value] for value in carries))


@functools.lru_cache(maxsize=256)
def _kernel_workspace(kernel: Callable, *arguments: tuple) -> int:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    program = program_of(jax.make_jaxpr(kernel)(*shapes), {})
    results = sum(program.sizes[value] for value in program.block.outputs if value is not None)
    return max(0, peak_bytes(program) - results)


# What is done how often


@dataclasses.dataclass(frozen=True)
class Done:
    """Describes an operation that runs: the values its block writes, its times a step, the kind of its layers."""

    op: Op
    written: frozenset[int]
    times: float
    layers: str | None


def executed(program: Program, loops: Mapping[str, list[Op]]) -> Iterator[Done]:
    """Yields every operation that runs, inside loops too; `loops` are those over layers by kind.

    Of a choice the branch with the fewest products is counted, which is what training takes: cotangents of a mean are
    equal, so the indexer's gradients need no second pass. How often a loop runs whose end depends on the data is
    `trace.expected_trips`.
    """
    kinds = {id(op): kind for kind, ops in loops.items() for op in ops}
    return _executed(program.block, 1, None, kinds)


def written_values(block: Block) -> frozenset[int]:
    """Finds the values that a block writes to memory; of a loop's or a choice's own blocks, none."""
    return frozenset(_written(block))


def fewest_products(choice: Op) -> Block:
    """Gives the branch of a choice that is counted: see `executed`."""
    return min(choice.blocks, key=_products)


def _executed(block: Block, times: float, layers: str | None, kinds: Mapping[int, str]) -> Iterator[Done]:
    written = written_values(block)
    for op in block.ops:
        if op.name == "cond":
            yield from _executed(fewest_products(op), times, layers, kinds)
        elif op.blocks:
            yield from _executed(op.blocks[0], times * op.trips, kinds.get(id(op), layers), kinds)
        else:
            yield Done(op, written, times, layers)


def _products(block: Block) -> int:
    inner = sum(_products(each) for op in block.ops for each in op.blocks)
    return inner + sum(op.name in ("dot_general", KERNEL) for op in block.ops)


def layer_loops(program: Program, kinds: Sequence[str], backward: Sequence[str]) -> dict[str, list[Op]]:
    """Finds the loops over layers of each kind: they alone scan over as many arrays as a layer has parameters.

    `kinds` has the kind of each stack, in the order of the layers, and `backward` that of those through which gradients
    flow; the loops follow the first forward, and then the second in reverse.
    """
    found, order = list(_layer_loops(program.block)), [*kinds, *reversed(backward)]
    if len(found) != len(order):
        raise ValueError(f"expected {len(order)} loops over layers, got {len(found)}")
    return {kind: [op for op, each in zip(found, order, strict=True) if each == kind] for kind in dict.fromkeys(kinds)}


def _layer_loops(block: Block) -> Iterator[Op]:
    for op in block.ops:
        if op.name == "scan":
            if len(op.inputs) - op.consts - op.carries >= MIN_LAYER_ARRAYS:
                yield op
            else:
                yield from _layer_loops(op.blocks[0])


def kept_bytes(program: Program, loop: Op) -> int:
    """Counts bytes that a forward loop over layers keeps of all of them for the backward."""
    return sum(program.sizes[value] for value in loop.outputs[loop.carries :])


@dataclasses.dataclass(frozen=True)
class Collective:
    """Describes a collective of a group of devices: its kind, the axes it spans, the bytes that each device sends."""

    kind: str
    axes: tuple[str, ...]
    sent: float


def collective(program: Program, op: Op) -> Collective | None:
    """Counts what an operation sends in a ring (all-to-all: directly); None if it is no collective, or of one device.

    A ragged all-to-all sends what even routing fills of its buffer, 1 / CAPACITY_FACTOR of it.
    """
    if op.name not in COLLECTIVES:
        return None
    axes = op.params.get("axes") or op.params["axis_name"]
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    count = math.prod(program.shape[axis] for axis in axes)
    given, taken = sum(map(nbytes, op.shapes)), sum(map(nbytes, op.results))
    share = (count - 1) / count
    sent = {
        "all_gather": taken * share,
        "reduce_scatter": given * share,
        "all_to_all": given * share,
        "ragged_all_to_all": taken * share / CAPACITY_FACTOR,
    }.get(op.name, 2 * given * share)
    return Collective(COLLECTIVES[op.name], axes, sent) if count > 1 else None


def traffic(program: Program, done: Done) -> int:
    """Counts bytes of memory that an operation reads and writes; of an elementwise one if its result is written."""
    op = done.op
    made = [value for value in op.outputs if value in done.written]
    if op.name in FUSED and not made:
        return 0
    if op.name in IN_PLACE:  # reads what it adds and what it adds it to, and writes the sum
        return 3 * nbytes(op.shapes[2 if op.name.startswith("scatter") else 1])
    written = sum(program.sizes[value] for value in made)
    return 2 * written if op.name in SELECTING else written + sum(map(nbytes, op.shapes))


def flops_of_product(op: Op) -> float:
    """Counts 2 · the results' elements · the length of the sums of a `dot_general`."""
    (contracted, _), _ = op.params["dimension_numbers"]
    left = op.shapes[0].shape
    return 2 * math.prod(op.results[0].shape) * math.prod(left[axis] for axis in contracted)
