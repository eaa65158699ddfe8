"""What selections keep where layers share them: every run abreast is the model's own forward pass."""

import numpy as np
import pytest
from model_cases import forward, small_config, small_model, tokens

from dsa_jax import KeyRange
from train.data import Batch
from train.evaluation.kept_mass import measure_layers
from train.phases import window_selection

pytestmark = pytest.mark.usefixtures("in_a_hurry")

SIZES = dict(num_hidden_layers=4, first_k_dense_replace=0, index_n_heads=16, index_topk=4)
CONFIG = small_config(**SIZES, indexer_types=("full", "shared") * 2)


@pytest.mark.slow
def test_the_runs_abreast_are_the_models_own():
    model, batch = small_model(CONFIG), Batch.from_tokens(np.asarray(tokens(2, 25)))
    mass, hidden = measure_layers(model, {"indexer": model, "same": model}, batch)
    for attention, name in (("sparse", "indexer"), ("dense", "dense")):
        out, _ = forward(CONFIG, batch.tokens, attention=attention)
        np.testing.assert_allclose(hidden[name], out.hidden, atol=2e-5)
    window = window_selection(KeyRange(batch.start, batch.stop), 4)
    imposed = np.broadcast_to(np.asarray(window), (4, *window.shape))
    np.testing.assert_allclose(hidden["window"], forward(CONFIG, batch.tokens, selected=imposed)[0].hidden, atol=2e-5)
    assert mass["indexer"].shape == (4, 2, 25)
    np.testing.assert_array_equal(mass["indexer"], mass["same"])
    assert np.all(mass["indexer"][:, :, 3] > 0.999) and np.all(mass["indexer"] <= mass["oracle"] + 1e-5)
    # In the dense run a layer that shares keeps what its leader selects, which is not what its own attention would.
    assert np.mean(mass["oracle"][1] - mass["indexer"][1]) > 0
