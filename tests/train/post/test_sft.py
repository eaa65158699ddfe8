"""Supervised fine-tuning by itself: a checkpoint, a file of conversations, one command, and no word of rewards."""

import json

import numpy as np
import pytest
from chat_cases import BEGIN, END, control_tokenizer
from train_cases import small_config, small_params

from dsa_jax.hf.convert import save_hf
from train.__main__ import main
from train.phases import merge_groups
from train.run import load_model
from train.state import abstract_params
from train.watching.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("in_a_hurry")
VOCAB = 300
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}<｜User｜>{{ m.content }}
{%- else %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"""


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in Hugging Face's layout, with tokenizer and template, and a file of conversations."""
    folder = tmp_path / "checkpoint"
    config = small_config(vocab_size=VOCAB, num_hidden_layers=1, first_k_dense_replace=0, max_position_embeddings=1024)
    save_hf(merge_groups(abstract_params(config)[0], small_params(config)), folder)
    control_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BEGIN, "eos_token": END}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with (tmp_path / "chats.jsonl").open("w") as file:
        for i in range(30):
            messages = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "ab"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder


def tune(tmp_path, checkpoint, *more):
    """Runs the command; its exit status."""
    shapes = ["--set", "phases.SFT.stages.0.seq_len=32", "phases.SFT.stages.0.batch_size=4", "data.held_out=0.3"]
    rates = ["phases.SFT.backbone.warmup_steps=0", "evaluation_batches=1"]
    arguments = ["--preset", "sft", "--out", str(tmp_path / "tuned"), "--data", str(tmp_path / "chats.jsonl")]
    arguments += ["--tokenizer", str(checkpoint / "tokenizer.json"), "--steps", "SFT=12", *shapes, *rates]
    return main([*arguments, "--learning-rate", "SFT.backbone=1e-2", *more])


@pytest.mark.slow
def test_a_checkpoint_is_tuned_on_conversations(tmp_path, checkpoint):
    assert tune(tmp_path, checkpoint, "--init", str(checkpoint)) == 0
    records = read_metrics(tmp_path / "tuned" / "metrics.jsonl")
    assert [record["phase"] for record in records] == ["SFT"] * 12
    losses = [record["lm_loss"] for record in records]
    assert np.mean(losses[-3:]) < losses[0] - 0.5
    assert all(record["kl"] > 0 for record in records)
    assert load_model(tmp_path / "tuned").config.vocab_size == VOCAB
    assert "SFT" in (tmp_path / "tuned" / "report.md").read_text()


def test_it_needs_a_checkpoint(tmp_path, checkpoint, capsys):
    assert tune(tmp_path, checkpoint) == 2
    assert "phase SFT must begin from a checkpoint: give --init" in capsys.readouterr().err
