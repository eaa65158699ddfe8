"""Renders Jinja templates in a process of its own, which `rendering.py` starts, bounds and ends.

It reads a JSON object a line, {"source", "variables", "most"}, and answers with one, {"text"} or {"error"}. It imports
Jinja and the standard library alone: a start takes a fifth of a second.
"""

import datetime
import json
import resource
import sys

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES = 2 * 2**30  # of memory; a template that wants more ends with an error


class Generation(Extension):
    """Renders the body of {% generation %}, by which templates mark what a model has written.

    It stands between the variables `begin_generation` and `end_generation`, which are empty unless they are given.
    """

    tags = {"generation"}

    def parse(self, parser):
        """Parses up to the end tag."""
        begin = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        edges = (nodes.Output([nodes.Name(name, "load")]) for name in ("begin_generation", "end_generation"))
        before, after = (edge.set_lineno(begin) for edge in edges)
        return [before, nodes.Scope(body).set_lineno(begin), after]


def make_environment() -> ImmutableSandboxedEnvironment:
    """Makes the sandbox, with what the templates of checkpoints expect of it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
    }
    return environment


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Writes JSON as templates expect it: letters as they are, and nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    """Ends the rendering with a template's own words."""
    raise TemplateError(str(message))


def render(environment, source: str, variables: dict, most: int) -> str:
    """Renders a template.

    Raises:
      ValueError: if more than `most` characters come.
    """
    parts, count = [], 0
    for part in environment.from_string(source).generate(variables):
        parts.append(part)
        count += len(part)
        if count > most:
            raise ValueError(f"it writes more than {most:,} characters")
    return "".join(parts)


def main() -> None:
    """Answers until the input ends, which is when the process that asks has ended."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    environment = make_environment()
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            answer = {"text": render(environment, asked["source"], asked["variables"], asked["most"])}
        except MemoryError:
            answer = {"error": f"it needs more than {MAX_BYTES / 2**30:.0f} GiB of memory"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
