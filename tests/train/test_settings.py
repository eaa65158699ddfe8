"""Runs as JSON: they come back as they went, and what is wrong in them is named."""

import dataclasses
import itertools
import json

import pytest
from train_cases import small_phases, small_run

from dsa_jax import Config
from studies.tiny.recall import RecallConfig
from studies.tiny.settings import make_config
from train.data import DataConfig
from train.optimizer import OptimizerSettings
from train.phases import CONTROLS, STREAMS, WARMUP
from train.presets import deepseek_v32, load_preset, tiny
from train.settings import MAX_SEED, MAX_STAGES, PhaseSettings, RunConfig, Stage, listed, stream_seed


@pytest.fixture
def run(tmp_path):
    """Makes a run of ten steps in each of two phases."""
    phases = small_phases(Stage(10, 2, 16))
    return small_run(tmp_path / "text", phases=(phases["BASE"], phases["SPARSE"]))


def test_runs_come_back_from_json(run):
    for config in (run, tiny(), deepseek_v32()):
        assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(batch=3), r"run has unknown fields \['batch'\]"),
        (lambda v: v["model"].update(index_topk=0), "index_topk must be at least 1, got 0"),
        (lambda v: v["model"].update(param_dtype="bfloat16"), "parameters in float32"),
        (
            lambda v: v["model"].update(expert_dtype="fp8"),
            "training needs expert_dtype None, got 'fp8'",
        ),
        (lambda v: v["phases"][0]["stages"][0].update(seq_len=65), "seq_len must be at most .* 64, got 65"),
        (lambda v: v["phases"][0]["stages"][0].update(rates=[1.0]), r"rates must be two factors.* got \(1.0,\)"),
        (lambda v: v["phases"][0]["stages"][0].update(rates=[1.0, -0.5]), "rates must be .* at least 0 .*got -0.5"),
        (
            lambda v: v["phases"][0]["stages"][0].update(micro_batches=3),
            "must divide batch_size 2, got 3",
        ),
        (lambda v: v["phases"][0]["stages"][0].update(steps="3"), r"run.phases\[0\].stages\[0\].steps must be int"),
        (lambda v: v["phases"][0].pop("stages"), r"lacks the fields \['stages'\]"),
        (lambda v: v.update(phases=[]), "at least one phase"),
        (
            lambda v: v["phases"][1].update(name="COOLDOWN"),
            r"phases\[1\].name must be one of BASE, .*'COOL",
        ),
        (lambda v: v["phases"][1].update(name=["SPARSE"]), r"phases\[1\].name must be one of BASE"),
        (lambda v: v["phases"][1].pop("name"), r"lacks the fields \['name'\] of PhaseSettings"),
        (lambda v: v["phases"][0]["backbone"].update(b1=2), "b1 must be .* below 1 .*got 2"),
        (
            lambda v: v["phases"][0]["backbone"].update(b2=float("nan")),
            r"backbone.b2 must be a finite .*got nan",
        ),
        (lambda v: v["phases"][0]["backbone"].update(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
        (lambda v: v["phases"][0]["backbone"].update(warmup_steps=11), "warmup_steps of the backbone .* 10 steps"),
        (lambda v: v["phases"][0].update(bias_rate=-0.1), "bias_rate must be .* at least 0"),
        (lambda v: v["phases"][0]["stages"][0].update(steps=2**31), "steps must be at most 2147483647"),
        (lambda v: v["phases"][0].update(stages=101 * v["phases"][0]["stages"]), "from one to 100 stages, got 101"),
        (lambda v: v["model"].update(rms_norm_eps=float("inf")), "model.rms_norm_eps must be a finite number"),
        (lambda v: v["model"].update(vocab_size=2**63), "model.vocab_size must be at most"),
        (lambda v: v.update(seed=-1), "seed must be at least 0, got -1"),
        (lambda v: v.update(seed=4294966), "seed must be at most 4294965, got 4294966"),
        (lambda v: v["data"].update(recall=0.5), r"run.data has unknown fields \['recall'\]"),
        (lambda v: v.update(checkpoint_every=0), "checkpoint_every must be at least 1, got 0"),
    ],
)
def test_a_bad_run_is_named(run, change, message):
    values = run.to_json()
    change(values)
    with pytest.raises(ValueError, match=message):
        RunConfig.from_json(values)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage(True, 2, 16), "steps must be an integer of at least 1, got True"),
        (lambda: Stage(3, 2.0, 16), "batch_size must be an integer of at least 1, got 2.0"),
        (lambda: PhaseSettings("BASE", (Stage(3, 2, 16),)), "phase must be a Phase, .*got 'BASE'"),
        (lambda: PhaseSettings(WARMUP, Stage(3, 2, 16)), r"stages must be a tuple of Stage, got Stage\("),
        (lambda: PhaseSettings(WARMUP, [Stage(3, 2, 16)]), r"stages must be a tuple of Stage, got \[Stage\("),
        (
            lambda: PhaseSettings(WARMUP, (Stage(3, 2, 16),), indexer=1e-3),
            "indexer must be OptimizerSettings",
        ),
        (lambda: RunConfig(Config.tiny(), []), r"phases must be a tuple of PhaseSettings, got \[\]"),
        (lambda: RunConfig("tiny", ()), "model must be a Config .*'tiny'"),
        (lambda: dataclasses.replace(tiny(), evaluation_batches=False), "evaluation_batches must be an integer"),
        (lambda: DataConfig("*.txt"), r"data must be a tuple of globs, folders and prefixes, got '\*.txt'"),
        (lambda: DataConfig(held_out=float("nan")), "held_out must be"),
        (lambda: DataConfig(max_bytes=1e6), "max_bytes must be an integer"),
        (lambda: DataConfig(tokenizer=3), "tokenizer must be a path, got 3"),
        (lambda: DataConfig(append=1), "append must be True or False, got 1"),
        (lambda: RecallConfig(recall=float("nan")), "recall must be"),
    ],
)
def test_bad_values_from_python_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_stages_streams_and_seeds_draw_from_seeds_of_their_own():
    seeds = [stream_seed(*each) for each in itertools.product((0, 1, 7), range(STREAMS), range(MAX_STAGES))]
    assert len(set(seeds)) == len(seeds)
    assert stream_seed(0, 0, 0) == 0 and stream_seed(3, 2, 1) == 3201  # as of old: runs are continued
    assert stream_seed(MAX_SEED, STREAMS - 1, MAX_STAGES - 1) < 2**32


def test_many_differences_are_counted():
    assert listed(["a"]) == "a"
    assert listed([str(i) for i in range(20)]) == "0; 1; 2; 3; 4; 5; 6; 7; and 12 more"


def test_presets_carry_the_published_recipe(tmp_path):
    warmup, sparse = deepseek_v32().phases
    assert (warmup.name, warmup.stages[0].steps, warmup.stages[0].batch_size) == ("WARMUP", 1000, 16)
    assert (sparse.name, sparse.stages[0].steps, sparse.stages[0].batch_size) == ("SPARSE", 15000, 480)
    assert warmup.stages[0].seq_len == sparse.stages[0].seq_len == 131072
    assert warmup.indexer == OptimizerSettings(1e-3) and sparse.backbone == sparse.indexer == OptimizerSettings(7.3e-6)
    with pytest.raises(ValueError, match="preset must be tiny or sft or deepseek_v32 or a .json file, got 'huge'"):
        load_preset("huge")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="readable JSON"):
        load_preset(str(tmp_path / "bad.json"))


def test_phases_are_taken_in_training_order(run):
    assert [phase.name for phase in tiny().select(("SPARSE", "WARMUP")).phases] == ["WARMUP", "SPARSE"]
    with pytest.raises(ValueError, match="WARMUP"):
        run.select(("WARMUP",))
    with pytest.raises(ValueError, match="trains the indexer"):
        PhaseSettings(WARMUP, run.phases[0].stages)


def test_a_file_may_be_called_like_a_preset(run, tmp_path):
    """Its name says nothing: not even which model it is."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(run.to_json()))
    assert load_preset(str(path)) == run != tiny()
    path.write_text(json.dumps({"run": run.to_json(), "identity": {}}))
    assert load_preset(str(path)) == run


def test_the_names_in_json_stay():
    """Keeps the run.json of older runs readable."""
    values = tiny().to_json()
    names = "model phases data seed checkpoint_every checkpoint_minutes keep_checkpoints evaluation_batches"
    assert list(values) == [*names.split(), "evaluate_every", "keep_best"]
    assert list(values["phases"][0]) == ["name", "stages", "backbone", "indexer", "bias_rate", "keep", "predictions"]
    assert [phase["name"] for phase in values["phases"]] == ["BASE", "WARMUP", "SPARSE"]
    study = make_config(("a", "b")).to_json()
    assert study["data"] == {
        "data": ["a", "b"],
        "tokenizer": None,
        "held_out": 0.1,
        "max_bytes": 1 << 26,
        "append": True,
        "held_out_data": [],
        "pack": "concat",
        "min_document": 1,
        "chat_template": None,
        "recall": 0.5,
    }


def test_data_of_another_class_are_asked_for():
    config = make_config()
    assert RunConfig.from_json(config.to_json(), data=RecallConfig) == config
    with pytest.raises(ValueError, match="unknown fields"):
        RunConfig.from_json(config.to_json())


def test_controls_come_back_by_name(run):
    for phase in CONTROLS:
        settings = PhaseSettings(phase, (Stage(1, 2, 16),), backbone=OptimizerSettings(1e-3))
        config = RunConfig(run.model, (settings,))
        assert RunConfig.from_json(config.to_json()) == config
