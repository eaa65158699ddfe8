"""Conversations for fine-tuning: JSON lines of messages as tokens, of which the assistant's count as targets."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from dsa_jax.chat import ChatTemplate, check_messages
from train.checks import shown
from train.data.text import TextFile

ASSISTANT = "assistant"

type Encoded = tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"]]  # tokens, and which of them the model shall learn


def load_template(tokenizer: Tokenizer, path: Path, template: Path | None) -> ChatTemplate:
    """Reads the template of conversations: the one given, or that beside the tokenizer.

    Args:
      tokenizer: of the model.
      path: where it was read.
      template: a file of Jinja; None: what `ChatTemplate.of` finds.

    Raises:
      ValueError: if a file cannot be read.
    """
    if template is None:
        return ChatTemplate.of(path.parent, tokenizer)
    try:
        source = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template must be a readable file of Jinja, got {template}: {error}") from error
    return ChatTemplate.of(path.parent, tokenizer, source=source)


def split_lines(files: Sequence[TextFile]) -> list[TextFile]:
    """Gives the different lines that are not blank, each named FILE:LINE, in the order of their hashes."""
    lines = {}
    for file in files:
        for number, line in enumerate(file.text.split(b"\n"), 1):
            digest = hashlib.blake2b(line.strip(), digest_size=16).digest()
            if line.strip() and digest not in lines:
                lines[digest] = TextFile(Path(f"{file.path}:{number}"), line, digest)
    return [lines[digest] for digest in sorted(lines)]


def encode_conversation(line: TextFile, template: ChatTemplate, vocab_size: int) -> Encoded:
    """Turns a line into tokens, and marks those that the assistant wrote.

    Raises:
      ValueError: naming file and line, if it is no conversation, or the assistant's tokens cannot be told.
    """
    try:
        messages, tools = _read(line.text)
        ids, learnt = _spans(template, messages, tools)
        if max(ids) >= vocab_size:
            raise ValueError(f"token ids must fit the model's vocab_size {vocab_size}, got {max(ids)}")
    except ModuleNotFoundError as error:
        raise ValueError(f"templates of conversations need {error.name}: pip install 'dsa-jax[serve]'") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{line.path} must be a conversation: {error}") from error
    return np.asarray(ids, np.int32), learnt


def _read(text: bytes) -> tuple[list[dict[str, Any]], Any]:
    values = json.loads(text.decode())
    if not isinstance(values, dict) or "messages" not in values:
        raise ValueError(
            f"each line must be an object with messages, got {shown(values)}; `python -m train tokenize` takes text"
        )
    messages = check_messages(values["messages"])
    roles = [message["role"] for message in messages]
    if ASSISTANT not in roles or roles[0] == ASSISTANT:
        raise ValueError(f"messages must have an assistant's behind another's, got the roles {shown(roles)}")
    return messages, values.get("tools")


def _spans(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], np.ndarray]:
    thinking = template.format.thinks and any("reasoning_content" in message for message in messages)
    if template.marks_answers:
        ids, marks = template.encode_marked(messages, tools=tools, thinking=thinking)
        if not any(marks):
            raise ValueError("the template must mark what the assistant wrote by {% generation %}, and marked nothing")
        return ids, np.asarray(marks)
    return _compared(template, messages, tools, thinking)


def _compared(template: ChatTemplate, messages, tools, thinking: bool) -> tuple[list[int], np.ndarray]:
    """Finds each answer as what stands between the prompt for it and the conversation up to it."""

    def encode(count: int, prompt: bool) -> list[int]:
        return template.encode(messages[:count], tools=tools, thinking=thinking, add_generation_prompt=prompt)

    whole = encode(len(messages), False)
    learnt = np.zeros(len(whole), bool)
    for place, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            prompt, answered = encode(place, True), encode(place + 1, False)
            if whole[: len(answered)] != answered or answered[: len(prompt)] != prompt:
                raise ValueError(
                    f"the template must write the conversation up to messages[{place}] as the beginning of the whole, "
                    "and does not: split the conversation there, or mark answers by {% generation %} in the template"
                )
            learnt[len(prompt) : len(answered)] = True
    return whole, learnt
