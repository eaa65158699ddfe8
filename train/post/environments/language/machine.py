"""A stack machine that runs compiled programs under limits and can do nothing else.

Values are integers, strings and tuples of these, and no value ever changes, so none can hold itself. A program has no
files, no clock, no imports and no attributes. What it may use is counted before it is used: instructions, the bits of
an integer, the length of a string or list, the depth of calls, and all that is made in the whole run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from train.checks import check_integer
from train.post.environments.language.compiler import Program, ProgramError, compile_program

Value = int | str | tuple[int | str, ...]
_ORDERED = ("<", ">", "<=", ">=")


@dataclass(frozen=True)
class Limits:
    """The most that one run may use; a run at all of these limits takes a fraction of a second.

    Args:
      steps: Instructions.
      bits: Of an integer.
      length: Characters of a string, entries of a list.
      memory: Characters and entries of all strings and lists that the run makes, together.
      depth: Calls within calls.
    """

    steps: int = 10_000
    bits: int = 256
    length: int = 1_000
    memory: int = 200_000
    depth: int = 64

    def __post_init__(self):
        for each in fields(self):
            check_integer(f"limits.{each.name}", getattr(self, each.name))
        check_integer("limits.bits", self.bits, most=4096)  # Python refuses to write much longer ones


@dataclass(frozen=True)
class Outcome:
    """Holds what a run left.

    Args:
      value: What the function that was called returned, or None.
      variables: The variables outside of functions; empty after an error.
      steps: Instructions that ran.
      error: Why the program was stopped, in one line; empty if it ran to its end.
    """

    value: Value | None = None
    variables: Mapping[str, Value] = field(default_factory=dict)
    steps: int = 0
    error: str = ""


@dataclass
class _Frame:
    """A call that is not over: its variables, and where its caller goes on."""

    variables: dict[str, Value]
    back: int


class _Machine:
    """One run."""

    def __init__(self, program: Program, limits: Limits):
        self.program, self.limits = program, limits
        self.stack: list[Value] = []
        self.steps, self.made = 0, 0

    def run(self, at: int, frame: _Frame) -> Value | None:
        """Runs from an instruction until the first frame returns (its value) or the program stops (None)."""
        self.frames = [frame]
        while True:
            self.steps += 1
            if self.steps > self.limits.steps:
                raise ProgramError(f"more than {self.limits.steps} steps")
            name, argument = self.program.instructions[at]
            at += 1
            match name:
                case "constant":
                    self.stack.append(self.checked(argument))
                case "load":
                    self.stack.append(self.load(argument))
                case "store":
                    self.frames[-1].variables[argument] = self.stack.pop()
                case "binary":
                    right, left = self.stack.pop(), self.stack.pop()
                    self.stack.append(self.checked(self.binary(argument, left, right)))
                case "negative":
                    self.stack.append(-self.whole(self.stack.pop()))
                case "not":
                    self.stack.append(int(not self.stack.pop()))
                case "item":
                    index, held = self.stack.pop(), self.stack.pop()
                    self.stack.append(self.item(held, index))
                case "list":
                    self.stack.append(self.checked(self.listed(argument)))
                case "jump":
                    at = argument
                case "jump_if_false":
                    at = at if self.stack.pop() else argument
                case "jump_if_false_or_pop" | "jump_if_true_or_pop":
                    if bool(self.stack[-1]) == (name == "jump_if_true_or_pop"):
                        at = argument
                    else:
                        self.stack.pop()
                case "call":
                    at = self.call(*argument, at)
                case "return":
                    at = self.frames.pop().back
                    if not self.frames:
                        return self.stack.pop()
                case "stop":
                    return None

    def checked(self, value: Value) -> Value:
        """Lets a value that is small enough pass, and counts what it takes."""
        if isinstance(value, int):
            if value.bit_length() > self.limits.bits:
                raise ProgramError(f"an integer of more than {self.limits.bits} bits")
            return value
        if len(value) > self.limits.length:
            raise ProgramError(f"a string or list longer than {self.limits.length}")
        self.made += len(value)
        if self.made > self.limits.memory:
            raise ProgramError(f"more than {self.limits.memory} characters and entries made")
        return value

    def whole(self, value: Value) -> int:
        if not isinstance(value, int):
            raise ProgramError(f"expected an integer, got a {_kind(value)}")
        return value

    def load(self, name: str) -> Value:
        if name not in self.frames[-1].variables:
            raise ProgramError(f"{name[:20]} has no value")
        return self.frames[-1].variables[name]

    def listed(self, count: int) -> Value:
        entries = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return tuple(self.entry(each) for each in entries)

    def entry(self, value: Value) -> int | str:
        if isinstance(value, tuple):
            raise ProgramError("a list cannot hold a list")
        return value

    def item(self, held: Value, index: Value) -> Value:
        at = self.whole(index)
        if isinstance(held, int):
            raise ProgramError("an integer has no items")
        if not 0 <= at < len(held):
            raise ProgramError(f"no item {_brief(at)} of {len(held)}")
        return held[at]

    def call(self, name: str, count: int, at: int) -> int:
        """Calls what is built in, or goes to the function; returns the next instruction."""
        if name in ("len", "str") and name not in self.program.functions:
            if count != 1:
                raise ProgramError(f"{name} takes 1 value, got {count}")
            value = self.stack.pop()
            self.stack.append(self.checked(self.length(value) if name == "len" else self.text(value)))
            return at
        if name not in self.program.functions:
            raise ProgramError(f"no function {name[:20]}")
        parameters, start = self.program.functions[name]
        if count != len(parameters):
            raise ProgramError(f"{name[:20]} takes {len(parameters)} values, got {count}")
        if len(self.frames) >= self.limits.depth:
            raise ProgramError(f"calls nest deeper than {self.limits.depth}")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        self.frames.append(_Frame(dict(zip(parameters, values, strict=True)), at))
        return start

    def length(self, value: Value) -> int:
        if isinstance(value, int):
            raise ProgramError("an integer has no length")
        return len(value)

    def text(self, value: Value) -> str:
        if isinstance(value, tuple):
            raise ProgramError("a list has no text")
        return str(value)

    def binary(self, sign: str, left: Value, right: Value) -> Value:
        if sign == "==":
            return int(left == right)
        if sign == "!=":
            return int(left != right)
        if isinstance(left, int) and isinstance(right, int):
            return self.numbers(sign, left, right)
        if sign == "+" and (isinstance(left, str) and isinstance(right, str)):
            return left + right  # at most twice as long as one may be
        if sign == "+" and (isinstance(left, tuple) and isinstance(right, tuple)):
            return left + right
        if isinstance(left, str) and isinstance(right, str) and sign in _ORDERED:
            return int({"<": left < right, ">": left > right, "<=": left <= right, ">=": left >= right}[sign])
        raise ProgramError(f"cannot compute {_kind(left)} {sign} {_kind(right)}")

    def numbers(self, sign: str, left: int, right: int) -> int:
        """Computes with integers that are at most `bits` long, so no result is longer than twice that."""
        match sign:
            case "+":
                return left + right
            case "-":
                return left - right
            case "*":
                return left * right
            case "<":
                return int(left < right)
            case ">":
                return int(left > right)
            case "<=":
                return int(left <= right)
            case ">=":
                return int(left >= right)
        if right == 0:
            raise ProgramError(f"{sign} by zero")
        return left // right if sign == "/" else left % right


def _kind(value: Value) -> str:
    return "integer" if isinstance(value, int) else "string" if isinstance(value, str) else "list"


def _brief(number: int) -> str:
    return str(number) if abs(number) < 10**9 else "beyond it"


def run(source: str, variables: Mapping[str, Value] | None = None, *, limits: Limits = Limits()) -> Outcome:
    """Runs the statements of a source that stand outside of functions.

    Never raises for what the source is or does: an outcome with an error says why it was stopped.
    """
    try:
        machine = _Machine(compile_program(source), limits)
    except ProgramError as error:
        return Outcome(error=str(error))
    frame = _Frame(dict(variables or {}), 0)
    try:
        value = machine.run(0, frame)
    except ProgramError as error:
        return Outcome(steps=machine.steps, error=str(error))
    return Outcome(value=value, variables=frame.variables, steps=machine.steps)


def call(source: str, name: str, arguments: Sequence[Value], *, limits: Limits = Limits()) -> Outcome:
    """Calls a function of a source with values; statements outside of functions do not run.

    Never raises for what the source is or does: an outcome with an error says why it was stopped.
    """
    try:
        program = compile_program(source)
    except ProgramError as error:
        return Outcome(error=str(error))
    if name not in program.functions:
        return Outcome(error=f"no function {name}")
    parameters, start = program.functions[name]
    if len(parameters) != len(arguments):
        return Outcome(error=f"{name} takes {len(parameters)} values, got {len(arguments)}")
    machine = _Machine(program, limits)
    try:
        value = machine.run(start, _Frame(dict(zip(parameters, arguments, strict=True)), 0))
    except ProgramError as error:
        return Outcome(steps=machine.steps, error=str(error))
    return Outcome(value=value, steps=machine.steps)
