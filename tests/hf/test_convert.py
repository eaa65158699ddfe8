"""Checkpoints in and out: bitwise round trips, FP8, shards, one error for everything wrong, and atomic export."""

import dataclasses
import json
import operator
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import the_first
from convert_cases import (
    BFLOAT16,
    E4M3,
    FLOAT32_IN_HF,
    FP8_CONFIG,
    SMALL,
    random_tensors,
    read,
    refused,
    same,
    to_fp8,
    write,
)
from flax import nnx
from safetensors.numpy import load_file, save_file

from dsa_jax import Config, Transformer
from dsa_jax.__main__ import main
from dsa_jax.hf import files as hf_files
from dsa_jax.hf import stacked
from dsa_jax.hf.checkpoint import Checkpoint
from dsa_jax.hf.convert import convert_hf, load_hf, save_hf, to_hf
from dsa_jax.hf.table import TABLE, leaves

ORACLE = Path(__file__).parents[1] / "oracle"


def parameter(model, path):
    """Looks up a parameter by its path with dots."""
    return operator.attrgetter(path)(model)[...]


# The table.


@pytest.mark.parametrize(
    "config",
    [
        Config.tiny(),
        Config.tiny(first_k_dense_replace=0, tie_word_embeddings=True),
        Config.tiny(first_k_dense_replace=9, n_shared_experts=0, num_nextn_predict_layers=1),
        Config.tiny(n_shared_experts=0, num_nextn_predict_layers=2),
        Config.tiny(expert_dtype="fp8"),
        Config.deepseek_v32(),
    ],
)
def test_every_name_stands_once_in_the_table(config):
    names = [name for leaf in leaves(config) for _, name in leaf.tensors()]
    assert len(names) == len(set(names))
    abstract = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    parameters = [tuple(k.key for k in path[:-1]) for path, _ in jax.tree_util.tree_flatten_with_path(abstract)[0]]
    assert sorted(parameters) == sorted(leaf.path for leaf in leaves(config))
    shapes = [x.shape for x in jax.tree.leaves(abstract)]
    assert sorted(shapes) == sorted(leaf.shape(config) for leaf in leaves(config))


def test_the_published_names_and_shapes():
    config = Config.deepseek_v32()
    shapes = {name: leaf.entry.file_shape(config) for leaf in leaves(config) for _, name in leaf.tensors()}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (129280, 7168)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (7168, 18432)
    assert shapes["model.layers.2.self_attn.kv_b_proj.weight"] == (128 * 256, 512)
    assert shapes["model.layers.3.mlp.gate.e_score_correction_bias"] == (256,)
    assert shapes["model.layers.60.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert shapes["model.layers.60.self_attn.o_proj.weight"] == (7168, 128 * 128)
    assert shapes["model.layers.60.self_attn.indexer.wq_b.weight"] == (64 * 128, 1536)
    assert "model.layers.3.mlp.up_proj.weight" not in shapes and "model.layers.61.mlp.gate.weight" not in shapes
    assert sum(np.prod(shape) for shape in shapes.values()) == pytest.approx(672e9, rel=1e-3)


def test_matrices_are_transposed_and_split_by_head(tmp_path):
    tensors = random_tensors(dtype=np.float32)
    model = load_hf(write(tmp_path / "hf", tensors), dtype="float32")
    attention, moe = operator.attrgetter("moe_layers.self_attn", "moe_layers.mlp")(model)
    q_b, o = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in ("q_b", "o"))
    assert attention.q_b_proj[0, 5, 3, 7] == q_b[3 * 48 + 7, 5]
    assert attention.o_proj[0, 3, 7, 5] == o[5, 3 * 32 + 7]
    assert moe.experts.down_proj[0, 2, 9, 5] == tensors["model.layers.1.mlp.experts.2.down_proj.weight"][5, 9]
    assert model.embed_tokens[3, 5] == tensors["model.embed_tokens.weight"][3, 5]
    assert parameter(model, "lm_head")[5, 3] == tensors["lm_head.weight"][3, 5]


def test_any_subset_of_the_state_has_names(tmp_path):
    model = load_hf(write(tmp_path / "hf", random_tensors()))
    everything = dict(to_hf(model))
    indexer = nnx.state(model, lambda path, _: "indexer" in path)
    subset = dict(to_hf(indexer))
    assert subset.keys() == {name for name in everything if "indexer" in name} and len(subset) == 2 * 5
    assert all(np.array_equal(subset[name], everything[name]) for name in subset)
    moments = jax.tree.map(np.asarray, nnx.to_pure_dict(indexer))
    assert dict(to_hf(moments)).keys() == subset.keys()
    router = nnx.state(model, lambda path, _: "e_score_correction_bias" in path)
    with pytest.raises(ValueError, match="pass config="):
        list(to_hf(router))
    assert list(dict(to_hf(router, config=SMALL))) == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    with pytest.raises(ValueError, match="not parameters of a Transformer: norm.scale"):
        list(to_hf({"norm": {"scale": np.ones(3)}}))


# Round trips.


@pytest.mark.parametrize("name", the_first(2, ["glm", "deepseek_a0", "deepseek_b"]))
def test_float32_round_trip_is_bitwise(name, tmp_path):
    model = load_hf(ORACLE / name, dtype="float32")
    save_hf(model, tmp_path / "out")
    tensors = read(ORACLE / name)
    for extra in load_file(ORACLE / name / "expected.safetensors"):
        del tensors[extra]
    same(read(tmp_path / "out"), tensors)
    assert dataclasses.replace(Config.from_hf(tmp_path / "out"), dtype="float32") == model.config


def test_bfloat16_round_trip_is_bitwise(tmp_path):
    tensors = random_tensors()
    model = load_hf(write(tmp_path / "in", tensors))
    assert model.config.dtype == model.config.param_dtype == "bfloat16"
    assert parameter(model, "moe_layers.mlp.gate.e_score_correction_bias").dtype == jnp.float32
    assert parameter(model, "moe_layers.mlp.gate.weight").dtype == jnp.bfloat16
    save_hf(model, tmp_path / "out")
    same(read(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize("router", [np.float32, BFLOAT16])
def test_a_router_keeps_its_dtype(router, tmp_path):
    """In bfloat16 one token in a hundred would go to other experts."""
    tensors = random_tensors()
    tensors[ROUTER] = np.random.default_rng(1).normal(size=tensors[ROUTER].shape).astype(router)
    folder = write(tmp_path / "in", tensors)
    model = load_hf(folder, dtype="bfloat16")
    weight = np.asarray(parameter(model, "moe_layers.mlp.gate.weight")[0])
    assert weight.dtype == router
    np.testing.assert_array_equal(weight, tensors[ROUTER].T)
    save_hf(model, tmp_path / "saved", dtype="bfloat16")
    convert_hf(folder, tmp_path / "converted", dtype="bfloat16")
    for out in ("saved", "converted"):
        same(read(tmp_path / out), tensors)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_stored_dtype_is_kept_without_another(stored, tmp_path, caplog):
    tensors = random_tensors(dtype=jnp.dtype(stored))
    folder = write(tmp_path / "in", tensors)
    model = load_hf(folder)
    assert (model.config.dtype, model.config.param_dtype) == (stored, stored) and not caplog.records
    same({name: np.asarray(x) for name, x in to_hf(model)}, tensors)
    assert load_hf(folder, param_dtype=jnp.float32).config.dtype == stored
    wide = load_hf(folder, dtype=jnp.float32).config
    assert (wide.dtype, wide.param_dtype) == ("float32", "float32")


def test_the_dtype_of_most_parameters_wins_and_says_what_it_rounds(tmp_path, caplog):
    tensors = random_tensors()
    norms = [name for name in tensors if name.endswith("layernorm.weight")]
    folder = write(tmp_path / "in", tensors | {name: tensors[name].astype(np.float32) for name in norms})
    assert load_hf(folder).config.param_dtype == "bfloat16"
    (record,) = caplog.records
    assert record.message == (
        f"rounded {len(norms)} float32 tensors, such as model.layers.0.input_layernorm.weight, to bfloat16, which most "
        "parameters have: choose with dtype="
    )
    caplog.clear()
    load_hf(folder, dtype="bfloat16")
    assert not caplog.records
    convert_hf(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_bfloat16_survives_float32_parameters(tmp_path):
    """Trained parameters are float32; what has not moved is exported with the bits it came with."""
    tensors = random_tensors()
    model = load_hf(write(tmp_path / "in", tensors), param_dtype=jnp.float32)
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "float32")
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model)))
    save_hf(model, tmp_path / "out", dtype="bfloat16")
    exported = read(tmp_path / "out")
    kept = {name for name, x in exported.items() if x.dtype == np.float32}
    never_rounded = (*FLOAT32_IN_HF, ".indexer.k_norm.weight", ".indexer.k_norm.bias", ".mlp.gate.weight")
    assert kept == {name for name in tensors if name.endswith(never_rounded)}
    same({name: x.astype(tensors[name].dtype) for name, x in exported.items()}, tensors)


def test_shards(tmp_path):
    tensors = random_tensors()
    model = load_hf(write(tmp_path / "in", tensors))
    save_hf(model, tmp_path / "out", max_shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert held.keys() == {name for name, where in index["weight_map"].items() if where == file}
        assert sum(x.nbytes for x in held.values()) <= 100_000
    same(read(tmp_path / "out"), tensors)
    save_hf(load_hf(tmp_path / "out"), tmp_path / "again")
    same(load_file(tmp_path / "again" / "model.safetensors"), tensors)


def test_parameters_are_filled_in_place():
    x = jax.ShapeDtypeStruct((4, 8, 256, 512), jnp.float32)
    piece = stacked.Piece(jax.ShapeDtypeStruct((512, 256), BFLOAT16))
    compiled = stacked._place.lower(x, piece, (0, 0), inputs=1).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes == 4 * 8 * 256 * 512 * 4
    assert memory.temp_size_in_bytes <= 512 * 256 * 4


def test_one_tensor_is_read_at_a_time(tmp_path, monkeypatch):
    """Reads come in between writes, not all first."""
    folder, events, place = write(tmp_path / "in", random_tensors()), [], stacked._place
    original = hf_files.StoredTensor.read
    monkeypatch.setattr(hf_files.StoredTensor, "read", lambda *a: (events.append("read"), original(*a))[1])
    monkeypatch.setattr(stacked, "_place", lambda *a, **k: (events.append("place"), place(*a, **k))[1])
    load_hf(folder)
    assert events == ["read", "place"] * len(Checkpoint(folder).expected)


# FP8.


@pytest.mark.parametrize("scale_dtype", [np.float32, jnp.float8_e8m0fnu])
def test_fp8_comes_out_as_bfloat16(scale_dtype, tmp_path):
    stored, dequantized = to_fp8(random_tensors(), scale_dtype)
    folder = write(tmp_path / "fp8", stored, keys=FP8_CONFIG)
    assert sum(x.dtype == E4M3 for x in stored.values()) > 20
    assert stored["model.layers.0.mlp.gate_proj.weight_scale_inv"].shape == (2, 2)
    convert_hf(folder, tmp_path / "out")
    same(read(tmp_path / "out"), dequantized)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    save_hf(load_hf(folder), tmp_path / "again")
    same(read(tmp_path / "again"), dequantized)


def test_fp8_scales_are_checked(tmp_path):
    stored, _ = to_fp8(random_tensors(), np.float32)
    name = "model.layers.0.mlp.gate_proj.weight"
    del stored["model.layers.0.mlp.up_proj.weight_scale_inv"]
    stored[name + "_scale_inv"] = stored[name + "_scale_inv"][:1]
    stored["lm_head.weight_scale_inv"] = np.ones((1, 2), np.float32)
    message = refused(write(tmp_path / "fp8", stored, keys=FP8_CONFIG))
    assert "model.layers.0.mlp.up_proj.weight_scale_inv is missing" in message
    assert f"{name}_scale_inv must be F32 [2, 2], got F32 [1, 2]" in message
    assert "lm_head.weight_scale_inv is unexpected" in message


# What is wrong with the files.


def test_prediction_layers_are_skipped_with_one_warning(tmp_path, caplog):
    tensors = random_tensors()
    extra = {f"model.layers.2.{name}.weight": np.ones(3, np.float32) for name in ("enorm", "eh_proj", "mlp.gate")}
    model = load_hf(write(tmp_path / "in", tensors | extra))
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [
        ("dsa_jax.hf.checkpoint", "WARNING", "skipped 3 tensors of layer 2, past num_hidden_layers = 2")
    ]
    same({name: np.asarray(x) for name, x in to_hf(model)}, tensors)
    convert_hf(tmp_path / "in", tmp_path / "out")
    same(read(tmp_path / "out"), tensors)


def test_what_nobody_needs_is_skipped(tmp_path, caplog):
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    tensors = random_tensors(tied)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(2)}
    extra["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = load_hf(write(tmp_path / "in", tensors | extra, tied))
    same({name: np.asarray(x) for name, x in to_hf(model)}, tensors)
    assert not caplog.records
    convert_hf(tmp_path / "in", tmp_path / "out")
    same(read(tmp_path / "out"), tensors)


@pytest.mark.parametrize("change", ["values", "shape", "dtype"])
def test_a_tied_head_that_differs_is_refused(change, tmp_path):
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    tensors = random_tensors(tied)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    other = {"values": head, "shape": head[:-1], "dtype": head.astype(np.float32)}[change]
    message = refused(write(tmp_path / "in", tensors | {"lm_head.weight": other}, tied))
    assert (
        "lm_head.weight differs from model.embed_tokens.weight, to which tie_word_embeddings = true ties it" in message
    )


@pytest.mark.parametrize("left", ["nothing", "damaged", "whole"])
def test_a_shard_past_the_last_layer_is_not_opened(left, tmp_path, caplog):
    save_hf(load_hf(write(tmp_path / "in", random_tensors())), tmp_path / "hf", max_shard_bytes=200_000)
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {f"model.layers.2.{name}.weight": "last.safetensors" for name in ("enorm", "hnorm")}
    path.write_text(json.dumps(index))
    if left == "whole":
        save_file(
            {f"model.layers.2.{name}.weight": np.ones(3) for name in ("enorm", "hnorm")},
            path.parent / "last.safetensors",
        )
    elif left == "damaged":
        (path.parent / "last.safetensors").write_bytes(b"no safetensors")
    same({name: np.asarray(x) for name, x in to_hf(load_hf(tmp_path / "hf"))}, random_tensors())
    assert [r.message for r in caplog.records] == ["skipped 2 tensors of layer 2, past num_hidden_layers = 2"]


def test_one_error_names_everything(tmp_path):
    tensors = random_tensors()
    save_hf(load_hf(write(tmp_path / "in", tensors)), tmp_path / "hf", max_shard_bytes=60_000)
    folder = tmp_path / "hf"
    placed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(set(placed.values()))
    held = load_file(folder / files[0])
    gone, bent, halved = sorted(held)[:3]
    del held[gone]
    held[bent] = held[bent].reshape(-1)[:5]
    held[halved] = held[halved].astype(np.float16)
    held["model.layers.0.self_attn.q_proj.weight"] = np.ones((2, 2), np.float32)
    save_file(held, folder / files[0])
    os.truncate(folder / files[1], (folder / files[1]).stat().st_size - 1)
    (folder / files[2]).unlink()
    before = sorted(path.name for path in folder.iterdir())
    message = refused(folder)
    assert f"{gone} is missing" in message
    assert re.search(rf"{re.escape(bent)} must have shape \[.*\], got \[5\]", message)
    assert f"{halved} must be F32, BF16 or block-scaled F8_E4M3, got F16" in message
    assert "model.layers.0.self_attn.q_proj.weight is unexpected" in message
    assert f"{files[1]} is truncated or damaged" in message and f"{files[2]} is missing, and with it" in message
    assert message.count("is missing") == 2  # tensors of lost files are not named one by one
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_truncated_file(tmp_path, length):
    file = write(tmp_path / "hf", random_tensors()) / "model.safetensors"
    os.truncate(file, file.stat().st_size + length if length < 0 else length)
    assert "model.safetensors is truncated or damaged" in refused(tmp_path / "hf")


def test_an_index_that_lies(tmp_path):
    save_hf(load_hf(write(tmp_path / "in", random_tensors())), tmp_path / "hf", max_shard_bytes=200_000)
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = files[0]
    path.write_text(json.dumps(index))
    assert f"lm_head.weight is in {files[-1]}, where the index does not place it" in refused(tmp_path / "hf")
    index["weight_map"]["lm_head.weight"] = "../in/model.safetensors"
    path.write_text(json.dumps(index))
    assert "files of its own folder" in refused(tmp_path / "hf")
    path.write_text("{}")
    assert "is not the index" in refused(tmp_path / "hf")
    path.unlink()
    assert "found neither" in refused(tmp_path / "hf")


def test_a_checkpoint_of_another_config(tmp_path):
    folder = write(tmp_path / "hf", random_tensors(), dataclasses.replace(SMALL, hidden_size=128, num_hidden_layers=3))
    message = refused(folder)
    assert "model.embed_tokens.weight must have shape [32, 128], got [32, 160]" in message
    assert "model.layers.2.input_layernorm.weight is missing" in message and "problems more" in message


def test_what_load_hf_cannot_do(tmp_path):
    folder = write(tmp_path / "hf", random_tensors())
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'bfloat16', got 'float16'"):
        load_hf(folder, dtype=jnp.float16)
    with pytest.raises(ValueError, match="no_such_dtype"):
        save_hf(load_hf(folder), tmp_path / "out", dtype="no_such_dtype")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# Export is whole or nothing.


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    model = load_hf(write(tmp_path / "hf", random_tensors()))
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for taken in ("hf", "file"):
        with pytest.raises(ValueError, match="must be an empty folder or not exist"):
            save_hf(model, tmp_path / taken)
    same(read(tmp_path / "hf"), random_tensors())
    save_hf(model, tmp_path / "empty")
    same(read(tmp_path / "empty"), random_tensors())
    with pytest.raises(OSError):
        save_hf(model, tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "hf"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_last_shard_leaves_nothing(tmp_path, monkeypatch, error):
    model = load_hf(write(tmp_path / "hf", random_tensors()))
    written = []

    def fail_at_last(tensors, *arguments, **options):
        written.append(list(tensors))
        if "lm_head.weight" in tensors:
            raise error
        save_file(tensors, *arguments, **options)

    monkeypatch.setattr(hf_files, "save_file", fail_at_last)
    with pytest.raises(type(error)):
        save_hf(model, tmp_path / "out", max_shard_bytes=100_000)
    assert len(written) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk(tmp_path):
    """On a disk that takes no file of this size the command says so in one line, ends with status 2, leaves nothing."""
    write(tmp_path / "hf", random_tensors())
    command = [sys.executable, "-m", "dsa_jax", "convert", str(tmp_path / "hf"), str(tmp_path / "out")]
    limited = ["sh", "-c", 'ulimit -f 100; exec "$@"', "sh", *command]  # 100 blocks of 512 bytes or more
    done = subprocess.run(limited, cwd=ORACLE.parents[1], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "error: cannot write a shard" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# The command.


def test_convert_command(tmp_path, capsys):
    folder = write(tmp_path / "hf", random_tensors(), keys=dict(bos_token_id=7, num_nextn_predict_layers=1))
    (folder / "tokenizer.json").write_text("{}")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    same(read(tmp_path / "out"), {name: x.astype(np.float32) for name, x in random_tensors().items()})
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (data["torch_dtype"], data["bos_token_id"], data["num_nextn_predict_layers"]) == ("float32", 7, 0)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    back = read(tmp_path / "back")
    same({name: x.astype(random_tensors()[name].dtype) for name, x in back.items()}, random_tensors())
    assert back["model.layers.0.self_attn.indexer.weights_proj.weight"].dtype == np.float32
    capsys.readouterr()
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    total = sum(x.size for x in random_tensors().values())
    assert "hidden_size = 160" in out and f"{total:,}" in out and "indexer" in out


@pytest.mark.parametrize(
    ("program", "name"), [("/usr/bin/dsa-jax", "dsa-jax"), ("/lib/dsa_jax/__main__.py", "python -m dsa_jax")]
)
def test_the_command_calls_itself_as_it_was_called(program, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {name} [-h]")


def test_the_command_fails_in_one_line(tmp_path, capsys):
    folder = write(tmp_path / "hf", random_tensors())
    bad = shutil.copytree(folder, tmp_path / "bad")
    os.truncate(bad / "model.safetensors", 1000)
    (tmp_path / "file").write_text("x")
    for arguments, named in (
        (["info", str(tmp_path / "nowhere")], "nowhere"),
        (["info", str(bad)], "truncated"),
        (["convert", str(bad), str(tmp_path / "out")], "truncated"),
        (["convert", str(folder), str(bad)], "must be an empty folder"),
        (["convert", str(folder), str(tmp_path / "file" / "out")], "file"),
        (["convert", str(folder), str(tmp_path / "out"), "--max-shard-bytes", "0"], "max_shard_bytes"),
    ):
        assert main(arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and named in lines[0]
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(folder)])
    assert caught.value.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "file", "hf"]


def test_the_table_has_no_row_in_vain():
    used = {leaf.entry for leaf in leaves(Config.tiny(expert_dtype="fp8", num_nextn_predict_layers=1))}
    assert used == set(TABLE)
