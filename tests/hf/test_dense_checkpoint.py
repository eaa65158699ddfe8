"""Dense checkpoints, which have no indexer: it is drawn on loading, and the warm-up can begin."""

import dataclasses
import functools
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAST
from convert_cases import SMALL, random_tensors, read, refused, same, write
from flax import nnx
from train_cases import compiled, small_batch, small_phases

from dsa_jax import Config
from dsa_jax.__main__ import main
from dsa_jax.hf.convert import load_hf, save_hf, to_hf
from train.phases import split_groups
from train.saved.initial import InitialParams
from train.state import abstract_params, init_state
from train.step import make_step

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def write_dense(folder, *, present=()):
    """Writes a `deepseek_v3` checkpoint whose indexer has the tensors of these endings alone."""
    kept = {name: x for name, x in random_tensors().items() if ".indexer." not in name or name.endswith(present or "-")}
    return write(folder, kept, keys={"model_type": "deepseek_v3"})


def dense_logits(model):
    """Computes the model's logits with dense attention, which needs no indexer."""
    tokens = jnp.arange(24).reshape(2, 12) % SMALL.vocab_size
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, compiler_options=FAST)
    def forward(state):
        model = nnx.merge(graphdef, state)
        return model.unembed(model(tokens, attention="dense").hidden)

    return forward(state)


def test_a_dense_checkpoint_gets_an_indexer(tmp_path, caplog):
    folder, given = write_dense(tmp_path / "dense"), random_tensors()
    original = load_hf(write(tmp_path / "sparse", given), dtype="float32")
    model = load_hf(folder, dtype="float32")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "without an indexer" in record.message
    logits = dense_logits(model)
    assert jnp.isfinite(logits).all()
    np.testing.assert_array_equal(logits, dense_logits(original))
    save_hf(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "deepseek_v32"
    assert Config.from_hf(tmp_path / "out") == Config.from_hf(folder)
    exported = {name: x.astype(given[name].dtype) for name, x in read(tmp_path / "out").items()}
    same({name: x for name, x in exported.items() if "indexer" not in name}, read(folder))
    assert exported.keys() == given.keys()


@pytest.mark.slow
def test_the_warm_up_begins_from_a_dense_folder(tmp_path):
    folder, settings = write_dense(tmp_path / "dense"), small_phases()["WARMUP"]
    init = InitialParams(folder)
    config = init.config("float32")
    params = init.params(config)
    chex.assert_trees_all_equal(params, split_groups(load_hf(folder, dtype="float32"))[1])
    state, batch = init_state(params, settings, jnp.zeros(2, jnp.uint32)), small_batch(vocab=SMALL.vocab_size)
    _, metrics = compiled(make_step(abstract_params(config)[0], settings), state, batch)(state, batch)
    assert metrics["kl"] > 0 and metrics["grad_norm_indexer"] > 0


def test_a_new_indexer_is_drawn_by_seed(tmp_path):
    folder = write_dense(tmp_path / "dense")
    first, again, other = (dict(to_hf(load_hf(folder, dtype="float32", seed=seed))) for seed in (3, 3, 4))
    same(*({name: np.asarray(x) for name, x in each.items()} for each in (first, again)))
    assert {name for name in first if not np.array_equal(first[name], other[name])} == {
        name for name in first if "indexer.w" in name
    }
    for layer, part in itertools.product(range(2), ("wq_b", "wk", "weights_proj")):
        x = np.asarray(first[f"model.layers.{layer}.self_attn.indexer.{part}.weight"])
        assert x.std() == pytest.approx(SMALL.initializer_range, rel=0.05) and abs(x.mean()) < 0.05 * x.std()
        assert not np.array_equal(x, first[f"model.layers.{1 - layer}.self_attn.indexer.{part}.weight"])
    assert np.all(first["model.layers.1.self_attn.indexer.k_norm.weight"] == 1)
    assert not np.any(first["model.layers.1.self_attn.indexer.k_norm.bias"])


def test_an_indexer_is_there_or_not(tmp_path):
    message = refused(write_dense(tmp_path / "part", present=("wk.weight", "k_norm.bias")))
    assert message.count("is missing, 2 tensors") == 3
    assert "model.layers.{0–1}.self_attn.indexer.wq_b.weight is missing, 2 tensors" in message
    whole = load_hf(write_dense(tmp_path / "all", present=("weight", "bias")))
    same({name: np.asarray(x) for name, x in to_hf(whole)}, random_tensors())
    tensors = {name: x for name, x in random_tensors().items() if ".indexer." not in name}
    for rope in (False, True):
        config = dataclasses.replace(SMALL, index_rope_interleave=rope)
        assert refused(write(tmp_path / f"{rope}", tensors, config)).count("is missing, 2 tensors") == 5


def test_a_dense_checkpoint_is_converted_as_it_is(tmp_path, capsys, caplog):
    folder = write_dense(tmp_path / "dense")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--max-shard-bytes", "100000"]) == 0
    same(read(tmp_path / "out"), read(folder))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "deepseek_v3"
    capsys.readouterr()
    caplog.clear()
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "without an indexer" in caplog.text and "│ indexer" not in capsys.readouterr().out
