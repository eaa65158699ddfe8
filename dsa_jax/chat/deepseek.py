"""DeepSeek-V3.2's conversations, whose checkpoints come without a Jinja template.

The tokens and their order are the published ones; the sentences that explain tools to the model are ours.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsa_jax.chat.messages import END_THINK, THINK

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CONTROL_TOKENS = frozenset((BEGIN, END, USER, ASSISTANT, THINK, END_THINK))

DSML = "｜DSML｜"
CALLS, END_CALLS = f"<{DSML}function_calls>", f"</{DSML}function_calls>"
INVOKE, END_INVOKE = f"<{DSML}invoke", f"</{DSML}invoke>"
PARAMETER, END_PARAMETER = f"<{DSML}parameter", f"</{DSML}parameter>"

TOOLS = f"""## Tools
These functions can be called while you answer. A block of this form calls one or several of them:
{CALLS}
{INVOKE} name="$NAME">
{PARAMETER} name="$PARAMETER" string="true|false">$VALUE{END_PARAMETER}
{END_INVOKE}
{END_CALLS}
Write texts as they are, with string="true"; write all other values as JSON, with string="false". The results follow in
a block <function_results>; think about them before you go on, where thinking is switched on.
The functions, each as a JSON schema:
<functions>
"""


def render_v32(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = False,
    add_generation_prompt: bool = True,
) -> str:
    """Writes a conversation in DeepSeek-V3.2's format.

    Reasoning is kept after the last question alone, and under `thinking`: what was thought of earlier ones is dropped.

    Args:
      messages: as `check_messages` gives them, with arguments of calls as objects.
      tools: as `check_tools` gives them; described in the first message of the system.
      thinking: whether the model shall think before it answers.
      add_generation_prompt: whether the model's turn begins at the end.

    Raises:
      ValueError: if a tool's result follows no call.
    """
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)
    opened = lambda place: THINK if thinking and place >= last else END_THINK  # noqa: E731
    out, before = [BEGIN], ""
    if tools and messages[0]["role"] not in ("system", "developer"):
        out.append("\n\n" + _tools(tools))
    for place, message in enumerate(messages):
        role = message["role"]
        if role == "assistant":
            out += [_opening(before, opened(place - 1)), _answer(message, keeps=thinking and place > last)]
        elif role == "tool":
            out.append(_result(message, place, before, is_last=_role(messages, place + 1) != "tool"))
        else:
            out.append(USER + message["content"] if role == "user" else message["content"])
            out.append("\n\n" + _tools(tools) if tools and place == 0 and role != "user" else "")
        before = role
    if add_generation_prompt and before != "assistant":
        out.append(_opening(before, opened(len(messages) - 1)))
    return "".join(out)


def _role(messages, place) -> str | None:
    return messages[place]["role"] if place < len(messages) else None


def _opening(before: str, think: str) -> str:
    """Begins the model's turn; after results of tools it goes on."""
    return f"\n\n{think}" if before == "tool" else ASSISTANT + think


def _answer(message, *, keeps: bool) -> str:
    reasoning = message.get("reasoning_content", "") + END_THINK if keeps else ""
    calls = [_invoke(call["function"]) for call in message.get("tool_calls", ())]
    block = "\n".join(["\n\n" + CALLS, *calls, END_CALLS]) if calls else ""
    return reasoning + (message["content"] or "") + block + END


def _result(message, place: int, before: str, *, is_last: bool) -> str:
    if before not in ("assistant", "tool"):
        raise ValueError(f"messages[{place}] must follow the call whose result it is, got one after {before or 'none'}")
    begin = "" if before == "tool" else "\n\n<function_results>"
    return f"{begin}\n<result>{message['content']}</result>" + ("\n</function_results>" if is_last else "")


def _invoke(function) -> str:
    parameters = []
    for name, value in function["arguments"].items():
        is_text = isinstance(value, str)
        written = value if is_text else json.dumps(value, ensure_ascii=False)
        flag = "true" if is_text else "false"
        parameters.append(f'{PARAMETER} name="{name}" string="{flag}">{written}{END_PARAMETER}')
    return "\n".join([f'{INVOKE} name="{function["name"]}">', *parameters, END_INVOKE])


def _tools(tools) -> str:
    schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return f"{TOOLS}{schemas}\n</functions>\n"
