"""A small language that cannot reach anything: integers, strings and lists that never change."""

from train.post.environments.language.compiler import MAX_NESTING, Function, Program, ProgramError, compile_program
from train.post.environments.language.machine import Limits, Outcome, call, run

__all__ = [
    "MAX_NESTING",
    "Function",
    "Limits",
    "Outcome",
    "Program",
    "ProgramError",
    "call",
    "compile_program",
    "run",
]
