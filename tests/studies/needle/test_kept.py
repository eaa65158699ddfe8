"""A model kept in 8 bits becomes the dense checkpoint that it was, up to the rounding of a row."""

import jax
import numpy as np
import pytest
from model_cases import small_config
from train_cases import small_params

from dsa_jax import to_hf
from studies.needle import kept
from studies.needle.kept import keep, restore
from train.phases import merge_groups
from train.saved.initial import InitialParams
from train.state import abstract_params

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def test_a_model_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "FILE_BYTES", 4096)
    config = small_config()
    model = merge_groups(abstract_params(config)[0], small_params(config))
    keep(model, tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) > 3
    with pytest.raises(FileExistsError):
        keep(model, tmp_path / "kept")
    folder = restore(tmp_path / "kept", tmp_path / "dense")
    assert restore(tmp_path / "kept", tmp_path / "dense") == folder
    loaded = InitialParams(folder).params(config)
    again = dict(to_hf(merge_groups(abstract_params(config)[0], loaded)))
    compared = 0
    for name, array in to_hf(model):
        if ".indexer." not in name:
            before, after = (np.asarray(x, np.float32) for x in (array, again[name]))
            # Half a step of 1/127 of the row's largest, and bfloat16's own rounding.
            bound = np.abs(before).max(-1, keepdims=True) * (0.5 / 127 + 2**-8)
            assert (np.abs(after - before) <= bound + 1e-7).all(), name
            compared += 1
    assert compared > 10
    wide = small_config(index_n_heads=2 * config.index_n_heads)
    shapes = jax.tree.map(lambda x: x.shape, InitialParams(folder).params(wide)["indexer"])
    assert shapes == jax.tree.map(lambda x: x.shape, abstract_params(wide)[1]["indexer"])


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="base must be a folder with config.json and kept-0.safetensors"):
        restore(tmp_path, tmp_path / "dense")
