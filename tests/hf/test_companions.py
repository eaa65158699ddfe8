"""The companions of the weights: token ids, tokenizer, generation settings; never code, nor the names of any."""

import json

import pytest
from convert_cases import SMALL, random_tensors, write
from model_cases import small_model

from dsa_jax.hf.convert import convert_hf, load_hf, save_hf

pytestmark = pytest.mark.usefixtures("in_a_hurry")

IDS = {"eos_token_id": [5, 7, 9], "bos_token_id": 3, "pad_token_id": 5}
AUTO_MAP = {"AutoConfig": "configuration_x.XConfig", "AutoTokenizer": ["tokenization_x.X", None]}
FILES = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
FILES += ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def folder(tmp_path):
    """A folder as published: with a tokenizer, generation settings, and code."""
    folder = write(tmp_path / "hf", random_tensors(), keys=IDS | {"auto_map": AUTO_MAP})
    (folder / "generation_config.json").write_text(json.dumps(IDS | {"temperature": 0.6, "do_sample": True}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>", "auto_map": AUTO_MAP}))
    for name in ("configuration_x.py", "tokenization_x.py", "tokenizer_x.py"):
        (folder / name).write_text("raise AssertionError")
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    return folder


def read_json(path):
    return json.loads(path.read_text())


def check_companions(out):
    """Asserts that everything but code has come along."""
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert {key: read_json(out / "config.json")[key] for key in IDS} == IDS
    assert "auto_map" not in read_json(out / "config.json")
    assert read_json(out / "generation_config.json") == IDS | {"temperature": 0.6, "do_sample": True}
    assert read_json(out / "tokenizer_config.json") == {"eos_token": "<e>"}


def test_a_loaded_model_is_saved_with_its_token_ids(folder, tmp_path):
    model = load_hf(folder)
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id) == ((5, 7, 9), 3, 5)
    save_hf(model, tmp_path / "alone")
    assert {key: read_json(tmp_path / "alone" / "config.json")[key] for key in IDS} == IDS
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == ["config.json", "model.safetensors"]
    assert load_hf(tmp_path / "alone").config == model.config
    save_hf(model, tmp_path / "out", companions=folder)
    check_companions(tmp_path / "out")


def test_convert_carries_no_code_and_names_none(folder, tmp_path):
    convert_hf(folder, tmp_path / "out")
    check_companions(tmp_path / "out")
    convert_hf(tmp_path / "out", tmp_path / "again")
    check_companions(tmp_path / "again")


def test_companions_must_be_files_of_a_folder(folder, tmp_path):
    model = load_hf(folder)
    with pytest.raises(ValueError, match="companions must be a checkpoint's folder, got"):
        save_hf(model, tmp_path / "out", companions=tmp_path / "nowhere")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not JSON"):
        save_hf(model, tmp_path / "out", companions=folder)
    (tmp_path / "secret").write_text("secret")
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.model").symlink_to(tmp_path / "secret")
    for write_it in (
        lambda: save_hf(model, tmp_path / "out", companions=folder),
        lambda: convert_hf(folder, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"tokenizer\.model: it is a link that leaves the folder"):
            write_it()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "secret"]


def test_a_new_model_has_no_token_ids(tmp_path):
    save_hf(small_model(SMALL), tmp_path / "out")
    assert {key: read_json(tmp_path / "out" / "config.json")[key] for key in IDS} == dict.fromkeys(IDS)
