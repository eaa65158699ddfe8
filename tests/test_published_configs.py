"""The configurations of published models: read, traced at full size, counted, planned, and stated in the documents."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsa_jax import Config, Transformer
from dsa_jax.cache_shapes import cache_token_bytes
from dsa_jax.hf.table import leaves
from train.optimizer import OptimizerSettings
from train.phases import PHASES
from train.planner.estimate import Job, make_plan
from train.settings import PhaseSettings, Stage

FOLDER = Path(__file__).parent / "configs"
NAMES = {
    "deepseek-v3.2-exp": "DeepSeek-V3.2-Exp",
    "deepseek-v3.2": "DeepSeek-V3.2",
    "deepseek-v3.2-speciale": "DeepSeek-V3.2-Speciale",
    "glm-5": "GLM-5",
    "glm-5.1": "GLM-5.1",
    "glm-5.2": "GLM-5.2",
}
DIFFERENT = ["deepseek-v3.2", "glm-5", "glm-5.2"]  # in shape from each other


def config_of(name: str, prediction_layers: int = 0) -> Config:
    """The configuration, which names one prediction layer: without it, or with so many."""
    config = Config.from_hf(FOLDER / f"{name}.json")
    assert config.num_nextn_predict_layers == 1
    return dataclasses.replace(config, num_nextn_predict_layers=prediction_layers)


def parameters(config: Config) -> int:
    return sum(math.prod(leaf.shape(config)) for leaf in leaves(config))


def test_there_is_a_file_of_each():
    assert {path.stem for path in FOLDER.glob("*.json")} == NAMES.keys()
    assert config_of("deepseek-v3.2") == Config.deepseek_v32()


@pytest.mark.parametrize("name", NAMES)
def test_the_documents_state_parameters_and_bytes(name):
    config = config_of(name)
    fp8 = dataclasses.replace(config, index_fp8=True)
    cells = NAMES[name], f"{parameters(config):,}", f"{config.num_index_layers} of {config.num_hidden_layers}"
    row = f"| {' | '.join(cells)} | {cache_token_bytes(fp8, 'fp8'):,} | {cache_token_bytes(config, 'bfloat16'):,} |"
    assert row in (FOLDER.parents[1] / "docs" / "checkpoints.md").read_text(), row


@pytest.mark.parametrize("name", DIFFERENT)
def test_it_is_traced_at_full_size(name):
    config = config_of(name)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    assert sum(x.size for x in jax.tree.leaves(state)) == parameters(config)

    def run(state, tokens):
        out = nnx.merge(graph, state)(tokens, return_indexer_kl=False, return_selected=True)
        return out.hidden, out.selected

    hidden, selected = jax.eval_shape(run, state, jax.ShapeDtypeStruct((1, 4096), jnp.int32))
    assert hidden.shape == (1, 4096, config.hidden_size) and hidden.dtype == jnp.bfloat16
    assert selected.shape == (config.num_hidden_layers, 1, 4096, 2048)


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_its_training_is_planned_on_a_mesh(name):
    config = dataclasses.replace(config_of(name), param_dtype="float32", index_fp8=True)
    shape = {"data": 32, "context": 8, "expert": 4, "tensor": 1}
    for phase in ("WARMUP", "SPARSE"):
        plan = make_plan(job_of(config, phase), shape)
        assert plan.devices == 1024 and plan.bytes_needed > 0 and plan.seconds > 0
        assert set(plan.kept) == {"dense", "MoE"} and plan.kept["MoE"] > plan.kept["dense"]


def job_of(config: Config, phase: str) -> Job:
    """A step of 131,072 tokens a sequence."""
    adamw = OptimizerSettings(learning_rate=1e-5)
    settings = PhaseSettings(PHASES[phase], (Stage(1, 32, 131072),), backbone=adamw, indexer=adamw)
    return Job(config, settings, 32, 131072, 1)
