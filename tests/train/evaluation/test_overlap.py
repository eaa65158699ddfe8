"""The overlap of layers' selections against sets, and the command that prints it."""

import json

import numpy as np
import pytest
from cases import the_first
from model_cases import forward, small_config, small_model, tokens

from dsa_jax import KeyRange, save_hf
from train.__main__ import main
from train.data import Batch
from train.evaluation.overlap import Overlap, letters, measure_overlap

pytestmark = pytest.mark.usefixtures("in_a_hurry")

SIZES = dict(num_hidden_layers=4, first_k_dense_replace=0, index_n_heads=16, index_topk=4)
CONFIG = small_config(**SIZES)
SHARED = small_config(**SIZES, indexer_types=("full", "shared", "full", "shared"))


def by_sets(config, batch, places):
    """The share of a layer's keys that another selects too, query by query, over sets."""
    selected = np.asarray(forward(config, batch.tokens, keys=KeyRange(batch.start, batch.stop))[0].selected)
    share = np.zeros((4, 4))
    for row, place in places:
        sets = [set(selected[layer, row, place].tolist()) - {-1} for layer in range(4)]
        share += [[len(a & b) / len(a) for b in sets] for a in sets]
    return share / len(places)


@pytest.mark.slow
@pytest.mark.parametrize("config", the_first(1, [SHARED, CONFIG]))
def test_it_is_the_overlap_of_sets(config):
    batch = Batch.from_tokens(np.asarray(tokens(2, 25)))
    found = measure_overlap(small_model(config), [batch], queries=64)
    reach = batch.stop - batch.start >= 16
    assert found.k == 4 and found.queries == 128
    drawn = measure_overlap(small_model(config), [batch], queries=int(reach[0].sum()))  # each once
    places = [(row, place) for row in range(2) for place in np.flatnonzero(reach[row])]
    np.testing.assert_allclose(drawn.share, by_sets(config, batch, places), atol=1e-6)
    if config is SHARED:
        assert drawn.share[1][0] == drawn.share[3][2] == 1.0 > drawn.share[2][1]
        assert drawn.pattern(0.999) == SHARED.indexer_types


def test_what_is_proposed():
    found = Overlap(8, 1, [[1.0, 0.7, 0.9], [0.7, 1.0, 0.8], [0.9, 0.8, 1.0]])
    assert [letters(found.pattern(least)) for least in (0.0, 0.7, 0.75, 0.85, 1.0)] == [
        "FSS",
        "FSS",
        "FFS",
        "FFF",
        "FFF",
    ]


def test_sequences_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="no query reaches 4 times index_topk = 4 keys: give longer sequences"):
        measure_overlap(small_model(CONFIG), [Batch.from_tokens(np.asarray(tokens(1, 12)))], queries=4)


def test_the_command(tmp_path, capsys):
    config = small_config(vocab_size=256, **SIZES)
    save_hf(small_model(config), tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"line {i} = {i * i}\n" for i in range(60)))
    out = tmp_path / "overlap.json"
    given = [str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--seq-len", "64", "--batches", "1"]
    assert main(["overlap", *given, "--queries", "8", "--least", "0.3", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["queries"] == 8 and np.shape(found["share"]) == (4, 4) and found["indexer_types"][0] == "full"
    printed = capsys.readouterr().out
    assert "8 queries, which select 4 keys in each layer" in printed
    assert f"{found['share'][3][2]:.3f}" in printed and letters(found["indexer_types"]) in printed
    assert main(["overlap", *given, "--queries", "0"]) == 2
    assert "queries must be at least 1" in capsys.readouterr().err
