"""The tests' own checker of shapes."""

import inspect

import jax.numpy as jnp
import jaxtyping
import pytest

from dsa_jax import quantization, select_topk, stacks


def test_what_names_shapes_is_checked_and_nothing_else_is_wrapped():
    with pytest.raises(jaxtyping.TypeCheckError, match="hadamard"):
        quantization.hadamard(jnp.ones(4, bool))
    assert hasattr(select_topk, "__wrapped__")
    assert all(not hasattr(each, "__wrapped__") for _, each in inspect.getmembers(stacks, inspect.isfunction))
