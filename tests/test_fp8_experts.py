"""The grouped product with experts in FP8: bits, memory, and what has no gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import equations
from flax import nnx
from moe_cases import problem

from dsa_jax import Config, Transformer, grouped_ffn
from dsa_jax.grouped_ffn import expert_ffn
from dsa_jax.moe import MoE
from dsa_jax.quantization import E4M3, BlockScaled, cast_weight, quantize_blocks


def fp8_problem(tokens, dim, width, dtype):
    """Draws the arguments of `expert_ffn`, weights in FP8, and the same multiplied out to bfloat16."""
    x, experts, gates, *weights = problem(0, tokens, 2, 8, dim, width, dtype=dtype)
    narrow = [quantize_blocks(w) for w in weights]
    return (x, experts, gates), narrow, [cast_weight(w, jnp.bfloat16) for w in narrow]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 60])
def test_results_have_the_bits_of_bfloat16_weights(tokens, dtype, monkeypatch):
    """Two chunks of blocks, and sizes that are no multiples of a block's."""
    monkeypatch.setattr(grouped_ffn, "CHUNK_BYTES", 5 * 3 * 4 * 200 * 136)
    arrays, narrow, wide = fp8_problem(tokens, 200, 136, dtype)
    run = jax.jit(expert_ffn)
    np.testing.assert_array_equal(run(*arrays, *narrow), run(*arrays, *wide))


def test_a_weight_is_value_times_scale():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 130, 200)).astype(np.float32)
    held = quantize_blocks(weight)
    assert held.shape == (2, 130, 200) and held.values.dtype == E4M3 and held.scale.shape == (2, 2, 2)
    expected = np.asarray(held.values).astype(np.float32)
    for i, j in np.ndindex(2, 2):
        block = slice(None), slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        expected[block] *= np.asarray(held.scale)[:, i, j, None, None]
    np.testing.assert_array_equal(cast_weight(held, jnp.bfloat16), expected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(cast_weight(held, jnp.float32), expected.astype(jnp.bfloat16).astype(np.float32))
    assert np.abs(expected - weight).max() <= np.abs(weight).max() / 448 * 16  # half a step of the largest values


def test_blocks_are_rounded_as_numpy_rounds():
    """Zeros, tiny and huge values, and blocks at the edges."""
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(300, 130)).astype(np.float32)
    weight[:128, :128], weight[128:256, :128], weight[256:, 128:] = 0, weight[128:256, :128] * 1e-30, 3e38
    held = quantize_blocks(weight)
    for i, j in np.ndindex(3, 2):
        block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        largest = np.abs(weight[block]).max()
        scale = largest / np.float32(448) if largest else np.float32(1)
        assert np.asarray(held.scale)[i, j] == scale
        expected = (weight[block] / scale).astype(E4M3)
        assert np.asarray(held.values)[block].tobytes() == expected.tobytes()
    assert np.abs(np.asarray(held.values).astype(np.float32)).max() == 448
    assert quantize_blocks(np.full((4, 4), 1e-37, np.float32)).values.astype(jnp.float32).max() > 1


def widest(jaxpr):
    """Finds the largest array of more than a byte a number that a program makes, those of its inner programs too."""
    made = (variable.aval for equation in equations(jaxpr) for variable in equation.outvars)
    return max((each.size for each in made if each.dtype.itemsize > 1), default=0)


@pytest.mark.parametrize("tokens", [16, 4096])
def test_no_program_multiplies_out_all_experts(tokens):
    """256 experts of the published width: what is made of them at a time is a chunk, 1 GiB of float32.

    The compiled program of a CPU does not tell: XLA moves no FP8 there, and makes a wider copy before it gathers.
    """
    dim, width, experts = 7168, 2048, 256

    def held(*shape):
        scales = *shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)
        return BlockScaled(jax.ShapeDtypeStruct(shape, E4M3), jax.ShapeDtypeStruct(scales, jnp.float32))

    weights = held(experts, dim, width), held(experts, dim, width), held(experts, width, dim)
    x, chosen = jax.ShapeDtypeStruct((tokens, dim), jnp.bfloat16), jax.ShapeDtypeStruct((tokens, 8), jnp.int32)
    program = jax.make_jaxpr(expert_ffn)(x, chosen, jax.ShapeDtypeStruct((tokens, 8), jnp.float32), *weights).jaxpr
    rows = tokens * 8 * dim * 4  # of all blocks with their padding, at most
    chunk = grouped_ffn.chunk_blocks(dim, width) * dim * width
    assert chunk <= widest(program) <= max(chunk, rows) < experts * dim * width / 2


def test_no_layer_multiplies_out_all_experts():
    config = Config.tiny(n_routed_experts=64, expert_dtype="fp8", dtype="bfloat16")
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    run = lambda state, ids: nnx.merge(graph, state)(ids, return_indexer_kl=False).hidden
    program = jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct((1, 8), jnp.int32)).jaxpr
    of_a_layer = 64 * config.hidden_size * config.moe_intermediate_size
    assert 0 < widest(program) < of_a_layer


def test_there_are_no_gradients():
    arrays, narrow, _ = fp8_problem(5, 8, 6, "float32")
    loss = lambda x, gates: expert_ffn(x, arrays[1], gates, *narrow).sum()
    with pytest.raises(ValueError, match=r"experts in FP8 have no gradients: to train, load .* expert_dtype=None"):
        jax.grad(loss)(arrays[0], arrays[2])


def test_a_scale_that_does_not_fit_is_named():
    arrays, narrow, _ = fp8_problem(5, 200, 136, "float32")
    wrong = BlockScaled(narrow[1].values, narrow[1].scale[:, :1])
    with pytest.raises(ValueError, match=r"the scale of up_proj must be of shape \(8, 2, 2\), got \(8, 1, 2\)"):
        expert_ffn(*arrays, narrow[0], wrong, narrow[2])


def test_a_new_model_has_fp8_experts():
    config = Config.tiny(expert_dtype="fp8")
    narrow, wide = (MoE(each, rngs=nnx.Rngs(0)) for each in (config, Config.tiny()))
    held, drawn = narrow.experts, wide.experts.gate_proj[...]
    assert held.gate_proj_scale is not None and wide.experts.gate_proj_scale is None
    np.testing.assert_array_equal(quantize_blocks(drawn).values, held.gate_proj[...])
    x = jax.random.normal(jax.random.key(0), (1, 5, config.hidden_size))
    error = jnp.linalg.norm(narrow(x)[0] - wide(x)[0]) / jnp.linalg.norm(wide(x)[0])
    assert 0.005 < error < 0.1
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(state))


def test_kernels_take_fp8_of_whole_blocks_and_say_what_else_they_do_not():
    arrays, narrow, _ = fp8_problem(5, 256, 128, "bfloat16")
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU"):  # and nothing else
        expert_ffn(*arrays, *narrow, implementation="pallas")
    arrays, narrow, _ = fp8_problem(5, 200, 136, "bfloat16")
    with pytest.raises(ValueError, match="D and F must be multiples of 128, got 200 and 136"):
        expert_ffn(*arrays, *narrow, implementation="pallas")
