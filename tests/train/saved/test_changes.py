"""Fields that may change in a run that is continued, and those that are refused, each with its reason."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
from train_cases import small_config, small_phases

from train.commands.overrides import rate_assignments, set_fields, steps_assignments
from train.optimizer import OptimizerSettings
from train.phases import BASE
from train.saved.changes import Change, Position, find_changes
from train.settings import PhaseSettings, RunConfig, Stage, as_json

STAGES = (Stage(4, 4, 16), Stage(6, 4, 32, 2), Stage(2, 2, 32))
IN_STAGE_TWO = Position(7, 0, 7, {})  # step 3 of 6 of the second stage of BASE


def make_run(**changes) -> RunConfig:
    """Makes BASE of three stages, then WARMUP and SPARSE of one each."""
    base, warmup, sparse = small_phases(Stage(5, 4, 32)).values()
    run = RunConfig(small_config(), (dataclasses.replace(base, stages=STAGES), warmup, sparse))
    return dataclasses.replace(run, **changes)


RUN = make_run()


def changes(*assignments, done: Position | None = IN_STAGE_TWO, before: RunConfig = RUN):
    after = set_fields(before, assignments)
    found = find_changes(Path("run"), before.to_json(), after.to_json(), done)
    assert all(change.step == (0 if done is None else done.step) for change in found)
    return [(change.field, change.before, change.after) for change in found]


@pytest.mark.parametrize(
    ("field", "before", "after"),
    [
        ("checkpoint_every", 50, 7),
        ("keep_checkpoints", 2, 3),
        ("evaluation_batches", 4, 1),
        ("model.pad_token_id", None, 3),
        ("phases.BASE.bias_rate", 0.01, 0.5),
        ("phases.BASE.backbone.learning_rate", 4e-3, 1e-3),
        ("phases.BASE.backbone.muon_learning_rate", 0.02, 0.01),
        ("phases.BASE.backbone.schedule", "cosine", "constant"),
        ("phases.BASE.backbone.warmup_steps", 0, 2),
        ("phases.BASE.backbone.clip", 1.0, 0.5),
        ("phases.BASE.stages.1.steps", 6, 3),
        ("phases.BASE.stages.1.steps", 6, 600),
        ("phases.BASE.stages.1.micro_batches", 2, 4),
        ("phases.BASE.stages.1.rates", [1.0, 1.0], [0.5, 0.1]),
        ("phases.BASE.stages.2.batch_size", 2, 8),
        ("phases.BASE.stages.2.seq_len", 32, 64),
        ("phases.WARMUP.stages.0.batch_size", 4, 2),
        ("phases.WARMUP.indexer.muon_learning_rate", None, 0.1),
        ("phases.WARMUP.indexer.moment_dtype", "float32", "bfloat16"),
    ],
)
def test_what_may_change(field, before, after):
    assert changes(f"{field}={json.dumps(after)}") == [(field, before, after)]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("model.index_topk", 5, "model.index_topk 4, here 5 (the model of a run stays)"),
        ("model.dtype", '"bfloat16"', "the model of a run stays"),
        ("seed", 3, "seed 0, here 3 (the seed of a run stays)"),
        ("phases.BASE.backbone.muon_learning_rate", "null", "the kind of an optimizer stays while its phase runs"),
        ("phases.BASE.backbone.moment_dtype", "bfloat16", "the dtype of moments stays while their phase runs"),
        ("phases.BASE.stages.0.steps", 5, "stages that are done stay"),
        ("phases.BASE.stages.0.micro_batches", 2, "stages that are done stay"),
        ("phases.BASE.stages.0.rates", [1.0, 0.5], "stages that are done stay"),
        ("phases.BASE.stages.1.steps", 2, "stage 1 must have at least the 3 steps that are done"),
        ("phases.BASE.stages.1.batch_size", 8, "stages that have begun keep batch_size and seq_len"),
        ("phases.BASE.stages.1.seq_len", 16, "stages that have begun keep batch_size and seq_len"),
    ],
)
def test_what_may_not_change(field, value, reason):
    with pytest.raises(ValueError) as error:
        changes(f"{field}={value}")
    message = str(error.value)
    assert reason in message and field in message and len(message) < 900
    assert message.endswith("--init run --phases SPARSE --out NEW")


def test_all_that_is_wrong_is_named_and_what_is_right_is_not():
    with pytest.raises(ValueError) as error:
        changes("seed=3", "model.index_topk=5", "checkpoint_every=7")
    assert "seed 0, here 3" in str(error.value) and "model.index_topk 4, here 5" in str(error.value)
    assert "checkpoint_every" not in str(error.value)


def test_a_phase_that_is_done_stays_and_one_that_has_not_begun_is_free():
    in_warmup = Position(14, 1, 2, {})
    for field, value in (("backbone.clip", 2), ("stages.2.steps", 3), ("bias_rate", 1)):
        with pytest.raises(ValueError, match="phase BASE is done"):
            changes(f"phases.BASE.{field}={value}", done=in_warmup)
    assert changes("phases.SPARSE.stages.0.seq_len=64", done=in_warmup) == [("phases.SPARSE.stages.0.seq_len", 32, 64)]


def test_the_last_phase_is_lengthened_after_its_end():
    done = Position(RUN.steps, 2, 5, {})
    assert changes("phases.SPARSE.stages.0.steps=9", done=done) == [("phases.SPARSE.stages.0.steps", 5, 9)]
    with pytest.raises(ValueError, match="at least the 5 steps that are done"):
        changes("phases.SPARSE.stages.0.steps=4", done=done)


def test_stages_follow_those_that_have_begun():
    """A stage may be cut where it stands and another shape follow; what is recorded is the whole list."""
    stages = [as_json(stage) for stage in (STAGES[0], Stage(3, 4, 32), Stage(9, 2, 64), STAGES[2])]
    ((field, before, after),) = changes(f"phases.BASE.stages={json.dumps(stages)}")
    assert field == "phases.BASE.stages" and len(before) == 3 and after == stages
    for wrong in (stages[:1], [stages[0], {**stages[1], "batch_size": 2}], stages[1:]):
        with pytest.raises(ValueError, match="phases.BASE.stages"):
            changes(f"phases.BASE.stages={json.dumps(wrong)}")


def test_at_the_border_of_two_stages_the_first_may_grow_and_the_second_be_another():
    border = Position(4, 0, 4, {})
    assert changes("phases.BASE.stages.0.steps=5", done=border) == [("phases.BASE.stages.0.steps", 4, 5)]
    assert changes("phases.BASE.stages.1.seq_len=16", done=border) == [("phases.BASE.stages.1.seq_len", 32, 16)]


def test_phases_that_have_not_begun_come_and_go():
    values = RUN.to_json()
    fewer = {**values, "phases": values["phases"][:1]}
    (found,) = find_changes(Path("run"), values, fewer, IN_STAGE_TWO)
    assert (found.field, [phase["name"] for phase in found.before], found.after) == ("phases", ["WARMUP", "SPARSE"], [])
    with pytest.raises(ValueError, match=r"phases .*\(phases that have begun stay\)"):
        find_changes(Path("run"), values, {**values, "phases": values["phases"][1:]}, IN_STAGE_TWO)


def test_before_the_first_checkpoint_all_but_model_and_seed_is_free():
    assert changes("phases.BASE.stages.0.batch_size=8", done=None) == [("phases.BASE.stages.0.batch_size", 4, 8)]
    with pytest.raises(ValueError, match="the model of a run stays"):
        changes("model.index_topk=5", done=None)


def test_fields_that_an_older_version_did_not_have_are_no_changes():
    older = copy.deepcopy(RUN.to_json())
    del older["model"]["pad_token_id"], older["evaluation_batches"], older["data"]["append"]
    older["init"] = None
    assert find_changes(Path("run"), older, RUN.to_json(), IN_STAGE_TWO) == []


def test_two_phases_of_one_name_go_by_their_numbers():
    base = PhaseSettings(BASE, STAGES, backbone=OptimizerSettings(1e-3))
    twice = make_run(phases=(base, base))
    field = "phases.1.backbone.clip"
    assert changes(f"{field}=2", before=twice) == [(field, 1.0, 2.0)]
    with pytest.raises(ValueError, match="without 'BASE'"):
        set_fields(twice, ["phases.BASE.bias_rate=1"])


def test_a_change_reads_as_one_line():
    assert str(Change(3, "phases.SPARSE.bias_rate", 0.1, 0.2)) == "phases.SPARSE.bias_rate 0.1 → 0.2"


# What sets fields


def test_values_are_json_and_else_strings():
    run = set_fields(RUN, ["model.dtype=bfloat16", 'data.data=["a=b", "c"]', "phases.WARMUP.indexer.b1=0.5"])
    assert (run.model.dtype, run.data.data) == ("bfloat16", ("a=b", "c"))
    assert run.to_json()["phases"][1]["indexer"]["b1"] == 0.5
    assert set_fields(RUN, []) is RUN


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "set must be like phases.SPARSE.bias_rate=0.001, got 'seed'"),
        ("=3", "set must be like"),
        ("model.index_top=3", "without 'index_top'; nearest: index_topk"),
        ("phases.SPARCE.bias_rate=1", "without 'SPARCE'; nearest: SPARSE"),
        ("phases.BASE.stages.3.steps=1", r"without '3'; .*0, 1, 2"),
        ("seed.x=1", "set cannot reach 'seed.x'"),
        ("model.index_topk=0", "index_topk must be at least 1, got 0"),
        ("model.index_topk=x", "run.model.index_topk must be int, got 'x'"),
        ("phases=[]", "at least one phase"),
    ],
)
def test_bad_assignments_are_named(assignment, message):
    with pytest.raises(ValueError, match=message):
        set_fields(RUN, [assignment])


def test_steps_go_to_the_last_stage_and_rates_to_all_that_trains():
    assert steps_assignments(RUN, ["BASE=20", "SPARSE=7"]) == [
        "phases.BASE.stages.2.steps=10",
        "phases.SPARSE.stages.0.steps=7",
    ]
    assert rate_assignments(RUN, ["SPARSE=0.5", "WARMUP.indexer=0.25"]) == [
        "phases.SPARSE.backbone.learning_rate=0.5",
        "phases.SPARSE.indexer.learning_rate=0.5",
        "phases.WARMUP.indexer.learning_rate=0.25",
    ]
    assert set_fields(RUN, steps_assignments(RUN, ["BASE=20"])).phases[0].steps == 20


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (steps_assignments, "BASE=10", "steps of BASE must be more than the 10 of its earlier stages, got 10"),
        (steps_assignments, "BASE", "steps must be like SPARSE=2000, got 'BASE'"),
        (steps_assignments, "BASE=1.5", "steps of BASE must be an integer"),
        (steps_assignments, "SFT=3", "steps must be of a phase of the run, BASE, WARMUP, SPARSE, got 'SFT'"),
        (rate_assignments, "SPARSE=-1", "learning_rate of SPARSE must be a finite number above 0"),
        (rate_assignments, "SPARSE=fast", "learning_rate of SPARSE must be a finite number above 0"),
        (rate_assignments, "WARMUP.backbone=1", "learning_rate must be of indexer in phase WARMUP, got 'backbone'"),
    ],
)
def test_bad_steps_and_rates_are_named(make, text, message):
    with pytest.raises(ValueError, match=message):
        make(RUN, [text])
