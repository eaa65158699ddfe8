"""The command `python -m train`, also called `dsa-train`: trains, or runs the subcommand that it begins with."""

import difflib
import sys
from collections.abc import Callable, Sequence

type Command = Callable[[Sequence[str]], object]


def _train(arguments: Sequence[str]) -> None:
    from train.commands import arguments as training

    training.main(arguments)


def _plan(arguments: Sequence[str]) -> None:
    from train import planner

    (planner.serving_main if "--serve" in arguments else planner.main)(arguments)


def _preset(arguments: Sequence[str]) -> None:
    from train import presets

    presets.main(arguments)


def _evaluate(arguments: Sequence[str]) -> None:
    from train.commands import evaluate as evaluate_command

    evaluate_command.main(arguments)


def _overlap(arguments: Sequence[str]) -> None:
    from train.commands import overlap

    overlap.main(arguments)


def _report(arguments: Sequence[str]) -> None:
    from train.commands import report

    report.main(arguments)


def _tokenize(arguments: Sequence[str]) -> None:
    from train.data import tokenize_command

    tokenize_command.main(arguments)


def _post(arguments: Sequence[str]) -> None:
    from train.post import command

    command.main(arguments)


COMMANDS: dict[str, Command] = {
    "train": _train,
    "plan": _plan,
    "preset": _preset,
    "tokenize": _tokenize,
    "evaluate": _evaluate,
    "overlap": _overlap,
    "report": _report,
    "post": _post,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input becomes one line on stderr and exit status 2, a diverged loss status 1."""
    from train.commands.command import run_command  # here: the workers of tokenize import this module, and need no JAX

    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        return run_command(lambda: COMMANDS[given[0]](given[1:]))
    if given and not given[0].startswith("-"):
        return run_command(lambda: _refuse(given[0]))
    return run_command(lambda: _train(given))


def _refuse(command: str) -> None:
    close = difflib.get_close_matches(command[:40], COMMANDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"the command must be one of {', '.join(COMMANDS)}, got {command[:40]!r}{hint}")


if __name__ == "__main__":
    sys.exit(main())
