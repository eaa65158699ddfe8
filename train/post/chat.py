"""Conversations of episodes: prompts and answers that are messages, as tokens by the model's own template.

A template writes whole conversations, and an episode is never written again: what the model has sampled stays as it is,
and only what the template puts behind it is appended. That is read off two renderings, of the conversation up to the
model's message and of the one with the answers, behind the token by which the template ends a message of the model's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsa_jax.chat import ChatTemplate, check_messages, check_tools, message_of
from train.checks import shown


class NoTemplateError(ValueError):
    """Tells that no conversation at all can be written, which is no fault of an episode."""


class Chat:
    """Holds the conversation of one episode.

    Args:
      template: of the model.
      end_id: the token that ends a turn of the model.
      messages: the prompt, as OpenAI's interface has messages.
      tools: functions that the model may call, likewise; None for none.
      thinking: whether the model thinks before it answers.

    Raises:
      ValueError: for messages or tools that are none, or that the template cannot write.
      NoTemplateError: if the template knows no reasoning that is asked for, or needs a package that is not installed.
    """

    def __init__(
        self, template: ChatTemplate, end_id: int, messages: Any, tools: Any = None, *, thinking: bool = False
    ):
        if thinking and not template.format.thinks:
            raise NoTemplateError("thinking must be False: this model's template knows no reasoning, got True")
        self.template, self.end_id, self.thinking = template, end_id, thinking
        self.messages, self.tools = check_messages(messages), check_tools(tools)
        self._calls = 0
        try:
            self._prompt = self._encode(self.messages, begins=True, thinking=thinking)
        except ModuleNotFoundError as error:
            needs = f"prompts that are messages need {error.name}: pip install 'dsa-jax[serve]'"
            raise NoTemplateError(needs) from error

    def prompt(self) -> np.ndarray:
        """Gives the tokens of the prompt, behind which the model's turn begins."""
        return np.asarray(self._prompt, np.int32)

    def hear(self, text: str) -> dict[str, Any]:
        """Takes in a turn that the model has written; returns it as a message, with its calls if it has any."""
        parser = self.template.parser(self._prompt)
        message = message_of(parser.push(text) + parser.finish())
        for call in message.get("tool_calls", ()):
            call["id"], self._calls = f"call_{self._calls}", self._calls + 1  # the same in every run
        self.messages.append(message)
        return message

    def say(self, message: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Takes in a message of a demonstration; returns its tokens, to the turn's end, and what `hear` makes of them.

        Raises:
          ValueError: for reasoning that the prompt does not ask for, or a template that writes a prompt anew.
        """
        if not self.thinking and (message.get("reasoning_content") or message.get("reasoning")):
            raise ValueError("a demonstration must be without reasoning_content where its task is without thinking")
        prompt = self._encode(self.messages, begins=True, thinking=self.thinking)
        answered = self._answered([*self.messages, *check_messages([message])], thinking=self.thinking)
        if answered[: len(prompt)] != prompt:
            raise ValueError("the template must write a prompt as the beginning of its answer, and does not")
        tokens = answered[len(prompt) :]
        return np.asarray(tokens, np.int32), self.hear(
            self.template.tokenizer.decode(tokens[:-1], skip_special_tokens=False)
        )

    def answer(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Takes in what the environment says to the last turn; returns the tokens from its end to the next turn.

        Raises:
          ValueError: if these are no messages, or the template writes what comes before them otherwise than without.
        """
        before = self._answered(self.messages)
        self.messages += check_messages(messages)
        whole = self._encode(self.messages, begins=True)
        if whole[: len(before)] != before:
            raise ValueError("the template must write a conversation as the beginning of a longer one, and does not")
        behind = len(before)
        if self.thinking:  # earlier reasoning may be left out of what is written now, the ends of turns are not
            whole = self._encode(self.messages, begins=True, thinking=True)
            ends = [place for place, token in enumerate(whole) if token == self.end_id]
            behind = ends[before.count(self.end_id) - 1] + 1
        return np.asarray(whole[behind:], np.int32)

    def _answered(self, messages: Sequence[Mapping[str, Any]], *, thinking: bool = False) -> list[int]:
        """Encodes a conversation that ends with the model, to the token that ends its turn."""
        ids = self._encode(messages, begins=False, thinking=thinking)
        behind = len(ids)
        while behind and ids[behind - 1] != self.end_id:
            behind -= 1
        if not behind:
            tail = self.template.tokenizer.decode(ids[-4:], skip_special_tokens=False)
            raise ValueError(f"end_of_turn must be the token by which the template ends an answer: {shown(tail)}")
        return ids[:behind]

    def _encode(self, messages: Sequence[Mapping[str, Any]], *, begins: bool, thinking: bool = False) -> list[int]:
        if not thinking:  # many templates leave out the reasoning of turns that were answered, so none is compared
            messages = [{name: x for name, x in each.items() if name != "reasoning_content"} for each in messages]
        return self.template.encode(messages, tools=self.tools, thinking=thinking, add_generation_prompt=begins)
