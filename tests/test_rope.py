"""Rotary embeddings against float64 NumPy written from the papers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array

from dsa_jax.config import Config, YaRN
from dsa_jax.rope import inv_frequencies, rotate_half_split, rotate_interleaved, rotation

# What transformers 5.23.0 computes in float32 for the published model (theta 1e4, R 64, YaRN 40 over 4096).
# fmt: off
PUBLISHED_FREQUENCIES = [
    1.000000000e+00, 7.498942018e-01, 5.623413324e-01, 4.216965139e-01, 3.162277639e-01, 2.371373624e-01,
    1.778279394e-01, 1.333521456e-01, 1.000000015e-01, 7.498941571e-02, 5.623412877e-02, 3.900692612e-02,
    2.687936090e-02, 1.837814413e-02, 1.244795602e-02, 8.334509097e-03, 5.500000436e-03, 3.561997321e-03,
    2.249365207e-03, 1.370513462e-03, 7.905694074e-04, 4.149904125e-04, 1.778279402e-04, 3.333803397e-05,
    2.499999937e-05, 1.874735426e-05, 1.405853254e-05, 1.054241238e-05, 7.905694474e-06, 5.928434348e-06,
    4.445698323e-06, 3.333803534e-06,
]
# fmt: on


def reference_frequencies(config):
    dim, yarn = config.qk_rope_head_dim, config.rope_scaling
    frequencies = []
    for i in range(dim // 2):
        plain = config.rope_theta ** (-2 * i / dim)
        if yarn is None:
            frequencies.append(plain)
            continue
        low, high = (
            dim * np.log(yarn.original_max_position_embeddings / (2 * np.pi * beta)) / (2 * np.log(config.rope_theta))
            for beta in (yarn.beta_fast, yarn.beta_slow)
        )
        low, high = max(np.floor(low), 0), min(np.ceil(high), dim - 1)
        stretched = min(max((i - low) / (high - low if high > low else 1e-3), 0), 1)
        frequencies.append(plain * (1 - stretched) + plain / yarn.factor * stretched)
    return np.array(frequencies)


CONFIGS = {
    "published": Config.deepseek_v32(),
    "tiny": Config.tiny(),
    "short": dataclasses.replace(Config.tiny(), qk_rope_head_dim=8, rope_scaling=YaRN(40.0, 64)),
    "one_bound": dataclasses.replace(Config.tiny(), qk_rope_head_dim=8, rope_scaling=YaRN(4.0, 16, 1.0, 1.0)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_frequencies_follow_yarn(config):
    frequencies = inv_frequencies(config)
    assert frequencies.dtype == np.float32 and frequencies.shape == (config.qk_rope_head_dim // 2,)
    np.testing.assert_allclose(frequencies, reference_frequencies(config), rtol=1e-7)


def test_published_frequencies_are_those_of_transformers():
    frequencies = inv_frequencies(Config.deepseek_v32())
    np.testing.assert_allclose(frequencies, PUBLISHED_FREQUENCIES, rtol=2.4e-7)  # two units in the last place


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_rotation_is_accurate_to_the_last_position(jit):
    config = Config.deepseek_v32()
    positions = array([[0, 1, 2, 77, 4095, 4096, 131071, 163839]], jnp.int32)
    compute = lambda p: rotation(p, config)
    cos, sin = (jax.jit(compute) if jit else compute)(positions)
    # The angle is float32 by definition (a checkpoint was trained so); its cosine is held to float64.
    angles = np.asarray(positions)[..., None].astype(np.float32) * inv_frequencies(config)
    np.testing.assert_allclose(cos, np.cos(angles.astype(np.float64)), atol=5e-7)
    np.testing.assert_allclose(sin, np.sin(angles.astype(np.float64)), atol=5e-7)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "ratio"),
    [
        (1.0, 1.0, 1.0),
        (0.707, 1.0, (0.0707 * np.log(40) + 1) / (0.1 * np.log(40) + 1)),
        (0.0, 0.0, 0.1 * np.log(40) + 1),
    ],
)
def test_magnitude_ratio_scales_cosine_and_sine(mscale, mscale_all_dim, ratio):
    config = dataclasses.replace(
        Config.tiny(), rope_scaling=YaRN(40.0, 64, mscale=mscale, mscale_all_dim=mscale_all_dim)
    )
    cos, sin = rotation(jnp.arange(5)[None], config)
    np.testing.assert_allclose(cos**2 + sin**2, np.full(cos.shape, ratio**2), rtol=1e-6)


def complex_rotation(x, positions, frequencies, pairs):
    """Each pair of columns is a complex number, turned by exp(i · position · frequency)."""
    out = np.array(x, np.float64)
    for i, (a, b) in enumerate(pairs):
        angle = positions.astype(np.float64) * frequencies[i]
        angle = angle.reshape(angle.shape + (1,) * (x.ndim - 3))
        turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angle)
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("heads", [(), (3,)], ids=["no_heads", "heads"])
@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
def test_rotations_turn_their_pairs(layout, heads):
    config = dataclasses.replace(Config.tiny(), qk_rope_head_dim=8)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, *heads, 8))
    positions = rng.integers(0, 500, (2, 5))
    cos, sin = rotation(array(positions, jnp.int32), config)
    rotate = {"interleaved": rotate_interleaved, "half_split": rotate_half_split}[layout]
    pairs = {"interleaved": [(0, 1), (2, 3), (4, 5), (6, 7)], "half_split": [(0, 4), (1, 5), (2, 6), (3, 7)]}[layout]
    expected = complex_rotation(x, positions, reference_frequencies(config), pairs)
    rotated = rotate(array(x, jnp.float32), cos, sin)
    np.testing.assert_allclose(rotated, expected, atol=1e-4)
    assert np.abs(np.asarray(rotated) - x).max() > 0.1

    low = rotate(array(x, jnp.bfloat16), cos, sin)
    assert low.dtype == jnp.bfloat16
    in_float32 = rotate(array(x, jnp.bfloat16).astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(low, in_float32.astype(jnp.bfloat16))


def test_products_depend_on_distance_alone():
    config = dataclasses.replace(Config.deepseek_v32(), qk_rope_head_dim=8)
    x = array(np.random.default_rng(1).standard_normal((2, 1, 8)), jnp.float32)
    for rotate in (rotate_interleaved, rotate_half_split):
        at = lambda p: rotate(x, *rotation(jnp.full((2, 1), p), config))  # noqa: B023
        near, far = (jnp.vdot(at(p)[0], at(p + 3)[1]) for p in (2, 900))
        np.testing.assert_allclose(near, far, atol=1e-3)


def test_wrong_shapes_are_named(unchecked):
    cos, sin = rotation(jnp.arange(5)[None], dataclasses.replace(Config.tiny(), qk_rope_head_dim=8))
    with pytest.raises(ValueError, match=r"needs cos and sin of shape \(1, 5, 4\)"):
        rotate_interleaved(jnp.zeros((1, 5, 8)), cos[:, :4], sin[:, :4])
    with pytest.raises(ValueError, match=r"needs cos and sin of shape \(1, 5, 3\)"):
        rotate_half_split(jnp.zeros((1, 5, 2, 6)), cos, sin)
