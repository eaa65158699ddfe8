"""Holds YaRN's settings: how rotary frequencies stretch past the length that they were trained on."""

import dataclasses
import math

from dsa_jax.strict_json import shown

MAX_FLOAT = 3.4028234663852886e38  # the largest float32
MIN_ROTATIONS = 1e-30  # below these a wavelength overflows


@dataclasses.dataclass(frozen=True)
class YaRN:
    """YaRN: how rotary frequencies stretch past the length that they were trained on.

    The softmax scale is multiplied by `magnitude(mscale_all_dim) ** 2`; cosines and sines are multiplied by
    `magnitude(mscale) / magnitude(mscale_all_dim)`, which is 1 in every published DSA model.

    Raises:
      ValueError: naming the field, if a number is none, is not finite or out of range.

    References:
      Peng et al., arXiv:2309.00071.
    """

    factor: float  # new length over trained length, at least 1
    original_max_position_embeddings: int  # tokens
    beta_fast: float = 32.0  # rotations over the trained length, above which a frequency is left as it is
    beta_slow: float = 1.0  # rotations over the trained length, below which a frequency is divided by `factor`
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not -MAX_FLOAT <= value <= MAX_FLOAT:
                raise ValueError(f"rope_scaling {field.name} must be a finite number, got {shown(value)}")
        for name in ("factor", "original_max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"rope_scaling {name} must be at least 1, got {getattr(self, name)}")
        for name in ("beta_fast", "beta_slow"):
            if getattr(self, name) < MIN_ROTATIONS:
                raise ValueError(f"rope_scaling {name} must be at least {MIN_ROTATIONS}, got {getattr(self, name)}")
        for name in ("mscale", "mscale_all_dim"):
            if self.magnitude(getattr(self, name)) <= 0:
                raise ValueError(f"rope_scaling {name} must give a magnitude above 0, got {getattr(self, name)}")

    def magnitude(self, mscale: float) -> float:
        """Computes 0.1 · mscale · ln(factor) + 1, by whose square longer contexts sharpen the softmax."""
        return 0.1 * mscale * math.log(self.factor) + 1.0
