"""All complaints of a checkpoint of any size are one line, in groups, with the likely cause."""

import dataclasses

import numpy as np
import pytest
from convert_cases import SMALL, random_tensors, refused, write

from dsa_jax import Config
from dsa_jax.hf import checkpoint as hf_checkpoint
from dsa_jax.hf.complaints import grouped, likely_cause
from dsa_jax.hf.table import leaves

NAMES = [name for leaf in leaves(Config.deepseek_v32()) for _, name in leaf.tensors()]


def fuse(tensors):
    """Joins the experts of each layer as transformers keeps them in memory."""
    fused = {name: x for name, x in tensors.items() if ".experts." not in name}
    first = "model.layers.1.mlp.experts."
    stacked = {
        proj: np.stack([tensors[f"{first}{i}.{proj}_proj.weight"] for i in range(4)]) for proj in ("gate", "up", "down")
    }
    fused[first + "gate_up_proj"] = np.concatenate([stacked["gate"], stacked["up"]], 1)
    return fused | {first + "down_proj": stacked["down"]}


def test_fused_experts_are_named(tmp_path):
    message = refused(write(tmp_path / "hf", fuse(random_tensors())))
    assert "the experts of a layer are fused in one tensor, `experts.gate_up_proj`" in message
    assert "model.layers.1.mlp.experts.{0–3}.gate_proj.weight is missing, 4 tensors" in message
    assert "model.layers.1.mlp.experts.gate_up_proj is unexpected" in message


def test_a_common_prefix_is_named(tmp_path):
    tensors = random_tensors()
    message = refused(write(tmp_path / "more", {"language_model." + name: x for name, x in tensors.items()}))
    assert "every name begins with 'language_model.', which must be taken off" in message
    message = refused(write(tmp_path / "less", {name.removeprefix("model."): x for name, x in tensors.items()}))
    assert "the names lack their beginning 'model.'" in message


def test_the_published_size_takes_no_more_room():
    lines = grouped([(name, "is missing") for name in NAMES])
    assert "model.layers.{3–60}.mlp.experts.{0–255}.gate_proj.weight is missing, 14,848 tensors" in lines
    assert "model.embed_tokens.weight is missing" in lines and len(lines) < 40
    fused = {name for name in NAMES if ".experts." not in name} | {"model.layers.3.mlp.experts.gate_up_proj"}
    assert "`experts.gate_up_proj`" in likely_cause(set(NAMES) - fused, fused - set(NAMES))[0]
    assert likely_cause({"lm_head.weight"}, {"head.weight"}) == []


def test_groups_take_turns_and_write_runs():
    shapes = [(f"layers.{i}.a", "must have shape [1], got [2]") for i in (0, 2, 4, 6, 8)]
    missing = [("b", "is missing"), ("c", "is missing")]
    assert grouped([*missing, *shapes]) == [
        "b is missing",
        "layers.{}.a must have shape [1], got [2], 5 tensors".replace("{}", "{0, 2, 4, 6, …}"),
        "c is missing",
    ]


def test_hostile_names_are_one_line(tmp_path):
    extra = {f"x{'y' * 300}\n{i}": np.ones(1, np.float32) for i in range(200)}
    extra |= {
        "model.layers." + "9" * 5000 + ".weight": np.ones(1, np.float32),
        "\ud7ff\u202e.0.": np.ones(1, np.float32),
    }
    message = refused(write(tmp_path / "hf", random_tensors() | extra))
    assert "is unexpected" in message and "problems more" in message and message.isprintable()


@pytest.mark.parametrize(("layers", "experts"), [(10_000, 256), (2, 2**31 - 2)])
def test_more_tensors_than_any_model_has(layers, experts, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_checkpoint, "read_headers", lambda *_: pytest.fail("no file is read"))
    config = dataclasses.replace(SMALL, num_hidden_layers=layers, n_routed_experts=experts)
    message = refused(write(tmp_path / "hf", {}, config))
    assert "config.json describes" in message and f"n_routed_experts {experts:,}" in message
