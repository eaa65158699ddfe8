"""Bounds the operations and the memory of the experts' products, of programs compiled as they are used."""

import jax
import jax.numpy as jnp
import pytest

from dsa_jax import grouped_ffn
from dsa_jax.grouped_ffn import expert_ffn


def flops(fn, *arrays):
    """Counts the FLOPs of a compiled function."""
    analysis = jax.jit(fn).lower(*arrays).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def abstract(tokens, slots, num_experts, dim, width, dtype=jnp.float32):
    weight = jax.ShapeDtypeStruct((num_experts, dim, width), dtype)
    down = jax.ShapeDtypeStruct((num_experts, width, dim), dtype)
    gates = jax.ShapeDtypeStruct((tokens, slots), jnp.float32)
    experts = jax.ShapeDtypeStruct((tokens, slots), jnp.int32)
    return jax.ShapeDtypeStruct((tokens, dim), dtype), experts, gates, weight, weight, down


def gradients(x, experts, gates, *weights):
    loss = lambda x, gates, *w: jnp.sum(jnp.square(expert_ffn(x, experts, gates, *w)))
    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(x, gates, *weights)


def ragged(x, experts, gates, gate_proj, up_proj, down_proj):
    """Computes the same by `jax.lax.ragged_dot`, to show that the count sees rows which are multiplied in vain."""
    order = jnp.argsort(experts.reshape(-1))
    sizes = jnp.bincount(experts.reshape(-1), length=gate_proj.shape[0])
    rows = x[order // experts.shape[1]]
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate_proj, sizes)) * jax.lax.ragged_dot(rows, up_proj, sizes)
    return jax.lax.ragged_dot(hidden, down_proj, sizes), gates


@pytest.mark.parametrize(("num_experts", "dim"), [(8, 128), (64, 64)])
def test_flops_stay_near_the_ideal_at_512_rows_an_expert(num_experts, dim):
    slots, rows = 2, 512
    arrays = abstract(rows * num_experts // slots, slots, num_experts, dim, dim)
    ideal = 6 * rows * num_experts * dim * dim
    forward, both = flops(expert_ffn, *arrays) / ideal, flops(gradients, *arrays) / (3 * ideal)
    # The count sees a loop's body once. No product of rows and weights is in one here; the only loop sums the weight
    # gradients of the 319 blocks of 64 experts, whose products with zeros and ones are added to the count by hand.
    blocks = (rows * num_experts + num_experts * 127) // 128
    if num_experts > grouped_ffn.BLOCKS_PER_SUM:
        both += 3 * 2 * grouped_ffn.BLOCKS_PER_SUM * blocks * dim * dim / (3 * ideal)
    assert 1 <= forward <= 1.5 and 1 <= both <= 1.5, (forward, both)
    assert flops(ragged, *arrays) / ideal > 1.5


def test_memory_at_published_sizes_is_bounded():
    """4096 tokens through 32 of the 256 experts, as on one of 8 shards; the weights of all 287 blocks are 24 GiB."""
    arrays = abstract(4096, 8, 32, 7168, 2048, jnp.bfloat16)
    forward = jax.jit(expert_ffn).lower(*arrays).compile().memory_analysis()
    assert forward.temp_size_in_bytes < 2 * 2**30, forward.temp_size_in_bytes / 2**30
    both = jax.jit(gradients).lower(*arrays).compile().memory_analysis()
    weight_gradients = 3 * 32 * 7168 * 2048 * 4
    assert both.temp_size_in_bytes < weight_gradients + 3 * 2**30, both.temp_size_in_bytes / 2**30
