"""How layers are cut into stacks: all of them once, in order, and few traced whatever the depth."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax import Config
from dsa_jax.stacks import MAX_PERIOD, kl_shares, leaders, stacked_layers

SHARED = {True: "full", False: "shared"}


def config_of(has_indexer, dense=0):
    types = tuple(SHARED[full] for full in has_indexer)
    return Config.tiny(num_hidden_layers=len(types), first_k_dense_replace=dense, indexer_types=types)


def glm(layers, dense=3, every=4, offset=3):
    """The pattern of GLM-5.2: the first layers full, then every fourth."""
    return [max(layer - offset + 1, 0) % every == 0 for layer in range(layers)]


def traced(config):
    return sum(len(stack.period) for stack in stacked_layers(config))


def test_a_model_that_shares_nothing_has_a_stack_of_each_kind():
    stacks = stacked_layers(Config.tiny())
    assert [(stack.name, stack.layers, stack.indexers) for stack in stacks] == [
        ("dense_layers", (0,), (0,)),
        ("moe_layers", (1, 2), (1, 2)),
    ]
    assert stacked_layers(Config.tiny(indexer_types=["full"] * 3)) == stacks


def test_the_published_pattern_is_scanned():
    config = config_of(glm(78), dense=3)
    assert config.num_index_layers == 21 and config.num_hidden_layers - config.num_index_layers == 57
    names = [(stack.name, len(stack.period), stack.repeats) for stack in stacked_layers(config)]
    assert names == [("dense_layers", 1, 2), ("dense_layers_1", 1, 1), ("moe_layers", 1, 3), ("moe_layers_1", 4, 18)]
    assert traced(config) == traced(config_of(glm(778), dense=3)) == 7


@pytest.mark.parametrize("period", ["FS", "FSSS", "FFS", "FSFSS", "F" + "S" * 15])
def test_repeated_periods_are_traced_once(period):
    counts = {traced(config_of([letter == "F" for letter in period * times])) for times in (10, 11, 40)}
    assert len(counts) == 1 and counts.pop() <= len(period)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.booleans(), max_size=40), st.integers(0, 41))
def test_any_pattern_is_cut_whole_and_in_order(rest, dense):
    has_indexer = [True, *rest]
    config = config_of(has_indexer, min(dense, len(has_indexer)))
    stacks = stacked_layers(config)
    assert [layer for stack in stacks for layer in stack.layers] == list(range(len(has_indexer)))
    assert [layer for stack in stacks for layer in stack.indexers] == [i for i, full in enumerate(has_indexer) if full]
    assert len({stack.name for stack in stacks}) == len(stacks)
    for stack, after in zip(stacks, [*stacks[1:], None], strict=True):
        assert stack.moe == (stack.first >= config.num_dense_layers)
        assert stack.first_indexer == sum(has_indexer[: stack.first])
        assert stack.period[0] or not any(stack.period)
        assert len(stack.period) <= MAX_PERIOD
        assert stack.hands_on == (after is not None and not has_indexer[after.first])
        assert not (stack.hands_on and stack.period[0] and stack.repeats > 1)


def test_what_each_indexer_serves():
    config = config_of([True, False, False, True, False])
    assert leaders(config) == (0, 0, 0, 3, 3)
    assert kl_shares(config) == (1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2)
    own = Config.tiny(num_hidden_layers=5, indexer_types=config.indexer_types, index_share_kl="own")
    assert kl_shares(own) == (1.0, 0.0, 0.0, 1.0, 0.0)
    assert kl_shares(Config.tiny()) == (1.0,) * 3
