"""Likeliest tokens are those of the logits, and agreement counts where a mask says so."""

import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import small_config
from train_cases import small_params

from studies.needle.agreement import agreement, likeliest
from studies.needle.questions import attending
from train.data import Batch
from train.phases import merge_groups
from train.state import abstract_params

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def test_the_likeliest_are_those_of_the_logits(monkeypatch):
    monkeypatch.setattr("studies.needle.agreement.CHUNK_TOKENS", 16)
    config = small_config()
    graphdef, params = abstract_params(config)[0], small_params(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, size=(2, 24)).astype(np.int32)
    batch = Batch.from_tokens(tokens)
    [found] = likeliest(graphdef, params, attending("dense"), [batch])
    model = merge_groups(graphdef, params)
    logits = model.unembed(model(jnp.asarray(tokens), keys=batch.keys, attention="dense").hidden)
    np.testing.assert_array_equal(found, np.argmax(logits, -1))


def test_shares_are_of_what_a_mask_counts():
    ours, theirs = [np.array([[1, 2, 3, 4]])], [np.array([[1, 2, 9, 9]])]
    masks = {"all": [np.ones((1, 4), bool)], "first": [np.array([[True, True, False, False]])]}
    masks |= {"none": [np.zeros((1, 4), bool)]}
    assert agreement(ours, theirs, masks) == {"all": 0.5, "first": 1.0}
