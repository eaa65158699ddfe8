"""Presets are written by hand, printed, and completed by the weights that a run begins with, or refused by name."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import small_config, small_params, small_run, state_of, write_preset

from dsa_jax import Config, YaRN, load_hf, save_hf
from dsa_jax.hf.files import write_json
from train.__main__ import main
from train.commands.arguments import Arguments
from train.phases import merge_groups, split_groups
from train.post import presets as post_presets
from train.presets import PRESETS, load_preset, merge_model
from train.run import Run
from train.saved.changes import Position
from train.saved.checkpoint import Checkpoints
from train.saved.initial import FREE_FIELDS, INDEXER_SIZES, InitialParams
from train.settings import RunConfig, nearest
from train.state import abstract_params

pytestmark = pytest.mark.usefixtures("in_a_hurry")
EXAMPLE = Path(__file__).parents[2] / "docs" / "presets" / "indexer_then_sparse.json"
HIDDEN = small_config().hidden_size


def model_of(config):
    return merge_groups(abstract_params(config)[0], jax.tree.map(jnp.array, small_params(config)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Leaves a checkpoint with an indexer, whose K is 3."""
    folder = tmp_path_factory.mktemp("checkpoints") / "sparse"
    save_hf(model_of(small_config(index_topk=3)), folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory, checkpoint):
    """Leaves the same as a dense checkpoint, of a model_type without an indexer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "dense"
    save_hf(model_of(small_config(index_topk=3)), folder)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if ".indexer." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    index = ("index_topk", "index_n_heads", "index_head_dim")
    values = {key: value for key, value in values.items() if key not in index} | {"model_type": "deepseek_v3"}
    write_json(folder / "config.json", values)
    return folder


def preset(tmp_path, **changes) -> str:
    """Writes a preset, without those parts that are given as None."""
    values = small_run(tmp_path / "text").to_json() | changes
    path = tmp_path / "preset.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return str(path)


def begun(tmp_path, init, **changes) -> RunConfig:
    return Arguments(preset(tmp_path, **changes), init=init, phases=("WARMUP", "SPARSE")).run_config()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_printed_as_a_file_that_loads_back(name, tmp_path, capsys):
    assert main(["preset", name]) == 0
    path = tmp_path / "mine.json"
    path.write_text(capsys.readouterr().out)
    assert load_preset(str(path)) == PRESETS[name]()
    assert main(["preset", str(path)]) == 0
    assert capsys.readouterr().out == path.read_text()


def test_a_preset_of_post_training_is_printed_likewise(tmp_path, capsys):
    assert main(["preset", "grpo", "--post"]) == 0
    path = tmp_path / "mine.json"
    path.write_text(capsys.readouterr().out)
    assert post_presets.load_preset(str(path)) == post_presets.grpo()


def test_a_preset_that_there_is_not(capsys):
    assert main(["preset", "huge"]) == 2
    assert "preset must be tiny or sft or deepseek_v32 or a .json file, got 'huge'" in capsys.readouterr().err
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        main(["preset"])


def test_the_documented_preset_is_a_whole_run_but_for_its_model():
    model = Config.deepseek_v32()
    run = load_preset(str(EXAMPLE), model=model, free=FREE_FIELDS)
    assert run.model == dataclasses.replace(model, index_topk=1024)
    assert [(phase.name, phase.steps) for phase in run.phases] == [("WARMUP", 1000), ("SPARSE", 5000)]
    with pytest.raises(ValueError, match="has no model|lacks the fields"):
        RunConfig.from_json({k: v for k, v in json.loads(EXAMPLE.read_text()).items() if k != "model"})
    assert json.dumps(json.loads(EXAMPLE.read_text())) in {
        json.dumps(json.loads(block.split("```")[0]))
        for block in (EXAMPLE.parents[1] / "runs.md").read_text().split("```json\n")[1:]
    }


def test_without_a_model_and_without_weights_the_way_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"preset.json has no model: describe it there, or .*by --init"):
        load_preset(preset(tmp_path, model=None))


def test_a_preset_may_leave_the_model_to_the_weights(tmp_path, checkpoint):
    expected = small_config(index_topk=3)
    assert begun(tmp_path, checkpoint, model=None).model == dataclasses.replace(expected, dtype="bfloat16")
    assert begun(tmp_path, checkpoint, model={"dtype": "float32"}).model == expected


def test_what_no_weight_depends_on_may_be_chosen(tmp_path, checkpoint):
    rope = {"factor": 2.0, "original_max_position_embeddings": 64}
    asked = {"index_topk": 16, "index_fp8": True, "dtype": "float32", "rope_scaling": rope, "hidden_size": HIDDEN}
    variant = {"index_kl_target": "max", "baseline": "blocks", "block_size": 8}
    run = begun(tmp_path, checkpoint, model=asked | variant, seed=7)
    assert run.model == small_config(index_topk=16, index_fp8=True, rope_scaling=YaRN(2.0, 64), **variant)
    assert run.seed == 7
    chex.assert_trees_all_equal(InitialParams(checkpoint).params(run.model), small_params(small_config(index_topk=3)))


def test_what_the_weights_decide_is_refused_by_name(tmp_path, checkpoint):
    with pytest.raises(ValueError) as error:
        begun(tmp_path, checkpoint, model={"index_n_heads": 2, "hidden_size": 32, "index_topk": 5})
    message = str(error.value)
    assert "index_n_heads 4, here 2; hidden_size 16, here 32; it may" in message and "index_topk" in message
    with pytest.raises(ValueError, match=r"unknown fields \['hiden_size'\]; nearest: hidden_size"):
        begun(tmp_path, checkpoint, model={"hiden_size": 32})
    with pytest.raises(ValueError, match="run.model must be an object"):
        begun(tmp_path, checkpoint, model=[3])


def test_a_preset_by_name_takes_the_model_of_the_weights(checkpoint):
    with pytest.raises(ValueError, match="seq_len must be at most the model's max_position_embeddings 64"):
        Arguments("tiny", init=checkpoint).run_config()
    assert load_preset("tiny", model=Config.deepseek_v32()).model == Config.deepseek_v32()


def test_the_indexer_that_a_dense_checkpoint_lacks_may_be_of_any_size(tmp_path, dense):
    assert set(INDEXER_SIZES) <= set(InitialParams(dense).free_fields())
    asked = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 5, "dtype": "float32"}
    run = begun(tmp_path, dense, model=asked, seed=3)
    params = InitialParams(dense).params(run.model, seed=run.seed)
    chex.assert_trees_all_equal_shapes(params, abstract_params(run.model)[1])
    chex.assert_trees_all_equal(params["backbone"], small_params(small_config(index_topk=3))["backbone"])
    other = InitialParams(dense).params(run.model, seed=4)["indexer"]
    differ = jax.tree.map(lambda x, y: bool((x != y).any()), params["indexer"], other)
    assert any(jax.tree.leaves(differ))
    with pytest.raises(ValueError, match="hidden_size 16, here 32"):
        begun(tmp_path, dense, model={"hidden_size": 32, "index_n_heads": 2})


def test_a_config_that_does_not_fit_the_files_is_refused(checkpoint, dense):
    for folder in (checkpoint, dense):
        with pytest.raises(ValueError, match=r"config must give the tensors of .* got .* of shape \(.*, one of"):
            load_hf(folder, config=small_config(kv_lora_rank=16))
    with pytest.raises(ValueError, match="of shape None instead of"):
        load_hf(checkpoint, config=small_config(num_hidden_layers=1))
    with pytest.raises(ValueError, match="indexer"):
        load_hf(checkpoint, config=small_config(index_n_heads=2))
    model = load_hf(checkpoint, config=small_config(index_topk=9), dtype="bfloat16")
    assert model.config == small_config(index_topk=9, dtype="bfloat16")


def test_a_run_to_begin_from_gives_its_model_too(tmp_path):
    run, source = small_run(tmp_path / "text"), tmp_path / "source"
    Run(run, source).open(resume=False)
    with Checkpoints(source / "checkpoints", run) as checkpoints:
        checkpoints.save(state_of(run), Position(3, 0, 3, {}))
    assert begun(tmp_path, source, model=None).model == run.model
    assert begun(tmp_path, source, model={"index_topk": 9}).model == dataclasses.replace(run.model, index_topk=9)
    with pytest.raises(ValueError, match="index_n_heads 4, here 2"):
        begun(tmp_path, source, model={"index_n_heads": 2})


def test_fields_are_merged_as_values_not_as_spelled():
    """A whole number is a float where that is wanted, and YaRN's defaults need not be written."""
    model = small_config(rope_scaling=YaRN(2.0, 64))
    given = {"rope_theta": 10000, "rope_scaling": {"factor": 2, "original_max_position_embeddings": 64}}
    assert merge_model(given, model, ()) == merge_model({}, model, ())


def test_the_nearest_names_are_said():
    values = small_run_json()
    for change, message in {
        ("phasis", 3): r"run has unknown fields \['phasis'\]; nearest: phases",
        ("learning_rte", 1): r"backbone has unknown fields \['learning_rte'\]; nearest: learning_rate",
    }.items():
        spoilt = json.loads(json.dumps(values))
        where = spoilt if change[0] == "phasis" else spoilt["phases"][0]["backbone"]
        where[change[0]] = change[1]
        with pytest.raises(ValueError, match=message):
            RunConfig.from_json(spoilt)
    del values["phases"][0]["stages"][0]["seq_len"]
    with pytest.raises(ValueError, match=r"run.phases\[0\].stages\[0\] lacks the fields \['seq_len'\] of Stage"):
        RunConfig.from_json(values)
    assert nearest(["x" * 10**6, "zzz"], ["seed"]) == ""


def small_run_json():
    return json.loads(json.dumps(PRESETS["tiny"]().to_json()))


def test_a_fingerprint_is_of_content(checkpoint, dense, tmp_path):
    first = InitialParams(checkpoint).fingerprint()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert InitialParams(copy).fingerprint() == first != InitialParams(dense).fingerprint()
    weights = copy / "model.safetensors"
    for place in (0, -1):
        content = bytearray(weights.read_bytes())
        content[place] ^= 1
        weights.write_bytes(content)
        assert InitialParams(copy).fingerprint() != first
        content[place] ^= 1
        weights.write_bytes(content)
    assert InitialParams(copy).fingerprint() == first


def test_large_files_are_sampled_from_end_to_end(tmp_path, checkpoint):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    content = np.zeros(10**6, np.uint8)
    found = set()
    for place in (None, 0, 10**6 - 1, 66_394 + 2048):  # the second sample begins at (10⁶ - 4096) / 15
        content[:] = 0
        if place is not None:
            content[place] = 1
        content.tofile(tmp_path / "model.safetensors")
        found.add(InitialParams(tmp_path).fingerprint())
    assert len(found) == 4


def test_a_checkpoint_is_begun_from_as_it_is(tmp_path, checkpoint):
    path = str(write_preset(small_run(tmp_path / "text"), tmp_path / "p.json"))
    with pytest.raises(ValueError, match="give --init"):
        Arguments(path, phases=("WARMUP",)).runs()
    (run,) = Arguments(path, init=checkpoint, phases=("WARMUP",)).runs()
    chex.assert_trees_all_equal(run.initial_params(), small_params(small_config(index_topk=3)))
    chex.assert_trees_all_equal(split_groups(load_hf(checkpoint))[1], run.initial_params())
