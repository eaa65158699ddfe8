"""How to sample, as options of a command."""

import dataclasses

from dsa_jax.inference import SamplingParams


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Says how to continue a prompt."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """The number of likeliest tokens to draw among; 0 for all."""
    top_p: float = 1.0
    """The probability that the tokens to draw among have together, at least."""
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

    def params(self) -> SamplingParams:
        """Makes the parameters.

        Raises:
          ValueError: naming what is out of range.
        """
        return SamplingParams(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
