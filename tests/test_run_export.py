"""A run is exported as a checkpoint that has all that others need of it, and computes the same numbers."""

import dataclasses
import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from train_cases import small_config, small_params, small_run, state_of

from dsa_jax import Config, YaRN, load_hf
from dsa_jax.__main__ import main
from dsa_jax.chat.commands import read_tokenizer
from dsa_jax.export import export_run
from dsa_jax.hf.convert import write_checkpoint
from dsa_jax.inference.tokenizer import byte_tokenizer
from train.run import Run, load_model
from train.saved.changes import Position
from train.saved.checkpoint import Checkpoints
from train.saved.tokenizer_copy import keep_tokenizer

MODEL = small_config(num_hidden_layers=1, first_k_dense_replace=0, rope_scaling=YaRN(2.0, 32), dtype="bfloat16")
pytestmark = pytest.mark.usefixtures("in_a_hurry")


def save(run, folder, step=3, shift=0.0):
    """Leaves a checkpoint whose parameters are `shift` away from those of the tests."""
    Run(run, folder).open(resume=True)
    state = state_of(run)
    state = dataclasses.replace(state, params=jax.tree.map(lambda x: x + shift, state.params))
    with Checkpoints(folder / "checkpoints", run) as checkpoints:
        checkpoints.save(state, Position(step, 0, step, {}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def of_bytes(folder):
    """Leaves a run over bytes, with checkpoints of steps 2 and 3."""
    run = small_run(folder / "text", model=MODEL)
    save(run, folder / "bytes", 2, shift=0.5)
    return save(run, folder / "bytes", 3)


def write_tokenizer(folder, *, name="tokenizer.json", words=("[UNK]", "alpha", "beta", "</s>"), **settings):
    """Writes a tokenizer whose special tokens are the last word and what its settings name."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    tokenizer.add_special_tokens([words[-1]])
    tokenizer.save(str(folder / name))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / name


@pytest.fixture(scope="module")
def of_words(folder):
    """Leaves a run with a tokenizer that its settings do not describe, which moved away since."""
    path = write_tokenizer(folder / "words")
    (folder / "words" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "words" / "tokenizer.py").write_text("raise SystemExit")
    data = dataclasses.replace(small_run(folder / "text").data, tokenizer=path)
    out = save(small_run(folder / "text", data=data), folder / "run")
    shutil.rmtree(folder / "words")
    return out


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, state, tokens):
    model = nnx.merge(graph, state)
    return model.unembed(model(tokens).hidden)


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_logits_are_the_same_bits_before_and_after(of_bytes, tmp_path):
    export_run(of_bytes, tmp_path / "out")
    model = load_hf(tmp_path / "out", dtype="bfloat16", param_dtype="float32")
    run = load_model(of_bytes)
    assert model.config == run.config
    graph, state = nnx.split(run)
    tokens = jax.random.randint(jax.random.key(0), (1, 20), 0, 256)
    np.testing.assert_array_equal(*(forward(graph, each, tokens) for each in (nnx.state(model), state)))
    assert Config.from_hf(tmp_path / "out").rope_scaling == YaRN(2.0, 32)


def test_a_step_and_a_dtype_may_be_chosen(of_bytes, tmp_path, capsys):
    assert main(["export", str(of_bytes), str(tmp_path / "out"), "--step", "2", "--dtype", "bfloat16"]) == 0
    assert f"dsa-jax chat {tmp_path}/out" in capsys.readouterr().out.replace("\n", "")
    assert read(tmp_path / "out", "config.json")["torch_dtype"] == "bfloat16"
    found = load_file(tmp_path / "out" / "model.safetensors")
    head, router = found["lm_head.weight"], found["model.layers.0.mlp.gate.weight"]
    assert (head.dtype, router.dtype) == (jnp.bfloat16, jnp.float32)
    params = small_params(MODEL)["backbone"]
    chex.assert_trees_all_close(head.astype(jnp.float32), params["lm_head"].T + 0.5, rtol=2**-8)


def test_bytes_leave_with_their_tokenizer(of_bytes, tmp_path):
    export_run(of_bytes, tmp_path)
    found = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert found.to_str() == byte_tokenizer().to_str() and found.encode("aé").ids == [97, 195, 169]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    assert read(tmp_path, "tokenizer_config.json") == settings
    assert read(tmp_path, "generation_config.json") == {}


def test_a_run_keeps_its_tokenizer_and_the_export_says_what_ends_a_text(of_words, tmp_path):
    assert sorted(path.name for path in (of_words / "tokenizer").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    export_run(of_words, tmp_path)
    assert read_tokenizer(tmp_path).encode("alpha beta").ids == [1, 2]
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert read(tmp_path, "tokenizer_config.json")["eos_token"] == "</s>"
    assert read(tmp_path, "generation_config.json") == {"eos_token_id": [3]}
    assert read(tmp_path, "config.json")["eos_token_id"] == 3 and Config.from_hf(tmp_path).eos_token_id == (3,)
    assert not list(tmp_path.glob("*.py"))


def test_generation_settings_and_token_ids_that_are_there_stay(folder, tmp_path):
    path = write_tokenizer(tmp_path / "words", bos_token="alpha", eos_token={"content": "beta"})
    generation = {"eos_token_id": [7, 9], "temperature": 0.3}
    (tmp_path / "words" / "generation_config.json").write_text(json.dumps(generation))
    data = dataclasses.replace(small_run(folder / "text").data, tokenizer=path)
    run = small_run(folder / "text", data=data, model=small_config(eos_token_id=(7, 9)))
    export_run(save(run, tmp_path / "run"), tmp_path / "out")
    assert read(tmp_path / "out", "generation_config.json") == generation
    config = Config.from_hf(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (7, 9), None)


def test_a_tokenizer_may_be_given(of_bytes, of_words, tmp_path):
    write_tokenizer(tmp_path / "words", words=("[UNK]", "gamma", "<eos>"), eos_token="<eos>")
    export_run(of_bytes, tmp_path / "out", tokenizer=tmp_path / "words")
    assert read_tokenizer(tmp_path / "out").encode("gamma").ids == [1]
    assert Config.from_hf(tmp_path / "out").eos_token_id == (2,)
    with pytest.raises(ValueError, match="must hold the run's tokenizer.json, got none: give --tokenizer"):
        export_run(of_words, tmp_path / "no", tokenizer=tmp_path)
    large = write_tokenizer(tmp_path / "large", words=tuple(f"w{i}" for i in range(300)))
    with pytest.raises(ValueError, match="ids below the model's vocab_size 256, got 299"):
        export_run(of_words, tmp_path / "no", tokenizer=large.parent)
    assert not (tmp_path / "no").exists()


def test_the_copy_of_a_tokenizer_follows_its_content(tmp_path):
    """A file of another name takes its settings with it; what is there is not written again."""
    path = write_tokenizer(tmp_path / "a", name="mine.json", pad_token="beta")
    (tmp_path / "a" / "tokenizer.json").write_text("another")
    keep_tokenizer(path, tmp_path, append=False)
    copy = tmp_path / "tokenizer"
    assert (copy / "tokenizer.json").read_bytes() == path.read_bytes()
    assert read(copy, "tokenizer_config.json") == {"pad_token": "beta"}
    (copy / "tokenizer_config.json").unlink()
    keep_tokenizer(path, tmp_path, append=True)
    assert not (copy / "tokenizer_config.json").exists()
    other = write_tokenizer(tmp_path / "b", words=("[UNK]", "<eos>"))
    keep_tokenizer(other, tmp_path, append=True)
    assert (copy / "tokenizer.json").read_bytes() == other.read_bytes()
    assert read(copy, "tokenizer_config.json") == {"eos_token": "<eos>"}


def refused(capsys, *arguments):
    assert main(["export", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1000, error
    return error


def test_what_is_no_run_is_refused_in_one_line(of_bytes, tmp_path, capsys):
    out = tmp_path / "out"
    assert "expected a run's folder" in refused(capsys, tmp_path, out)
    assert "a checkpoint of step 4, got [2, 3]" in refused(capsys, of_bytes, out, "--step", 4)
    (tmp_path / "file").write_text("precious")
    assert "must be an empty folder" in refused(capsys, of_bytes, tmp_path / "file")
    run = shutil.copytree(of_bytes, tmp_path / "run")
    values = read(run, "run.json")
    for model, message in (
        (3, "must say what the run's model is"),
        ({"colour": 1}, "must describe a model"),
        ({**values["run"]["model"], "index_topk": 0}, "index_topk must be at least 1"),
        ({**values["run"]["model"], "hidden_size": 32}, "the state must be the whole of its configuration's model"),
    ):
        (run / "run.json").write_text(json.dumps({"run": {**values["run"], "model": model}}))
        assert message in refused(capsys, run, out)
    (run / "run.json").write_text(json.dumps(values))
    shutil.rmtree(run / "checkpoints" / "3" / "params")
    assert "must hold a run's parameters" in refused(capsys, run, out)
    shutil.rmtree(run / "checkpoints")
    assert "must hold a checkpoint, got none" in refused(capsys, run, out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_full_disk_leaves_nothing(of_bytes, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device", "shard")

    monkeypatch.setattr("dsa_jax.hf.files.save_file", fail)
    assert "No space left on device" in refused(capsys, of_bytes, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_state_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="must be the whole of its configuration's model, got .* of shape None"):
        write_checkpoint(tmp_path, {"norm": {"weight": np.ones(16, np.float32)}}, small_config())
    assert list(tmp_path.iterdir()) == []
