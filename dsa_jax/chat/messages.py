"""Messages as OpenAI's interface has them: checked, and brought into one shape for templates."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsa_jax.strict_json import parse_object, shown, shown_name

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_DEPTH = 64  # of what nests within messages and tools
THINK, END_THINK = "<think>", "</think>"


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Brings messages into one shape.

    Content is text, that of several text parts joined; it is None only beside tool calls. Reasoning is named
    `reasoning_content`; where an assistant's content begins with it between think tags, it is taken from there.

    Raises:
      ValueError: naming the message and what it must have.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {shown(messages)}")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be an object, got {shown(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{name}.role must be one of {', '.join(ROLES)}, got {shown(role)}")
    out = plain_values(message, name) | {"role": role}
    calls = message.get("tool_calls") or None
    if calls is not None and (role != "assistant" or not isinstance(calls, list)):
        raise ValueError(f"{name}.tool_calls must be a list of an assistant's message, got {shown(calls)}")
    out.pop("tool_calls", None)
    out["content"] = _content(message.get("content"), f"{name}.content", may_lack=role == "assistant")
    reasoning = out.pop("reasoning", None) or out.pop("reasoning_content", None)
    out.pop("reasoning_content", None)
    if calls is not None:
        out["tool_calls"] = [_call(call, f"{name}.tool_calls[{place}]") for place, call in enumerate(calls)]
    elif out["content"] is None:
        out["content"] = ""
    if role == "assistant":
        reasoning, out["content"] = _split_reasoning(reasoning, out["content"])
    if reasoning is not None and not isinstance(reasoning, str):
        raise ValueError(f"{name}.reasoning_content must be text, got {shown(reasoning)}")
    return out | ({"reasoning_content": reasoning} if reasoning else {})


def _split_reasoning(reasoning, content):
    """Takes reasoning off the beginning of an assistant's content, where clients send back all that a model wrote."""
    if not reasoning and content is not None and content.lstrip().startswith(THINK) and END_THINK in content:
        reasoning, _, content = content.lstrip().removeprefix(THINK).partition(END_THINK)
    return reasoning, content


def _content(content, name: str, *, may_lack: bool) -> str | None:
    if content is None and may_lack:
        return None
    if isinstance(content, str):
        return whole_characters(content)
    if not isinstance(content, list):
        raise ValueError(f"{name} must be text or a list of text parts, got {shown(content)}")
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'{name}[{place}] must be {{"type": "text", "text": …}}, got {shown(part)}')
    return whole_characters("".join(part["text"] for part in content))


def _call(call, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{name} must have a function with a name, got {shown(call)}")
    arguments = function.get("arguments")
    if not isinstance(arguments, str | Mapping):
        raise ValueError(f"{name}.function.arguments must be JSON text or an object, got {shown(arguments)}")
    return {"type": "function"} | plain_values(call, name)


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Brings tools into one shape, functions with names; None where there are none.

    Raises:
      ValueError: naming the tool and what it must have.
    """
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"tools must be a list, got {shown(tools)}")
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if tool.get("type", "function") != "function" if isinstance(tool, Mapping) else True:
            raise ValueError(f"tools[{place}] must be of type function, got {shown(tool)}")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"tools[{place}] must have a function with a name, got {shown(tool)}")
    return [{"type": "function"} | plain_values(tool, f"tools[{place}]") for place, tool in enumerate(tools)]


def whole_characters(text: str) -> str:
    """Returns the text with U+FFFD in place of lone surrogates, which no tokenizer can read."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain_values(value: Any, name: str, depth: int = 0) -> Any:
    """Copies JSON values, with whole characters in their texts and keys.

    Raises:
      ValueError: for anything else, and for what nests deeper than `MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{name} must not nest deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        return whole_characters(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name} must have texts as keys, got {shown(value)}")
        return {whole_characters(key): plain_values(item, name, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item, name, depth + 1) for item in value]
    raise ValueError(f"{name} must hold JSON values, got {shown_name(type(value).__name__)}")


def parsed_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes objects of the arguments of calls that are JSON text: a spelling may hide in its escapes.

    Raises:
      ValueError: if one is no JSON object.
    """
    return _with_arguments(messages, _parsed)


def written_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes JSON text of the arguments of calls that are objects."""
    written = lambda value, _: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)  # noqa: E731
    return _with_arguments(messages, written)


def _with_arguments(messages, change: Callable[[Any, str], Any]) -> list[dict[str, Any]]:
    out = []
    for place, message in enumerate(messages):
        if "tool_calls" in message:
            calls = []
            for number, call in enumerate(message["tool_calls"]):
                name = f"messages[{place}].tool_calls[{number}].function.arguments"
                arguments = change(call["function"]["arguments"], name)
                calls.append(call | {"function": call["function"] | {"arguments": arguments}})
            message = message | {"tool_calls": calls}
        out.append(message)
    return out


def _parsed(arguments, name: str) -> dict[str, Any]:
    if not isinstance(arguments, str):
        return arguments
    try:
        return plain_values(parse_object(arguments or "{}"), name)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
