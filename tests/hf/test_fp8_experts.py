"""Experts that stay in FP8: loaded as they are stored, run with the bits of bfloat16, saved as they came, refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import the_first
from convert_cases import BFLOAT16, E4M3, FP8_CONFIG, SMALL, random_tensors, same, to_fp8, write
from flax import nnx
from jax.sharding import NamedSharding

from dsa_jax import LLM, Config, PagedCache, Runner, SamplingParams, forward_on_mesh
from dsa_jax.__main__ import main
from dsa_jax.hf.checkpoint import Checkpoint
from dsa_jax.hf.convert import _fill, convert_hf, load_hf, save_hf, to_hf
from dsa_jax.hf.files import read_headers
from dsa_jax.hf.stacked import tensor_at
from dsa_jax.hf.table import TABLE, leaves
from dsa_jax.inference.tokenizer import byte_tokenizer
from dsa_jax.parallel.sharding import check_model, make_mesh, parameter_axes, path_names, spec
from train.compiling import compiling_quickly

SCALE = "_scale_inv"
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
MOE = dataclasses.replace(SMALL, first_k_dense_replace=0)  # one stack of two layers compiles in half the time
# Two blocks each way, whole ones: what a mesh can split.
WIDE = dataclasses.replace(
    MOE, num_hidden_layers=1, hidden_size=256, moe_intermediate_size=256, q_lora_rank=32, kv_lora_rank=32
)


def small_tensors(config=MOE):
    """Draws tensors at a trained model's size, so that no logit saturates."""
    return {name: (0.1 * x).astype(x.dtype) for name, x in random_tensors(config).items()}


@pytest.fixture(scope="module")
def stored():
    """The tensors of an FP8 checkpoint, and those of the same in bfloat16."""
    return to_fp8(small_tensors(), np.float32)


@pytest.fixture(scope="module")
def folder(stored, tmp_path_factory):
    """A folder with that checkpoint."""
    return write(tmp_path_factory.mktemp("fp8") / "hf", stored[0], MOE, keys=FP8_CONFIG)


@pytest.fixture(scope="module")
def models(folder):
    """The same model twice, its experts in bfloat16 and in FP8."""
    return load_hf(folder), load_hf(folder, expert_dtype="fp8")


def read(folder):
    """Reads all tensors of a folder; of those in FP8 the safetensors library makes no arrays of NumPy's."""
    return {name: tensor.read() for name, tensor in read_headers(folder, lambda _: True).stored.items()}


def experts_of(model):
    """Lists the parameters of the routed experts by name."""
    return {path_names(path)[-1]: x for path, x in jax.tree.leaves_with_path(nnx.state(model.moe_layers.mlp.experts))}


def tokens(*shape):
    """Draws token ids."""
    return np.random.default_rng(3).integers(0, SMALL.vocab_size, shape).astype(np.int32)


# As they are stored.


def test_experts_are_held_as_they_are_stored(models, stored):
    wide, narrow = models
    assert narrow.config == dataclasses.replace(wide.config, expert_dtype="fp8")
    held = experts_of(narrow)
    assert {name: (x.dtype, x.shape) for name, x in held.items()} == {
        "gate_proj": (E4M3, (2, 4, 160, 24)),
        "gate_proj_scale": (np.float32, (2, 4, 2, 1)),
        "up_proj": (E4M3, (2, 4, 160, 24)),
        "up_proj_scale": (np.float32, (2, 4, 2, 1)),
        "down_proj": (E4M3, (2, 4, 24, 160)),
        "down_proj_scale": (np.float32, (2, 4, 1, 2)),
    }
    for name in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(4):
            file = f"model.layers.1.mlp.experts.{expert}.{name}.weight"
            assert np.asarray(held[name][1, expert]).T.tobytes() == stored[0][file].tobytes()
            np.testing.assert_array_equal(np.asarray(held[name + "_scale"][1, expert]).T, stored[0][file + SCALE])
    others = [x.dtype for x in jax.tree.leaves(nnx.state(narrow, lambda path, _: "experts" not in path))]
    assert E4M3 not in others and jnp.bfloat16 in others


def test_the_published_scales():
    shapes = {entry.path.split(".")[-1]: entry.file_shape(Config.deepseek_v32()) for entry in TABLE if entry.scale}
    assert shapes == {"gate_proj_scale": (16, 56), "up_proj_scale": (16, 56), "down_proj_scale": (56, 16)}


def test_saved_experts_are_those_that_were_loaded(models, stored, tmp_path):
    """Bit for bit, NaN of every spelling among them; the rest is bfloat16, as it was held."""
    narrow = models[1]
    save_hf(narrow, tmp_path / "out", dtype="bfloat16")
    written, (raw, dequantized) = read(tmp_path / "out"), stored
    experts = {name for name in raw if ".experts." in name}
    assert len(experts) == 2 * 4 * 3 * 2
    expected = {name: raw[name] for name in experts} | {n: x for n, x in dequantized.items() if n not in experts}
    same({name: x for name, x in written.items() if name in experts}, {name: raw[name] for name in experts})
    assert written.keys() == expected.keys()
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    left = data["quantization_config"]["modules_to_not_convert"]
    assert data["quantization_config"]["weight_block_size"] == [128, 128] and data["torch_dtype"] == "bfloat16"
    modules = [name.removesuffix(".weight") for name, x in written.items() if x.ndim == 2 and x.dtype == BFLOAT16]
    assert all(any(f"{name}.".startswith(f"{own}.") for own in left) for name in modules if "embed" not in name)
    assert not any(GATE.startswith(f"{own}.") for own in left)
    again = load_hf(tmp_path / "out", expert_dtype="fp8")
    jax.tree.map(np.testing.assert_array_equal, experts_of(again), experts_of(narrow))
    same({name: np.asarray(x) for name, x in to_hf(load_hf(tmp_path / "out"))}, dequantized)


def test_every_code_of_e4m3_survives(tmp_path):
    raw, _ = to_fp8(small_tensors(), np.float32)
    raw[GATE].view(np.uint8)[...] = np.arange(raw[GATE].size).reshape(raw[GATE].shape) % 256
    model = load_hf(write(tmp_path / "in", raw, MOE, keys=FP8_CONFIG), expert_dtype="fp8")
    save_hf(model, tmp_path / "out")
    assert read(tmp_path / "out")[GATE].tobytes() == raw[GATE].tobytes()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e8m0fnu])
def test_scales_of_other_dtypes_are_float32_in_memory(dtype, tmp_path):
    raw, _ = to_fp8(small_tensors(), dtype)
    model = load_hf(write(tmp_path / "in", raw, MOE, keys=FP8_CONFIG), expert_dtype="fp8")
    scale = experts_of(model)["gate_proj_scale"]
    assert scale.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(scale[1, 2]).T, raw[GATE + SCALE].astype(np.float32))


# The bits of bfloat16.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", the_first(1, ["bfloat16", "float32"]))
def test_logits_are_those_of_bfloat16(dtype, folder):
    ids = tokens(2, 9)
    logits = []
    for expert_dtype in (None, "fp8"):
        model = load_hf(folder, dtype=dtype, expert_dtype=expert_dtype)
        logits.append(np.asarray(model.unembed(model(ids, return_indexer_kl=False).hidden)))
    assert np.isfinite(logits[0]).all() and logits[0].std() > 0.01
    np.testing.assert_array_equal(logits[1], logits[0])


@pytest.mark.slow
def test_prefill_and_decode_of_ragged_rows(models):
    found = []
    for model in models:
        cache = PagedCache(model.config, 8, format="bfloat16")
        runner = Runner(model, cache)
        sequences = [cache.new(), cache.new()]
        with compiling_quickly():
            first = runner.prefill(sequences, [tokens(7), tokens(3)]).logits
            found.append((first, runner.extend(sequences, tokens(2, 1)), cache.latents))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.slow
def test_an_engine_draws_the_same(models, folder):
    params = [SamplingParams(temperature=0.8, seed=1, max_tokens=3), SamplingParams(temperature=0.0, max_tokens=2)]
    llms = (
        LLM(models[0], pages=8, rows=2, max_length=64),
        LLM(folder, expert_dtype="fp8", pages=8, rows=2, max_length=64),
    )
    assert llms[1].engine.runner.config.expert_dtype == "fp8"
    drawn = [
        [(o.tokens, o.log_probs) for r in llm.generate([[1, 2, 3], [4, 5]], params) for o in r.outputs] for llm in llms
    ]
    assert drawn[0] == drawn[1] and len(drawn[0][0][0]) == 3
    with pytest.raises(ValueError, match="must be None for a model that is loaded already, got 'fp8'"):
        LLM(models[0], expert_dtype="fp8", pages=8)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A checkpoint of whole blocks."""
    stored, _ = to_fp8(small_tensors(WIDE), np.float32)
    return write(tmp_path_factory.mktemp("fp8") / "wide", stored, WIDE, keys=FP8_CONFIG)


@pytest.fixture(scope="module")
def mesh():
    """Eight devices, of which each pair splits parameters, experts or widths."""
    return make_mesh({"data": 2, "expert": 2, "tensor": 2})


def test_a_shard_holds_whole_blocks(wide_folder, mesh):
    checkpoint, config = Checkpoint(wide_folder), dataclasses.replace(WIDE, expert_dtype="fp8")
    for leaf in leaves(config):
        if leaf.path[-1] not in ("gate_proj_scale", "down_proj", "down_proj_scale") or "experts" not in leaf.path:
            continue
        sharding = NamedSharding(mesh, spec(*parameter_axes(leaf.path, 4)))
        with compiling_quickly():
            x = _fill(leaf, checkpoint, config, sharding)
        assert x.sharding == sharding and x.addressable_shards[0].data.size * mesh.size == x.size
        assert x.dtype == (np.float32 if leaf.entry.scale else E4M3)
        for index, name in leaf.tensors():
            stored = checkpoint.stored[name].read()
            assert leaf.entry.to_file(tensor_at(x, index)).tobytes() == stored.tobytes()


@pytest.mark.slow
def test_a_mesh_gives_the_same_bits(wide_folder, mesh):
    """Rows travel to FP8 experts and back, each shard with half of a width, its scales gathered unrounded."""
    models = (load_hf(wide_folder, mesh=mesh, expert_dtype=each) for each in (None, "fp8"))
    found = []
    for model in models:
        cache = PagedCache(model.config, 8, format="bfloat16", mesh=mesh)
        runner, sequences = Runner(model, cache), [cache.new(rows) for rows in range(4)]
        hidden = forward_on_mesh(model, mesh, tokens(2, 8)).hidden
        first = runner.prefill(sequences, [tokens(count) for count in (7, 3, 5, 2)]).logits
        found.append((hidden, first, runner.extend(sequences, tokens(4, 1))))
    assert np.isfinite(np.asarray(found[0][0], np.float32)).all()
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    ("sizes", "overrides", "words"),
    [
        ({"tensor": 4}, {}, "tensor=4 must divide moe_intermediate_size 256 in whole FP8 blocks of 128: 2; nearest"),
        ({"tensor": 2}, dict(moe_intermediate_size=192), "moe_intermediate_size 192 in whole FP8 blocks of 128: 1; n"),
        ({"data": 4}, {}, "data=4 must divide hidden_size 256 in whole FP8 blocks of 128: 2; nearest that does: 2"),
    ],
)
def test_shards_that_would_break_a_block_are_refused(sizes, overrides, words):
    mesh = make_mesh(sizes, jax.devices()[: max(sizes.values())])
    config = dataclasses.replace(WIDE, **overrides)
    check_model(mesh, config)
    with pytest.raises(ValueError, match=words):
        check_model(mesh, dataclasses.replace(config, expert_dtype="fp8"))


# From bfloat16.


def rounded(x):
    """Rounds a matrix to FP8 with NumPy."""
    x = x.astype(np.float32)
    values, scale = np.zeros(x.shape, E4M3), np.ones([-(-size // 128) for size in x.shape], np.float32)
    for i, j in np.ndindex(scale.shape):
        block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        largest = np.abs(x[block]).max()
        scale[i, j] = largest / np.float32(448) if largest else 1
        values[block] = (x[block] / scale[i, j]).astype(E4M3)
    return values, scale


@pytest.mark.parametrize("way", ["save", "convert", "command"])
def test_experts_are_rounded_to_fp8(way, tmp_path):
    tensors = small_tensors()
    tensors[GATE][:, :128] = 0
    source, target = write(tmp_path / "in", tensors, MOE), tmp_path / "out"
    if way == "save":
        save_hf(load_hf(source), target, expert_dtype="fp8")
    elif way == "convert":
        convert_hf(source, target, expert_dtype="fp8")
    else:
        assert main(["convert", str(source), str(target), "--expert-dtype", "fp8"]) == 0
    expected = {}
    for name, x in tensors.items():
        values, scale = rounded(x) if ".experts." in name else (x, None)
        expected |= {name: values} if scale is None else {name: values, name + SCALE: scale}
    assert expected[GATE + SCALE][0, 0] == 1 and expected[GATE + SCALE].shape == (1, 2)
    same(read(target), expected)
    if way == "save":
        assert load_hf(target, expert_dtype="fp8").config.expert_dtype == "fp8"
    assert Config.from_hf(target) == Config.from_hf(source)


def test_converting_leaves_fp8_experts_as_they_are(folder, stored, tmp_path):
    convert_hf(folder, tmp_path / "out", dtype="float32", expert_dtype="fp8")
    written, (raw, dequantized) = read(tmp_path / "out"), stored
    expected = {name: x for name, x in raw.items() if ".experts." in name}
    others = {name: x.astype(np.float32) for name, x in dequantized.items() if ".experts." not in name}
    same(written, expected | others)
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert data["quantization_config"]["quant_method"] == "fp8" and data["torch_dtype"] == "float32"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(bad, tmp_path):
    tensors = small_tensors()
    tensors[GATE][3, 150] = bad
    source = write(tmp_path / "in", tensors, MOE)
    for write_fp8 in (convert_hf, lambda *a, **k: save_hf(load_hf(source), *a[1:], **k)):
        with pytest.raises(ValueError, match=f"^{GATE} must be finite to be written in FP8, got NaN or infinity$"):
            write_fp8(source, tmp_path / "out", expert_dtype="fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# Refused.


def refused(folder, **options):
    """Gives the message of the error that `load_hf` must raise, before it reads a weight."""
    with pytest.raises(ValueError) as caught:
        load_hf(folder, expert_dtype="fp8", **options)
    message = str(caught.value)
    assert len(message) < 1000 and "\n" not in message
    return message


def test_what_is_wrong_with_scales(stored, tmp_path):
    raw = dict(stored[0])
    del raw[GATE + SCALE]
    assert f"{GATE}{SCALE} is missing, the scales of an F8_E4M3 weight" in refused(write(tmp_path / "a", raw, MOE))
    raw[GATE + SCALE] = np.ones((2, 1), np.float32)
    assert f"{GATE}{SCALE} must be F32 [1, 2], got F32 [2, 1]" in refused(write(tmp_path / "b", raw, MOE))
    raw[GATE + SCALE] = np.array([[1, np.nan]], np.float32)
    raw[GATE.replace("2.gate", "3.gate") + SCALE] = np.array([[np.inf, 1]], np.float32)
    folder = write(tmp_path / "c", raw, MOE)
    words = "experts.{2–3}.gate_proj.weight_scale_inv must be finite, got NaN or infinity, 2 tensors"
    assert words in refused(folder)
    for run in (load_hf, lambda source: convert_hf(source, tmp_path / "out")):
        with pytest.raises(ValueError, match="must be finite"):
            run(folder)


def test_another_size_of_blocks_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "hf")
    data = json.loads((copy / "config.json").read_text())
    data["quantization_config"]["weight_block_size"] = [64, 64]
    (copy / "config.json").write_text(json.dumps(data))
    assert "quantization_config weight_block_size must be [128, 128], got [64, 64]" in refused(copy)


def test_experts_that_are_not_in_fp8_are_refused(stored, tmp_path):
    raw, dequantized = stored
    message = refused(write(tmp_path / "a", dequantized, MOE))
    assert "needs all routed experts in FP8, got" in message and "convert --expert-dtype fp8" in message
    assert "model.layers.{0–1}.mlp.experts.{0–3}.gate_proj.weight is BF16, 8 tensors" in message
    mixed = {name: x for name, x in raw.items() if name != GATE + SCALE} | {GATE: dequantized[GATE]}
    assert f"{GATE} is BF16" in refused(write(tmp_path / "b", mixed, MOE))


def test_what_an_expert_dtype_may_be(folder, models, tmp_path):
    with pytest.raises(ValueError, match="expert_dtype must be None or 'fp8', got 'int4'"):
        load_hf(folder, expert_dtype="int4")  # pyright: ignore[reportArgumentType]
    for run in (lambda: convert_hf(folder, tmp_path / "out", expert_dtype="e4m3"),
                lambda: save_hf(models[0], tmp_path / "out", expert_dtype="e4m3")):  # fmt: skip
        with pytest.raises(ValueError, match="expert_dtype must be None or 'fp8', got 'e4m3'"):
            run()
    assert not list(tmp_path.iterdir())


# The commands.


def test_info_counts_what_is_held(folder, models, capsys):
    assert main(["info", str(folder)]) == 0
    held = [sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))) for model in models]
    printed = capsys.readouterr().out
    assert f"in memory: {held[0]:,} bytes; with --expert-dtype fp8 {held[1]:,}\n" in printed
    assert "expert_dtype" not in printed


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_a_flag_of_the_commands(command, folder, monkeypatch):
    """It reaches `load_hf` by way of `LLM`."""
    given = []

    class Loaded(Exception):
        """Ends the command where it loads."""

    def load(source, **options):
        given.append((source, options))
        raise Loaded

    monkeypatch.setattr("dsa_jax.inference.llm.load_hf", load)
    monkeypatch.setattr("dsa_jax.chat.commands.read_tokenizer", lambda _: byte_tokenizer())
    monkeypatch.setattr("dsa_jax.server.run.read_tokenizer", lambda _: byte_tokenizer())
    arguments = ["--prompt", "x"] if command == "generate" else []
    with pytest.raises(Loaded):
        main([command, str(folder), "--expert-dtype", "fp8", *arguments])
    options = {"expert_dtype": "fp8", "prediction_layers": False, "mesh": None, "copies": True}
    assert given == [(folder, options)]
