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
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place, and which operand is written
NO_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")

_INSTRUCTION = re.compile(r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|[sufc]\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")


@dataclasses.dataclass(frozen=True)
class Array:
    """Describes an array: the bytes of a number, and its dimensions."""

    itemsize: float
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of its numbers."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """The bytes that it takes."""
        return self.size * self.itemsize


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Holds an instruction: what it is called and does, its results, the names of what it reads, and all else as text.

    The text between its parentheses is `arguments`: of a parameter its number, of a constant its value.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    flops: float = 0.0  # of a product by a library

    @property
    def bytes(self) -> float:
        """The bytes of its results."""
        return sum(array.bytes for array in self.results)

    @property
    def op_name(self) -> str:
        """The place where it was traced, empty if it is not said."""
        return self._quoted("op_name")

    @property
    def target(self) -> str:
        """The function of a custom call, else empty."""
        return self._quoted("custom_call_target")

    def called(self, *names: str) -> list[str]:
        """Lists the computations that it names as `calls=`, `body=` and so on."""
        found = re.findall(rf"\b(?:{'|'.join(names)})=(?:%?([\w.-]+)|\{{([^}}]*)\}})", self.attributes)
        return [name.strip().lstrip("%") for one, many in found for name in ([one] if one else many.split(","))]

    def _quoted(self, name: str) -> str:
        found = re.search(rf'\b{name}="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Holds a computation's instructions by name, in their order, and its root."""

    instructions: Mapping[str, Instruction]
    root: str

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


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
    names = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, opcode, _arrays(rest[:shape_end]), names, arguments, attributes)


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
    return float(sum(array.bytes for array in _arrays(shape)))


def _arrays(shape: str) -> tuple[Array, ...]:
    found = _SHAPE.findall(shape)
    return tuple(Array(_item_bytes(kind), tuple(map(int, filter(None, dims.split(","))))) for kind, dims in found)


def _item_bytes(kind: str) -> float:
    return ITEM_BYTES.get(kind) or int(re.search(r"\d+", kind)[0]) / 8  # pyright: ignore[reportOptionalSubscript]


def traffic(program: Mapping[str, Computation]) -> Iterator[tuple[Instruction, float]]:
    """Yields the instructions that a device runs, each with the bytes that it must read and write once."""
    every = [each for computation in program.values() for each in computation]
    fused = {name for each in every if each.opcode == "fusion" for name in each.called("calls")}
    for name, computation in program.items():
        if name in fused:
            continue
        for each in computation:
            if each.opcode not in NO_TRAFFIC:
                counted = dataclasses.replace(each, flops=_flops(computation, each))
                yield counted, moved_bytes(program, computation, each)


def _flops(computation: Computation, each: Instruction) -> float:
    """Counts 2 · batch · M · N · K of a library's product, from the elements of its three arrays."""
    operands = [computation.instructions[name] for name in each.operands if name in computation.instructions]
    if "gemm" not in each.target or len(operands) < 2:
        return 0.0
    shapes = [x.results[0].dims for x in (operands[0], operands[1], each)]
    batch = shapes[2][0] if all(len(dims) > 2 and dims[0] == shapes[2][0] for dims in shapes) else 1
    # The elements are B·M·K, B·K·N and B·M·N.
    return 2 * math.sqrt(math.prod(map(math.prod, shapes)) / batch)


def moved_bytes(program: Mapping[str, Computation], computation: Computation, each: Instruction) -> float:
    """Counts bytes that an instruction reads and writes, of what is sliced or updated in place only that part."""
    inside = [name for name in each.called("calls") if name in program]
    if inside:
        return _fusion_bytes(program[inside[0]])
    made = computation.instructions
    sizes = [made[operand].bytes for operand in each.operands if operand in made]
    if each.opcode in SLICING:
        return 2 * each.bytes
    if each.opcode in UPDATES:
        return 2 * sizes[UPDATES[each.opcode]]
    return each.bytes + sum(sizes)


def _fusion_bytes(fused: Computation) -> float:
    users: dict[str, list[Instruction]] = {}
    for each in fused:
        for operand in each.operands:
            users.setdefault(operand, []).append(each)
    read = 0.0
    for each in fused:
        if each.opcode == "parameter":
            read += min(_read(each.name, users), each.bytes)
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
    if each.opcode in UPDATES:
        return fused.instructions[each.operands[UPDATES[each.opcode]]].bytes
    return each.bytes
