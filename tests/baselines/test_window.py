"""The sliding window: its selection against the definition, and in a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import random_range, same_bits
from model_cases import forward, model_parts, small_config, small_model, tokens

from dsa_jax import KeyRange, WindowMLA, window_selection

CONFIG = small_config(baseline="window", first_k_dense_replace=2)
PACKED = KeyRange.packed(jnp.array([[0] * 24, [0] * 9 + [1] * 11 + [-1] * 4]))


def test_the_last_keys_in_reach_are_selected():
    keys = random_range(0, 2, 30, 20)
    rows = reference.reachable(keys.start, keys.stop, 20)
    expected = [[[*row[-7:], *[-1] * (7 - len(row[-7:]))] for row in batch] for batch in rows]
    np.testing.assert_array_equal(window_selection(keys, 7), expected)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        window_selection(keys, 0)


@pytest.mark.usefixtures("in_a_hurry")
def test_a_model_attends_to_them_with_the_parameters_of_another():
    jax.tree.map(same_bits, model_parts(CONFIG)[1], model_parts(dataclasses.replace(CONFIG, baseline="none"))[1])
    assert type(next(small_model(CONFIG).layers()).self_attn) is WindowMLA
    out, _ = forward(CONFIG, tokens(2, 24), keys=PACKED)
    same_bits(out.selected, jnp.broadcast_to(window_selection(PACKED, CONFIG.index_topk), out.selected.shape))
