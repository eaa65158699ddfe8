"""From a conversation to token ids, by the template of a checkpoint or by one of ours."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dsa_jax.chat.deepseek import CONTROL_TOKENS, render_v32
from dsa_jax.chat.messages import (
    THINK,
    check_messages,
    check_tools,
    parsed_arguments,
    plain_values,
    written_arguments,
)
from dsa_jax.chat.parsing import DSML, Format, StreamParser
from dsa_jax.chat.rendering import render
from dsa_jax.chat.spellings import ControlTokens
from dsa_jax.hf.files import own_file
from dsa_jax.strict_json import read_object, shown, shown_path

MAX_SOURCE = 1_000_000  # characters of a template
END_TOKENS = 16  # of a prompt, in which its last think tag stands if nothing follows it
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # by which a template marks what a model has written
BEGIN_ANSWER, END_ANSWER = "\ufdd0", "\ufdd1"  # noncharacters, which no text may have
ROLE_NAMES = {"user": "User: ", "assistant": "Assistant: ", "tool": "Result: "}

type Rendered = tuple[str, Mapping[int, str]]  # a conversation with hidden spellings, and what to put back
type Hide = Callable[[Any], tuple[Any, Mapping[int, str]]]


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """Turns conversations into token ids, and says how to read the answers.

    Attributes:
      tokenizer: of the model; its text shows the markers of reasoning and calls, even where these are special tokens.
      format: what answers may hold beside content.
      stop: texts that end an answer, where no token does.
      takes_tools: whether the template can tell the model of tools.
      marks_answers: whether it marks what the model has written, for `encode_marked`.
    """

    tokenizer: Tokenizer
    format: Format
    stop: tuple[str, ...]
    takes_tools: bool
    _render: Callable[..., Rendered]
    _takes_arguments: bool = False
    marks_answers: bool = False

    @classmethod
    def of(cls, folder: str | Path, tokenizer: Tokenizer, *, source: str | None = None) -> "ChatTemplate":
        """Finds the template of a checkpoint.

        It is that of `chat_template.jinja`, or else of `tokenizer_config.json`; without these DeepSeek-V3.2's, if the
        tokenizer has its control tokens, and otherwise lines that begin with who speaks.

        Args:
          folder: of the checkpoint.
          tokenizer: of the model.
          source: a template of Jinja to take instead of the checkpoint's.

        Raises:
          ValueError: if a file is damaged.
        """
        folder = Path(folder)
        config = read_tokenizer_config(folder)
        sources = _read_sources(folder, config) if source is None else {"default": source}
        tokens = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        if sources:
            text = "\n".join(sources.values())
            special = {name: token for name in SPECIAL if (token := token_text(config.get(name))) is not None}
            format = Format.of(tokens, text)
            draw = functools.partial(_render_jinja, sources, special)
            tokenizer, marks = show_markers(tokenizer, format), GENERATION.search(text) is not None
            return cls(tokenizer, format, (), "tools" in text, draw, _takes_arguments=True, marks_answers=marks)
        if tokens >= CONTROL_TOKENS:
            format = Format(thinks=True, calls=DSML)
            return cls(show_markers(tokenizer, format), format, (), True, _render_v32)
        begin = token_text(config.get("bos_token")) or ""
        stop = tuple("\n" + name.rstrip() for name in ROLE_NAMES.values())
        return cls(tokenizer, Format(), stop, False, functools.partial(_render_plain, begin))

    def encode(
        self,
        messages: Any,
        *,
        tools: Any = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Turns a conversation into token ids, in which no text of a message or a tool is a control token.

        Args:
          messages: dicts with `role` and `content`, and what OpenAI's interface has beside them.
          tools: functions that the model may call, likewise.
          thinking: whether the model shall think before it answers.
          add_generation_prompt: whether the model's turn begins at the end.
          **kwargs: what else a checkpoint's template understands, as JSON values.

        Raises:
          ValueError: in one line, for messages that are none, or a template that fails or cannot do what is asked for.
        """
        values = self._values(messages, tools, thinking, kwargs)
        switches = {"thinking": thinking, "add_generation_prompt": add_generation_prompt}
        text, put_back = self._render(self.control.hide, values, **switches)
        return self.control.encode(text, put_back)

    def encode_marked(
        self, messages: Any, *, tools: Any = None, thinking: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Turns a whole conversation into token ids, and says which of them the template marks as the model's.

        A token never reaches across the beginning or the end of an answer, as none does when a model writes it.

        Raises:
          ValueError: as `encode`; also if the template marks nothing, or a text has the noncharacters that mark here.
        """
        if not self.marks_answers:
            raise ValueError("the template must mark the model's answers by {% generation %}, got one that does not")
        values = self._values(messages, tools, thinking, {})
        if re.search(f"[{BEGIN_ANSWER}{END_ANSWER}]", json.dumps(values, ensure_ascii=False)):
            raise ValueError("messages must not have the noncharacters U+FDD0 and U+FDD1")
        values |= {"begin_generation": BEGIN_ANSWER, "end_generation": END_ANSWER}
        text, put_back = self._render(self.control.hide, values, thinking=thinking, add_generation_prompt=False)
        ids: list[int] = []
        marks: list[bool] = []
        is_answer = False
        for part in re.split(f"([{BEGIN_ANSWER}{END_ANSWER}])", text):
            if part in (BEGIN_ANSWER, END_ANSWER):
                is_answer = part == BEGIN_ANSWER
                continue
            found = self.control.encode(part, put_back)
            ids += found
            marks += [is_answer] * len(found)
        return ids, marks

    def _values(self, messages: Any, tools: Any, thinking: bool, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        messages, tools = check_messages(messages), check_tools(tools)
        self._check(messages, tools, thinking, kwargs)
        return {"messages": messages, "tools": tools} | plain_values(kwargs, "the template's arguments")

    def _check(self, messages, tools, thinking: bool, kwargs) -> None:
        if not self.takes_tools and (tools or any("tool_calls" in message for message in messages)):
            raise ValueError("tools and tool_calls must be absent: this model's template knows none")
        if thinking and not self.format.thinks:
            raise ValueError("thinking must be False: this model's template knows no reasoning, got True")
        if kwargs and not self._takes_arguments:
            raise ValueError(f"the template must be one of the checkpoint's own to take arguments, got {list(kwargs)}")
        if taken := {"messages", "tools", "documents", *SPECIAL} & kwargs.keys():
            raise ValueError(f"the template's arguments must have other names, got {', '.join(sorted(taken))}")

    def parser(self, prompt: Sequence[int]) -> StreamParser:
        """Makes the parser of the answer to a prompt, which may have opened the model's reasoning."""
        end = self.tokenizer.decode(list(prompt[-END_TOKENS:]), skip_special_tokens=False)
        return StreamParser(self.format, thinking=self.format.thinks and end.rstrip().endswith(THINK))

    @functools.cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's added tokens by their spellings."""
        return ControlTokens(self.tokenizer)


def show_markers(tokenizer: Tokenizer, format: Format) -> Tokenizer:
    """Makes a tokenizer that writes the markers of reasoning and calls, which decoding leaves out as special tokens."""
    tokens = tokenizer.get_added_tokens_decoder().values()
    if not any(token.special and token.content in format.markers() for token in tokens):
        return tokenizer
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] &= token["content"] not in format.markers()
    return Tokenizer.from_str(json.dumps(data))


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's `tokenizer_config.json`; it is empty if there is none."""
    path = folder / "tokenizer_config.json"
    return read_object(own_file(folder, path.name)) if path.exists() else {}


def _read_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Reads a checkpoint's templates by name; one without a name is the default."""
    path = folder / "chat_template.jinja"
    found = config.get("chat_template")
    if path.exists():
        found = own_file(folder, path.name).read_text(encoding="utf-8")
    if isinstance(found, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in found]
        sources: dict[Any, Any] = {entry.get("name"): entry.get("template") for entry in entries}
    else:
        sources = {} if found is None else {"default": found}
    for name, source in sources.items():
        if not isinstance(name, str) or not isinstance(source, str) or len(source) > MAX_SOURCE:
            raise ValueError(
                f"chat_template of {shown_path(folder)} must be text of at most {MAX_SOURCE:,} characters, or a list "
                f"of such with names, got {shown(source)}"
            )
    if sources and "default" not in sources:
        raise ValueError(f"chat_template of {shown_path(folder)} must name a default, got {shown(list(sources))}")
    return sources


def token_text(token: Any) -> str | None:
    """Reads a special token, which may be text or an added token's description."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _render_jinja(sources, special, hide: Hide, values, *, thinking, add_generation_prompt) -> Rendered:
    name = "tool_use" if values["tools"] and "tool_use" in sources else "default"
    # Two names are in use for the switch.
    switches = {"thinking": thinking, "enable_thinking": thinking, "add_generation_prompt": add_generation_prompt}
    messages = values["messages"]
    forms = [messages]
    if any("tool_calls" in message for message in messages):
        # Most templates write the arguments as JSON or one by one; some, DeepSeek-V3.1's among them, need them as text.
        forms = [parsed_arguments(messages), written_arguments(messages)]
    for form in forms:
        hidden, put_back = hide(values | {"messages": form})
        try:
            return render(sources[name], {"documents": None} | special | switches | hidden), put_back
        except ValueError:
            if form is forms[-1]:
                raise
    raise AssertionError("there is a form at least")


def _render_v32(hide: Hide, values, **switches) -> Rendered:
    hidden, put_back = hide(values | {"messages": parsed_arguments(values["messages"])})
    return render_v32(hidden["messages"], tools=hidden["tools"], **switches), put_back


def _render_plain(begin: str, hide: Hide, values, *, thinking, add_generation_prompt) -> Rendered:
    """Writes a line a message, for models that know no conversations."""
    hidden, put_back = hide(values)
    lines = [ROLE_NAMES.get(message["role"], "") + message["content"] + "\n" for message in hidden["messages"]]
    return begin + "".join(lines) + (ROLE_NAMES["assistant"].rstrip() if add_generation_prompt else ""), put_back
