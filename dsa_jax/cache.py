"""The cache of decoding: one latent and one index key a token and layer, for all heads."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Holds latents, index keys and lengths of a batch of sequences; never mutated: the model returns a new one.

    Attributes:
      kv: latents [layers, B, S, C + R], of which row b holds the first `lengths[b]` tokens.
      k_index: index keys [layers, B, S, E]; e4m3 under `index_fp8`.
      k_scale: float32 [layers, B, S], the scale of each index key; 1 without `index_fp8`.
      lengths: int32 [B], the tokens that each row holds.

    Examples:
      >>> cache = Cache.empty(model.config, batch=1, size=64)
      >>> cache = model(tokens, cache=cache).cache
    """

    kv: Array
    k_index: Array
    k_scale: Array
    lengths: Array

    @classmethod
    def empty(cls, config: Config, batch: int, size: int) -> Self:
        """Makes an empty cache for `batch` sequences of at most `size` tokens.

        Raises:
          ValueError: if a size is below 1, or `size` exceeds the model's positions.
        """
        if batch < 1 or size < 1:
            raise ValueError(f"a cache needs at least one row and one token, got batch {batch} and size {size}")
        if size > config.max_position_embeddings:
            raise ValueError(
                f"a cache holds at most max_position_embeddings = {config.max_position_embeddings} tokens, got {size}"
            )
        rows = (config.num_hidden_layers, batch, size)
        return cls(
            kv=jnp.zeros((*rows, config.latent_dim), config.dtype),
            k_index=jnp.zeros((*rows, config.index_head_dim), jnp.float8_e4m3fn if config.index_fp8 else config.dtype),
            k_scale=jnp.ones(rows, jnp.float32),
            lengths=jnp.zeros(batch, jnp.int32),
        )

    @property
    def size(self) -> int:
        """The number of tokens that a row can hold."""
        return self.kv.shape[2]

    def write(
        self,
        layer: Int[Array, ""] | int,
        kv: Float[Array, "B T H"],
        k_index: Float[Array, "B T E"],
        k_scale: Float[Array, "B T"],
    ) -> Self:
        """Writes the entries of T new tokens behind the `lengths` of one layer; what does not fit is dropped."""
        rows = jnp.arange(kv.shape[0])[:, None]
        at = self.lengths[:, None] + jnp.arange(kv.shape[1])
        return dataclasses.replace(
            self,
            kv=self.kv.at[layer, rows, at].set(kv, mode="drop"),
            k_index=self.k_index.at[layer, rows, at].set(k_index, mode="drop"),
            k_scale=self.k_scale.at[layer, rows, at].set(k_scale, mode="drop"),
        )

    def read(
        self, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B S H"], Float[Array, "B S E"], Float[Array, "B S"]]:
        """Reads the latents, index keys and key scales of one layer."""
        return self.kv[layer], self.k_index[layer], self.k_scale[layer]

    def advance(self, tokens: Int[Array, " B"]) -> Self:
        """Counts the new tokens of each row, once all layers have written them."""
        return dataclasses.replace(self, lengths=self.lengths + tokens)
