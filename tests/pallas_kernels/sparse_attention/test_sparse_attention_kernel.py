"""Tests the Hopper kernels of `sparse_attention`: what both refuse, and the one for 64 heads and more.

Interpreted and lowered on a CPU, real on the card. The kernel for 16 and 32 heads has further tests of its own.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array, as_numpy, hostile_indices, noise, normal, poison, same_bits, the_first
from jax.experimental.pallas import mosaic_gpu as plgpu
from sparse_kernel_cases import abstract, check, compare, inputs, kernel

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import SMEM_BYTES
from dsa_jax.pallas_kernels.sparse_attention.forward import sparse_attention, why_not
from dsa_jax.pallas_kernels.sparse_attention.forward_few_heads import Config as FewHeadsConfig
from dsa_jax.pallas_kernels.sparse_attention.forward_many_heads import Config, column_halves, smem_bytes

# B, T, S, N, C, R, K: both halves of the columns even, odd, and the right one empty; K in the first pair of key blocks,
# ending in the middle of either block and at their edge
SMALL = [
    ((2, 1, 40, 128, 64, 0, 130), -0.2),
    ((1, 3, 50, 64, 64, 64, 100), 0.1),
    ((1, 2, 300, 64, 192, 64, 257), 0.1),
    ((1, 1, 1, 64, 128, 0, 128), 0.1),
    ((1, 2, 9, 64, 128, 64, 1), 0.0),
]
MANY_EACH = Config(blocks=2)  # so that a block has several queries


@pytest.mark.parametrize(("shape", "scale"), the_first(2, SMALL))
def test_equals_the_definition(shape, scale):
    check(*inputs(0, *shape), shape[4], scale, config=MANY_EACH, interpret=True)


@pytest.mark.parametrize("rotary", [0, 64])
def test_races_for_nothing(monkeypatch, rotary):
    """The interpreter follows every barrier and raises where loads and stores of two warpgroups are unordered.

    It does not notice rows gathered over others that wgmma still reads.
    """
    watched = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", watched)
    value_dim = 64 + rotary
    check(*inputs(0, 1, 2, 70, 64, value_dim, rotary, 130), value_dim, config=Config(blocks=1), interpret=True)


def test_absent_blocks_and_empty_rows():
    q, kv = normal(0, 1, 3, 64, 64, dtype="bfloat16"), normal(1, 1, 20, 64, dtype="bfloat16")
    indices = np.full((1, 3, 384), -1, np.int32)
    indices[0, 0, 130:140] = np.arange(10)  # its first pair of key blocks is of nothing, and so is its last
    indices[0, 2, 383] = 19
    check(q, kv, array(indices), 64, config=MANY_EACH, interpret=True)


def huge_logits(dim):
    """Makes logits far above zero for half of the heads, far below for the others: none overflows or is absent."""
    q, kv = np.full((1, 1, 64, dim), 1e12), np.full((1, 4, dim), 1e16)
    q[:, :, 1::2] *= -1
    kv[0, 2] *= 2
    return array(q, jnp.bfloat16), array(kv, jnp.bfloat16), array([[[0, 2]]])


def test_logits_of_any_size():
    check(*huge_logits(64), 64, 1.0, interpret=True)


def test_maxima_that_grow_by_little_and_by_much():
    """Below RESCALE_LOG2 a maximum is left as it is, above it the accumulator is rescaled: both are exact."""
    q, kv = array(np.ones((1, 1, 64, 64)), jnp.bfloat16), noise(0, 1, 256, 64, dtype="bfloat16")
    kv = array(kv + np.repeat([0, 1, 12, 11], 64)[:, None].astype(kv.dtype))
    check(q, kv, array(np.arange(256)[None, None]), 64, 0.05, interpret=True)


def test_a_query_depends_on_nothing_else():
    q, kv, indices = as_numpy(inputs(0, 2, 1, 60, 64, 64, 0, 70))
    whole = kernel(64, config=Config(blocks=1), interpret=True)(q, kv, indices)
    alone = kernel(64, interpret=True)(q[1:], kv[1:], indices[1:])
    jax.tree.map(same_bits, alone, jax.tree.map(lambda x: x[1:], as_numpy(whole)))


def test_under_vmap():
    """The kernel gets one more grid dimension; the latents are shared."""
    q, kv, indices = inputs(0, 1, 2, 20, 64, 64, 0, 70)
    call = jax.jit(jax.vmap(kernel(64, interpret=True), (1, None, 1), 1))
    results = as_numpy(call(np.asarray(q)[:, :, None], kv, np.asarray(indices)[:, :, None]))
    compare([x[:, :, 0] for x in results], q, kv, indices, 64)


@pytest.mark.parametrize("value_dim", [64, 192, 512])
@pytest.mark.parametrize("rotary", [0, 64])
def test_lowers_for_cuda(value_dim, rotary):
    arguments = abstract(1, 70_000, 131_072, 128, value_dim, rotary, 2048)
    text = kernel(value_dim).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "stablehlo.pad" not in text and "stablehlo.transpose" not in text


@pytest.mark.parametrize(("heads", "padded"), [(16, 192), (64, 256)])
def test_a_ragged_selection_is_padded(heads, padded):
    text = kernel(64).trace(*abstract(1, 4, 50, heads, 64, 64, 129)).lower(lowering_platforms=("cuda",)).as_text()
    assert f"tensor<1x4x{padded}xi32>" in text


@pytest.mark.parametrize("rotary", [0, 64])
def test_fits_the_multiprocessor(rotary):
    for value_dim in range(64, 513, 64):
        assert smem_bytes(value_dim, value_dim + rotary) <= SMEM_BYTES
        halves = column_halves(value_dim, value_dim + rotary)
        assert sum(count for _, count in halves) == value_dim + rotary
        assert all(count % 64 == 0 and count <= 256 + rotary for _, count in halves)


def test_takes_all_shared_memory_for_the_published_size():
    assert smem_bytes(512, 576) == 227 * 1024


def test_registers_are_passed_on_alone():
    for registers in range(168, 241, 8):
        config = Config(compute_registers=registers)
        assert config.gather_registers >= 24
        assert 2 * config.compute_registers + config.gather_registers == 3 * (65536 // 384 // 8 * 8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("compute_registers", 220, "compute_registers must be a multiple of 8 from 168 to 240, got 220"),
        ("compute_registers", 160, "compute_registers must be a multiple of 8 from 168 to 240, got 160"),
        ("compute_registers", 248, "compute_registers must be a multiple of 8 from 168 to 240, got 248"),
        ("blocks", 0, "blocks must be None or at least 1, got 0"),
    ],
)
def test_a_config_checks_itself(field, value, message):
    with pytest.raises(ValueError, match=message):
        Config(**{field: value})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 8, 48, 64, 0, 8), "heads must be 16, 32 or a multiple of 64, got 48"),
        ((1, 2, 8, 1, 64, 0, 8), "heads must be 16, 32 or a multiple of 64, got 1"),
        ((1, 2, 8, 64, 96, 0, 8), "value_dim must be a multiple of 64 from 64 to 512, got 96"),
        ((1, 2, 8, 16, 96, 0, 8), "value_dim must be a multiple of 64 from 64 to 512, got 96"),
        ((1, 2, 8, 64, 576, 0, 8), "value_dim must be a multiple of 64 from 64 to 512, got 576"),
        ((1, 2, 8, 64, 64, 32, 8), "the rotary columns must be 0 or 64, got 96 - 64 = 32"),
        ((1, 2, 8, 64, 64, 128, 8), "the rotary columns must be 0 or 64, got 192 - 64 = 128"),
        ((1, 0, 8, 64, 64, 0, 8), "no dimension may be 0"),
        ((1, 2, 0, 64, 64, 0, 8), "no dimension may be 0"),
        ((1, 2, 8, 64, 64, 0, 0), "no dimension may be 0"),
        ((1, 2, 8, 0, 64, 0, 8), "no dimension may be 0"),
        ((2, 2**20, 8, 128, 64, 0, 2048), "B · T · ⌈N / 64⌉ · ⌈K / 64⌉ must be below 2²⁷"),
        ((4, 2**20, 8, 16, 64, 0, 2048), "B · T · ⌈N / 64⌉ · ⌈K / 64⌉ must be below 2²⁷"),
    ],
)
def test_says_why_it_cannot(shape, message):
    arguments = abstract(*shape)
    reason = why_not(*arguments, shape[4])
    assert reason is not None and message in reason
    with pytest.raises(ValueError, match=re.escape(reason)):
        sparse_attention(*arguments, value_dim=shape[4], scale=1.0)


@pytest.mark.parametrize("heads", [16, 32, 64, 192])
def test_says_why_it_cannot_take_other_arrays(heads):
    q, kv, indices = abstract(2, 3, 9, heads, 64, 64, 8)
    assert why_not(q, kv, indices, 64) is None
    float32 = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    assert "must be bfloat16 and indices int32, got float32, bfloat16, int32" in str(why_not(float32, kv, indices, 64))
    wrong = jax.ShapeDtypeStruct(indices.shape, jnp.int64)
    assert "got bfloat16, bfloat16, int64" in str(why_not(q, kv, wrong, 64))
    for other in (abstract(1, 3, 9, heads, 64, 64, 8), abstract(2, 3, 9, heads, 64, 0, 8)):
        assert "do not fit together" in str(why_not(q, other[1], indices, 64))
    assert "do not fit together" in str(why_not(q, kv, abstract(2, 4, 9, heads, 64, 64, 8)[2], 64))
    assert "expected q [B, T, N, H]" in str(why_not(kv, kv, indices, 64))
    for scale in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"scale must be finite, got {scale}"):
            sparse_attention(q, kv, indices, value_dim=64, scale=scale)


@pytest.mark.parametrize(("heads", "config"), [(16, Config()), (64, FewHeadsConfig())])
def test_refuses_the_tuning_of_the_other_kernel(heads, config):
    family = "few" if heads == 16 else "many"
    with pytest.raises(ValueError, match=f"must be a .*_{family}_heads.Config for {heads} heads, got Config"):
        sparse_attention(*abstract(1, 2, 9, heads, 64, 64, 8), value_dim=64, scale=1.0, config=config)


def gathered(x, indices, tiles, interpret):
    """Gathers 64 rows of x, their column tiles `tiles` alone, as the kernels do."""
    width = 64 * len(tiles)

    def body(x_gmem, indices_gmem, out_gmem, rows_smem, barriers):
        ptx.init_gather_barriers(barriers, 1, interpret)
        ids = ptx.load_row_ids(indices_gmem, interpret)
        ptx.gather_64_rows(x_gmem, ids, rows_smem, barriers, 0, tiles, interpret, first=tiles[0])
        ptx.wait_gather(barriers, 0, 0, interpret)
        plgpu.copy_smem_to_gmem(rows_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((64, width), x.dtype),
        scratch_types=[
            plgpu.SMEM((64, width), x.dtype, transforms=ptx.swizzled(x.dtype)),
            ptx.gather_barriers(1, interpret),
        ],
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, indices)


def check_gather(tiles, interpret):
    indices = hostile_indices(0, 1, 3, 64, 100)[0, 2]
    present = (indices >= 0) & (indices < 100)
    x = normal(1, 100, 576, dtype="bfloat16")
    rows = jnp.where(present[:, None], x[jnp.where(present, indices, 0)], 0)[:, 64 * tiles[0] : 64 * tiles[-1] + 64]
    unused = ~jnp.isin(jnp.arange(100), indices)
    x = poison(x[None], unused[None])[0]
    same_bits(gathered(x, indices, tiles, interpret), rows)


@pytest.mark.parametrize("tiles", [range(9), range(4, 9), range(2, 3)])
def test_the_gather(tiles):
    check_gather(tiles, interpret=True)


# On the card


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [range(9), range(4, 9), range(2, 3)])
def test_the_gather_on_the_card(tiles):
    check_gather(tiles, interpret=False)


def sweep(count):
    """Yields shapes B, T, S, N, C, R, K of every kind."""
    rng = np.random.default_rng(7)
    for _ in range(count):
        yield (
            *(int(rng.integers(1, high)) for high in (4, 40)),
            int(rng.choice([1, 2, 63, 1000, 70_000])),
            int(rng.choice([64, 128, 192])),
            64 * int(rng.integers(1, 9)),
            64 * int(rng.integers(0, 2)),
            int(rng.choice([1, 64, 65, 127, 128, 129, 500, 2048])),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", list(sweep(20)), ids=str)
def test_equals_the_definition_on_the_card(shape):
    check(*inputs(0, *shape), shape[4], 0.06)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [-0.06, 0.0, 3.0])
def test_takes_any_scale_on_the_card(scale):
    check(*inputs(0, 1, 30, 3000, 128, 512, 64, 700), 512, scale)


@pytest.mark.gpu
def test_logits_of_any_size_on_the_card():
    check(*huge_logits(576), 512, 1.0)


@pytest.mark.gpu
def test_maxima_that_grow_on_the_card():
    q, kv = jnp.ones((1, 2, 64, 576), jnp.bfloat16), normal(0, 1, 2048, 576, dtype="bfloat16")
    kv = kv + jnp.linspace(0, 2, 2048)[None, :, None].astype(kv.dtype)
    indices = jnp.arange(2048, dtype=jnp.int32)
    check(q, kv, jnp.stack([indices, indices[::-1]])[None], 512, 0.06)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8192, 131_072])
def test_the_published_size_on_the_card(size):
    """256 queries of 128 heads with 2048 keys each: the error, and 20 runs with the same bits."""
    q, kv = normal(0, 1, 256, 128, 576, dtype="bfloat16"), normal(1, 1, size, 576, dtype="bfloat16")
    indices = array(np.random.default_rng(0).integers(0, size, (1, 256, 2048)), jnp.int32)
    call = kernel(512, 0.04)
    first = jax.device_get(call(q, kv, indices))
    compare(jax.tree.map(jnp.asarray, first), q, kv, indices, 512, 0.04)
    for _ in range(20):
        jax.tree.map(same_bits, call(q, kv, indices), first)


@pytest.mark.gpu
def test_a_query_depends_on_nothing_else_on_the_card():
    q, kv, indices = inputs(0, 1, 300, 5000, 128, 512, 64, 1000)
    first = jax.device_get(kernel(512)(q, kv, indices))
    for blocks in (3, 1000):
        jax.tree.map(same_bits, kernel(512, config=Config(blocks=blocks))(q, kv, indices), first)
    seven = kernel(512)(q[:, 101:108], kv, indices[:, 101:108])
    jax.tree.map(same_bits, seven, jax.tree.map(lambda x: x[:, 101:108], first))
    twice = kernel(512)(*(jnp.concatenate([x, x]) for x in (q, kv, indices)))
    jax.tree.map(same_bits, twice, jax.tree.map(lambda x: np.concatenate([x, x]), first))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64])
def test_under_vmap_on_the_card(heads):
    q, kv, indices = inputs(0, 3, 150, 900, heads, 512, 64, 300)
    call, kv = kernel(512), jnp.nan_to_num(kv[:1])
    expected = [call(q[i : i + 1], kv, indices[i : i + 1]) for i in range(3)]
    actual = jax.jit(jax.vmap(call, (0, None, 0)))(q[:, None], kv, indices[:, None])
    jax.tree.map(same_bits, actual, jax.tree.map(lambda *x: jnp.stack(x), *expected))


@pytest.mark.gpu
def test_more_queries_than_a_grid_dimension_on_the_card():
    kv = normal(0, 1, 500, 64, dtype="bfloat16")
    q = jax.random.normal(jax.random.key(0), (1, 70_001, 64, 64), jnp.bfloat16)
    check(q, kv, jax.random.randint(jax.random.key(1), (1, 70_001, 20), -5, 505), 64, 0.06)


@pytest.mark.gpu
def test_is_part_of_a_program_on_the_card():
    """Compiled with what makes its arguments and uses its results, it reads and writes what it should."""
    q, kv, indices = inputs(0, 2, 50, 300, 64, 128, 64, 200)
    indices = jnp.where((indices >= 0) & (indices < 300), indices, -1)

    @jax.jit
    def program(q, kv, indices):
        out, lse = kernel(128)(q * 1, kv[:, ::-1], kv.shape[1] - 1 - indices)
        return out[::-1], lse[::-1]

    expected = jax.tree.map(lambda x: x[::-1], kernel(128)(q, kv, indices))
    jax.tree.map(same_bits, program(q, kv, indices), expected)
