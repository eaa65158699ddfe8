"""Conversations: from messages to tokens and from a model's text to messages; the commands `chat` and `generate`.

`ChatTemplate` turns a conversation into token ids, by the template of the checkpoint or by one of ours. `StreamParser`
takes a model's text as it comes apart into reasoning, content and tool calls. `terminal` and `commands` are what
`python -m dsa_jax` runs; they need the libraries of `pip install dsa-jax[serve]`.
"""

from dsa_jax.chat.messages import check_messages, check_tools
from dsa_jax.chat.parsing import Event, Format, StreamParser, message_of
from dsa_jax.chat.template import ChatTemplate

__all__ = ["ChatTemplate", "Event", "Format", "StreamParser", "check_messages", "check_tools", "message_of"]
