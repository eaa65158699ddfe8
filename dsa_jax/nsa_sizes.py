"""Holds the sizes of Native Sparse Attention's branches."""

import dataclasses

from dsa_jax.strict_json import shown

LEAST_BLOCKS = 3  # the first one in reach and two local ones, which are always selected


@dataclasses.dataclass(frozen=True)
class NSASizes:
    """The sizes of Native Sparse Attention's three branches, in keys; defaults are the published ones.

    Raises:
      ValueError: naming the field, if a value is no integer of at least 1, or sizes do not fit each other.

    References:
      Yuan et al., arXiv:2502.11089, section 4.1.
    """

    compression: int = 32  # keys that one compressed entry stands for
    stride: int = 16  # keys from the beginning of one to the beginning of the next
    block: int = 64  # keys of a block that is selected
    blocks: int = 16  # blocks that are selected, with the first one and the two local ones
    window: int = 512  # the last keys of the sliding window

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"nsa {field.name} must be an integer of at least 1, got {shown(value)}")
        if self.compression % self.stride or self.block % self.stride:
            raise ValueError(
                f"nsa stride must divide compression {self.compression} and block {self.block}, got {self.stride}"
            )
        if self.compression > self.block:
            raise ValueError(f"nsa compression must be at most block {self.block}, got {self.compression}")
        if self.blocks < LEAST_BLOCKS:
            raise ValueError(
                f"nsa blocks must be at least {LEAST_BLOCKS}, the first and two local ones, got {self.blocks}"
            )
