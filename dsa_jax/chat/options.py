"""How to sample, as options of a command and of a line of JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsa_jax.inference.params import SamplingParams, StructuredOutputs
from dsa_jax.strict_json import shown

STRUCTURED = tuple(field.name for field in dataclasses.fields(StructuredOutputs))


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Says how to continue a prompt."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """The number of likeliest tokens to draw among; 0 for all."""
    top_p: float = 1.0
    """The probability that the tokens to draw among have together, at least."""
    min_p: float = 0.0
    """The least probability of a token to draw, as a share of the likeliest one's."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the continuation less likely if above 1."""
    presence_penalty: float = 0.0
    """Is subtracted from the logits of tokens of the continuation."""
    frequency_penalty: float = 0.0
    """Is subtracted as often as a token is in the continuation."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Is added to the logits of these tokens."""
    seed: int | None = None
    """The same seed draws the same tokens; without it a random one."""
    n: int = 1
    """How many continuations."""
    max_tokens: int | None = 256
    """How many tokens at most; None for as many as there are positions."""
    min_tokens: int = 0
    """How many tokens at least."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation, which ends before them."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the continuation."""
    ignore_eos: bool = False
    """Whether to go on after the model's own end tokens."""
    json: str | None = None
    """A JSON schema that the text must fit."""
    regex: str | None = None
    """A regular expression that the text must fit."""
    grammar: str | None = None
    """A Lark grammar that the text must fit."""
    json_object: bool = False
    """Whether the text must be a JSON object."""

    def params(self) -> SamplingParams:
        """Makes the parameters.

        Raises:
          ValueError: naming what is out of range.
        """
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must map token ids to numbers, got {shown(self.logit_bias)}")
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        structured = {name: value for name in STRUCTURED if (value := values.pop(name)) not in (None, False)}
        values["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}  # JSON has texts as keys
        return SamplingParams(**values, structured_outputs=StructuredOutputs(**structured) if structured else None)
