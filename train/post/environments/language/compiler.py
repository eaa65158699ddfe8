"""From text to instructions, in one pass: a recursive descent whose depth is bounded.

    program   = { "def" name "(" [name {"," name}] ")" block | statement }
    statement = name "=" expression ";" | "return" expression ";" | "while" expression block
              | "if" expression block ["else" block]
    block     = "{" {statement} "}"

Expressions are `or`, `and`, `not`, one comparison, `+ -`, `* / %`, `-`, calls, and items `x[i]`; values are integers,
strings "…" without escapes, and lists `[…]` of these. Blanks and line ends mean nothing.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_NESTING = 48  # of blocks and expressions: the compiler's own recursion
MAX_SOURCE = 10_000  # characters
MAX_DIGITS = 70  # of a number in the text

_TOKEN = re.compile(r'\s*(?:([a-z_][a-z0-9_]*)|([0-9]+)|"([^"\n]*)"|(==|!=|<=|>=|[-+*/%<>=(){}\[\],;]))')
_WORDS = frozenset(("def", "return", "while", "if", "else", "and", "or", "not"))
_COMPARISONS = ("==", "!=", "<=", ">=", "<", ">")


class ProgramError(Exception):
    """Says in one line why a program does not compile, or why it was stopped."""


class Instruction(NamedTuple):
    """One instruction of the machine: its name and its argument."""

    name: str
    argument: Any = None  # an integer, a string, or a name and a count


class Function(NamedTuple):
    """A function: the names of its parameters and where its instructions begin."""

    parameters: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class Program:
    """Instructions, the functions among them, and where the statements outside of functions begin."""

    instructions: tuple[Instruction, ...]
    functions: dict[str, Function]


class _Token(NamedTuple):
    kind: str  # "name", "number", "text", "sign" or "end"
    value: str


def _tokens(source: str) -> list[_Token]:
    """Splits a source into tokens; the last one is the end."""
    tokens, at, end = [], 0, len(source.rstrip())
    while at < end:
        match = _TOKEN.match(source, at)
        if match is None:
            raise ProgramError(f"no word of the language at character {at + 1}: {source[at : at + 10]!r}")
        name, number, text, sign = match.groups()
        kind = "name" if name else "number" if number else "sign" if sign else "text"
        value = name or number or sign or text
        tokens.append(_Token("sign" if value in _WORDS and kind == "name" else kind, value))
        at = match.end()
    return [*tokens, _Token("end", "the end")]


@dataclass
class _Compiler:
    """Reads tokens from the left and writes instructions; jumps are filled in when their target is known."""

    tokens: list[_Token]
    at: int = 0
    depth: int = 0
    code: list[Instruction] = field(default_factory=list)
    functions: dict[str, Function] = field(default_factory=dict)

    def sees(self, *values: str) -> bool:
        token = self.tokens[self.at]
        return token.kind == "sign" and token.value in values

    def take(self) -> _Token:
        token = self.tokens[self.at]
        self.at += token.kind != "end"
        return token

    def takes(self, *values: str) -> str:
        """Takes one of these signs if it is next, and says which."""
        return self.take().value if self.sees(*values) else ""

    def expect(self, value: str) -> None:
        if not self.takes(value):
            raise ProgramError(f"expected {value!r}, got {self.tokens[self.at].value[:20]!r}")

    def name(self) -> str:
        token = self.take()
        if token.kind != "name":
            raise ProgramError(f"expected a name, got {token.value[:20]!r}")
        return token.value

    def write(self, name: str, argument: Any = None) -> int:
        self.code.append(Instruction(name, argument))
        return len(self.code) - 1

    def land(self, jump: int) -> None:
        """Lets a jump that was written before lead to here."""
        self.code[jump] = Instruction(self.code[jump].name, len(self.code))

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise ProgramError(f"blocks and expressions nest deeper than {MAX_NESTING}")

    def program(self) -> None:
        while self.tokens[self.at].kind != "end":
            if self.takes("def"):
                self.function()
            else:
                self.statement()
        self.write("stop")

    def function(self) -> None:
        name = self.name()
        if name in self.functions:
            raise ProgramError(f"{name} is defined twice")
        over = self.write("jump")
        self.expect("(")
        parameters = []
        while not self.takes(")"):
            parameters.append(self.name())
            if not self.sees(")"):
                self.expect(",")
        if len(set(parameters)) < len(parameters):
            raise ProgramError(f"{name} has two parameters of one name")
        self.functions[name] = Function(tuple(parameters), len(self.code))
        self.block()
        self.write("constant", 0)
        self.write("return")
        self.land(over)

    def block(self) -> None:
        self.deeper()
        self.expect("{")
        while not self.takes("}"):
            self.statement()
        self.depth -= 1

    def statement(self) -> None:
        if self.takes("return"):
            self.expression()
            self.write("return")
            self.expect(";")
        elif self.takes("while"):
            start = len(self.code)
            self.expression()
            out = self.write("jump_if_false")
            self.block()
            self.write("jump", start)
            self.land(out)
        elif self.takes("if"):
            self.branch()
        else:
            name = self.name()
            self.expect("=")
            self.expression()
            self.write("store", name)
            self.expect(";")

    def branch(self) -> None:
        self.expression()
        otherwise = self.write("jump_if_false")
        self.block()
        if self.takes("else"):
            out = self.write("jump")
            self.land(otherwise)
            self.block()
            self.land(out)
        else:
            self.land(otherwise)

    def expression(self) -> None:
        self.deeper()
        self.short("or", "jump_if_true_or_pop")
        self.depth -= 1

    def short(self, word: str, jump: str) -> None:
        """Compiles `or`, and `and` within: the right side is not run where the left one decides."""
        side = self.negation if word == "and" else lambda: self.short("and", "jump_if_false_or_pop")
        side()
        jumps = []
        while self.takes(word):
            jumps.append(self.write(jump))
            side()
        for each in jumps:
            self.land(each)

    def negation(self) -> None:
        self.deeper()
        if self.takes("not"):
            self.negation()
            self.write("not")
        else:
            self.sum()
            if sign := self.takes(*_COMPARISONS):
                self.sum()
                self.write("binary", sign)
        self.depth -= 1

    def sum(self) -> None:
        self.product()
        while sign := self.takes("+", "-"):
            self.product()
            self.write("binary", sign)

    def product(self) -> None:
        self.factor()
        while sign := self.takes("*", "/", "%"):
            self.factor()
            self.write("binary", sign)

    def factor(self) -> None:
        self.deeper()
        if self.takes("-"):
            self.factor()
            self.write("negative")
        else:
            self.atom()
            while self.takes("["):
                self.expression()
                self.expect("]")
                self.write("item")
        self.depth -= 1

    def atom(self) -> None:
        if self.takes("("):
            self.expression()
            self.expect(")")
        elif self.takes("["):
            self.write("list", self.several("]"))
        else:
            token = self.take()
            if token.kind == "number":
                if len(token.value) > MAX_DIGITS:
                    raise ProgramError(f"a number has at most {MAX_DIGITS} digits, got {len(token.value)}")
                self.write("constant", int(token.value))
            elif token.kind == "text":
                self.write("constant", token.value)
            elif token.kind != "name":
                raise ProgramError(f"expected a value, got {token.value[:20]!r}")
            elif self.takes("("):
                self.write("call", (token.value, self.several(")")))
            else:
                self.write("load", token.value)

    def several(self, end: str) -> int:
        """Compiles expressions between commas up to a closing sign, and counts them."""
        count = 0
        while not self.takes(end):
            self.expression()
            count += 1
            if not self.sees(end):
                self.expect(",")
        return count


@functools.lru_cache(256)  # one program runs on many inputs
def compile_program(source: str) -> Program:
    """Compiles a source.

    Raises:
      ProgramError: if the source is no program, or is too long or too deep to be compiled.
    """
    if len(source) > MAX_SOURCE:
        raise ProgramError(f"a program has at most {MAX_SOURCE} characters, got {len(source)}")
    compiler = _Compiler(_tokens(source))
    compiler.program()
    return Program(tuple(compiler.code), compiler.functions)
