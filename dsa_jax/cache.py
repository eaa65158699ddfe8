"""What decoding keeps of earlier tokens: one latent and one index key a token and layer."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Latents, index keys and lengths; never mutated: the model returns a new one.

    kv [layers, B, S, C + R] and k_index [layers, B, S, E] hold the first `lengths[b]` tokens of row b. With `index_fp8`
    index keys are e4m3 and `k_scale` [layers, B, S] float32 is their scale; else it is 1.
    """

    kv: Array
    k_index: Array
    k_scale: Array
    lengths: Array

    @classmethod
    def empty(cls, config: Config, batch: int, size: int) -> Self:
        """A cache for `batch` sequences of at most `size` tokens."""
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
        """The most tokens a row can hold."""
        return self.kv.shape[2]

    def write(
        self,
        layer: Int[Array, ""] | int,
        kv: Float[Array, "B T H"],
        k_index: Float[Array, "B T E"],
        k_scale: Float[Array, "B T"],
    ) -> Self:
        """Puts the entries of T new tokens behind the `lengths` of one layer; what does not fit is dropped."""
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
        """The latents, index keys and key scales of one layer."""
        return self.kv[layer], self.k_index[layer], self.k_scale[layer]

    def advance(self, tokens: Int[Array, " B"]) -> Self:
        """Counts the new tokens of each row, once all layers have written them."""
        return dataclasses.replace(self, lengths=self.lengths + tokens)
