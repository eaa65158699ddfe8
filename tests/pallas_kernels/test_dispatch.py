"""The choice between kernels and XLA: made when lowering, for the platform lowered for, and never silently."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu

import dsa_jax
from dsa_jax import KeyRange, latent_attention
from dsa_jax.pallas_kernels import CAPABILITY, assume_gpu, check_implementation, choose_implementation, dispatch

X = jnp.arange(128, dtype=jnp.float32)


def add(x, y, *, amount):
    return x + y + amount, x


def add_kernel(x, y, *, amount):
    def body(x_gmem, y_gmem, out_gmem):
        out_gmem[...] = x_gmem[...] + y_gmem[...] + amount

    return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))(x, y), x


def chosen(implementation, why_not=None, amount=1.0):
    return choose_implementation(
        "add",
        implementation,
        why_not,
        xla=functools.partial(add, amount=amount),
        pallas=functools.partial(add_kernel, amount=amount),
    )


@pytest.fixture
def gpu():
    """Pretends for the rest of a test that this machine's GPUs have a compute capability."""
    with contextlib.ExitStack() as stack:
        yield lambda capability: stack.enter_context(assume_gpu(capability))


def has_kernel(fn, *platforms, arrays=(X, X)):
    """Whether the module lowered for these platforms calls a Mosaic GPU kernel."""
    if len(platforms) > 1:
        return "mosaic_gpu" in export.export(jax.jit(fn), platforms=platforms)(*arrays).mlir_module()
    return "mosaic_gpu" in jax.jit(fn).trace(*arrays).lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize(
    ("implementation", "capability", "why_not", "cuda", "cpu"),
    [
        (None, None, None, False, False),
        (None, "8.0", None, False, False),
        (None, "10.0", None, False, False),
        (None, CAPABILITY, "too small", False, False),
        (None, CAPABILITY, None, True, False),
        ("xla", CAPABILITY, None, False, False),
    ],
)
def test_the_choice_by_platform(gpu, implementation, capability, why_not, cuda, cpu):
    gpu(capability)
    fn = chosen(implementation, why_not)
    assert has_kernel(fn, "cuda") == cuda
    assert has_kernel(fn, "cpu") == cpu
    assert not has_kernel(fn, "tpu")
    assert not has_kernel(fn, "cpu", "cuda")  # Pallas cannot be exported to several platforms at once
    for call in (fn, jax.jit(fn), jax.vmap(fn)):
        arrays = (X[None], X[None]) if call is not fn else (X, X)
        out, same = call(*arrays)
        np.testing.assert_array_equal(np.ravel(out), 2 * X + 1)
        np.testing.assert_array_equal(np.ravel(same), X)


def test_insisting_takes_the_kernel_without_a_gpu_too():
    assert has_kernel(chosen("pallas"), "cuda")
    assert has_kernel(jax.vmap(chosen("pallas"), (0, None)), "cuda", arrays=(jnp.stack([X, X]), X))


def test_a_vmapped_choice_maps_what_is_mapped(gpu):
    gpu(CAPABILITY)
    x = jnp.stack([X, 3 * X])
    out, _ = jax.jit(jax.vmap(chosen(None), (None, 1)))(X, x.T)
    np.testing.assert_array_equal(out, X + x + 1)


def test_what_is_called_twice_is_compiled_once(gpu):
    gpu(CAPABILITY)
    chosen(None)(X, X)
    before = dispatch._compile._cache_size()
    chosen(None)(X, X)
    assert dispatch._compile._cache_size() == before
    np.testing.assert_array_equal(chosen(None, amount=5.0)(X, X)[0], 2 * X + 5)


@pytest.mark.parametrize(
    "call", [lambda f: f(X, X), lambda f: jax.jit(f)(X, X), lambda f: jax.vmap(f)(X[None], X[None])]
)
def test_insisting_fails_where_there_is_no_hopper(call):
    with pytest.raises(ValueError, match=r"add needs an NVIDIA Hopper GPU .*9\.0.*got cpu"):
        call(chosen("pallas"))


def test_insisting_names_the_reason(gpu):
    with pytest.raises(ValueError, match="add has no kernel for this: J must be 64, got 3"):
        chosen("pallas", "J must be 64, got 3")
    gpu("8.9")
    with pytest.raises(ValueError, match=r"needs an NVIDIA Hopper GPU .*got compute capability 8\.9"):
        chosen("pallas")
    with pytest.raises(ValueError, match="implementation must be None, 'xla' or 'pallas', got 'triton'"):
        chosen("triton")
    with pytest.raises(ValueError, match="halve has no Pallas kernel"):
        check_implementation("halve", "pallas")


# The switch for a block of code.


def test_a_block_says_what_is_taken_where_the_choice_is_open(gpu):
    gpu(CAPABILITY)
    with dsa_jax.implementation("xla"):
        assert not has_kernel(chosen(None), "cuda")
        assert has_kernel(chosen("pallas"), "cuda")  # an operation's own word counts more
        with dsa_jax.implementation(None):
            assert has_kernel(chosen(None), "cuda")
        assert not has_kernel(chosen(None), "cuda")
    assert has_kernel(chosen(None), "cuda")


def test_a_block_that_insists_refuses_what_has_no_kernel():
    q, kv = jnp.ones((1, 2, 1, 8)), jnp.ones((1, 2, 8))
    attend = functools.partial(latent_attention, q, kv, KeyRange.causal(1, 2), value_dim=4, scale=1.0)
    expected = attend()
    with dsa_jax.implementation("pallas"):
        assert has_kernel(chosen(None), "cuda")
        with pytest.raises(ValueError, match="add has no kernel for this: too small"):
            chosen(None, "too small")
        with pytest.raises(ValueError, match="latent_attention has no Pallas kernel"):
            attend()
        np.testing.assert_array_equal(attend(implementation="xla")[0], expected[0])
    np.testing.assert_array_equal(attend()[0], expected[0])


def test_what_was_compiled_outside_a_block_is_compiled_anew_inside(gpu):
    gpu(CAPABILITY)
    taken = []

    @jax.jit
    def run(x):
        taken.append(dispatch.resolve(None))
        return chosen(None)(x, x)[0]

    for _ in range(2):
        run(X)
        with dsa_jax.implementation("xla"):
            run(X)
    assert taken == [None, "xla"]


def test_a_block_ends_with_an_error_too_and_names_are_checked():
    with pytest.raises(RuntimeError), dsa_jax.implementation("xla"):
        raise RuntimeError
    assert dispatch.resolve(None) is None
    with pytest.raises(ValueError, match="implementation must be None, 'xla' or 'pallas', got 'triton'"):
        dsa_jax.implementation("triton")
