"""Counts the bytes that each instruction of a compiled program must read and write, from its text.

XLA's own count takes a loop's stacked arrays as read whole in each of its steps. Here an operand of which a fusion
takes a slice counts as the slice, and an update in place as what is written.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}  # the others have their bits in names
SLICING = ("dynamic-slice", "slice", "gather")
NO_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")

_INSTRUCTION = re.compile(r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|[sufc]\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Holds an instruction: what it is called and does, its result's arrays, its operands, where it was traced."""

    name: str
    opcode: str
    bytes: float  # of the result
    operands: tuple[str, ...]
    calls: str | None  # the computation of a fusion
    op_name: str
    number: int | None  # of a parameter
    shape: str  # of the result
    target: str  # of a custom call
    flops: float = 0.0  # of a product by a library


@dataclasses.dataclass(frozen=True)
class Computation:
    """Holds a computation's instructions by name, and its root."""

    instructions: Mapping[str, Instruction]
    root: str


def parse(text: str) -> dict[str, Computation]:
    """Reads the computations of a program's text, as `compiled.as_text()` gives it."""
    found, name, instructions, root = {}, None, {}, ""
    for line in text.splitlines():
        if begun := _COMPUTATION.match(line):
            name, instructions, root = begun[1], {}, ""
        elif line.startswith("}") and name:
            found[name], name = Computation(instructions, root), None
        elif name and (match := _INSTRUCTION.match(line)):
            each = _instruction(match["name"], match["rest"])
            instructions[each.name] = each
            root = each.name if match["root"] else root
    return found


def _instruction(name: str, rest: str) -> Instruction:
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, after = rest[shape_end:].lstrip().partition("(")
    end = _closing("(" + after, 0) - 1
    arguments, attributes = after[:end], after[end:]
    calls = re.search(r"calls=%?([\w.\-]+)", attributes)
    op_name = re.search(r'op_name="([^"]*)"', attributes)
    target = re.search(r'custom_call_target="([^"]*)"', attributes)
    return Instruction(
        name,
        opcode,
        array_bytes(rest[:shape_end]),
        tuple(re.findall(r"%([\w.\-]+)", arguments)),
        calls[1] if calls else None,
        op_name[1] if op_name else "",
        int(arguments) if opcode == "parameter" else None,
        rest[:shape_end],
        target[1] if target else "",
    )


def _closing(text: str, start: int) -> int:
    """Finds the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"expected a closing parenthesis, got {text[start : start + 80]!r}")


def array_bytes(shape: str) -> float:
    """Counts the bytes of all arrays in a shape's text.

    Examples:
      >>> array_bytes("(bf16[2,3]{1,0}, f32[], pred[5]{0})")
      21.0
    """
    return float(
        sum(
            _item_bytes(kind) * math.prod(map(int, filter(None, dims.split(","))))
            for kind, dims in _SHAPE.findall(shape)
        )
    )


def _item_bytes(kind: str) -> float:
    return ITEM_BYTES.get(kind) or int(re.search(r"\d+", kind)[0]) / 8  # pyright: ignore[reportOptionalSubscript]


def traffic(program: Mapping[str, Computation]) -> Iterator[tuple[Instruction, float]]:
    """Yields the instructions that a device runs, each with the bytes that it must read and write once."""
    fused = {each.calls for c in program.values() for each in c.instructions.values() if each.opcode == "fusion"}
    for name, computation in program.items():
        if name in fused:
            continue
        for each in computation.instructions.values():
            if each.opcode not in NO_TRAFFIC:
                counted = dataclasses.replace(each, flops=_flops(computation, each))
                yield counted, _bytes(program, computation, each)


def _flops(computation: Computation, each: Instruction) -> float:
    """Counts 2 · batch · M · N · K of a library's product, from the elements of its three arrays."""
    operands = [computation.instructions[name] for name in each.operands if name in computation.instructions]
    if "gemm" not in each.target or len(operands) < 2:
        return 0.0
    shapes = [_dims(x.shape) for x in (operands[0], operands[1], each)]
    batch = shapes[2][0] if all(len(dims) > 2 and dims[0] == shapes[2][0] for dims in shapes) else 1
    # The elements are B·M·K, B·K·N and B·M·N.
    return 2 * math.sqrt(math.prod(map(math.prod, shapes)) / batch)


def _dims(shape: str) -> list[int]:
    """Reads the dimensions of a shape's first array."""
    found = _SHAPE.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _bytes(program, computation, each: Instruction) -> float:
    sizes = [
        computation.instructions[operand].bytes for operand in each.operands if operand in computation.instructions
    ]
    if each.opcode == "fusion" and each.calls in program:
        return _fusion_bytes(program[each.calls], sizes)
    if each.opcode in SLICING:
        return 2 * each.bytes
    if each.opcode == "dynamic-update-slice":
        return 2 * sizes[1]
    return each.bytes + sum(sizes)


def _fusion_bytes(fused: Computation, sizes: list[float]) -> float:
    users: dict[str, list[Instruction]] = {}
    for each in fused.instructions.values():
        for operand in each.operands:
            users.setdefault(operand, []).append(each)
    read = 0.0
    for each in fused.instructions.values():
        if each.number is not None:
            read += min(_read(each.name, users), sizes[each.number] if each.number < len(sizes) else math.inf)
    return read + _written(fused, fused.root)


def _read(name: str, users: Mapping[str, list[Instruction]]) -> float:
    """Counts the bytes that are read of a parameter: all of it, unless every use is of slices or an update in place."""
    total = 0.0
    for user in users.get(name, []):
        if user.opcode in SLICING and user.operands[0] == name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode == "bitcast":
            total += _read(user.name, users)
        else:
            return math.inf
    return total


def _written(fused: Computation, name: str) -> float:
    each = fused.instructions[name]
    if each.opcode == "tuple":
        return sum(_written(fused, operand) for operand in each.operands)
    if each.opcode == "bitcast":
        return _written(fused, each.operands[0])
    if each.opcode == "dynamic-update-slice":
        return fused.instructions[each.operands[1]].bytes
    return each.bytes
