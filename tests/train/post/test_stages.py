"""Settings of stages: what contradicts itself is refused when it is configured, and all of it goes through JSON."""

import dataclasses
import json

import pytest
from stage_cases import POLICY, TOKENS, copy_task, policy_stage, post_config, start_stage, tasks, whole_stages

from train.optimizer import OptimizerSettings
from train.phases import DISTILL, ON_POLICY, PHASES, SFT, SPECIALIST, policy_phase
from train.post.policy import PolicySettings
from train.post.presets import PRESETS, load_preset
from train.post.stages import PostConfig, PostStage, tasks_of
from train.settings import PhaseSettings, Stage

ADAMW = OptimizerSettings(1e-3)


def test_the_threshold_of_masking_has_no_default():
    with pytest.raises(TypeError, match="off_policy_mask_threshold"):
        PolicySettings(num_generations=4, max_completion_length=8)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.9}, "replay must have 'kept'"),
        ({"top_k": 5}, "replay must have 'kept'"),
        ({"replay": ("kept",)}, "replay of 'kept' needs top_p below 1 or top_k above 0"),
        ({"replay": ("experts",)}, "replay must be different ones of routes, kept, selections"),
        ({"replay": ("routes", "routes")}, "replay must be different ones"),
        ({"attention": "dense"}, "attention 'dense' needs freeze_indexer true"),
        ({"attention": "dense", "freeze_indexer": True, "replay": ("selections",)}, "needs attention 'sparse'"),
        ({"attention": "local"}, "attention must be 'sparse' or 'dense', got 'local'"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"epsilon": 1.5}, "epsilon must be a finite number above 0 and below 1"),
        ({"beta": -0.1}, "beta must be a finite number at least 0"),
        ({"top_p": 1.5, "replay": ("kept",)}, "top_p must be at most 1, got 1.5"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"scale_rewards": "group"}, "scale_rewards must be True or False, got 'group'"),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(POLICY, **changes)


def changed(**changes):
    """A stage whose policy has other settings."""
    return policy_stage(policy=dataclasses.replace(POLICY, **changes))


def on_policy(**changes):
    return policy_stage(phase=ON_POLICY, teachers=("start",), policy=dataclasses.replace(POLICY, **changes))


def stage_of(policy):
    """A stage without settings of its policy, or of the indexer that it trains."""
    return PostStage("s", (PhaseSettings(SPECIALIST, (Stage(1, 8, TOKENS),), backbone=ADAMW),), policy=policy)


CONTRADICTIONS = {
    "must be a multiple of num_generations 3": lambda: changed(num_generations=3),
    "num_generations must be at least 2": lambda: changed(num_generations=1),
    "leave room for a prompt": lambda: changed(max_completion_length=TOKENS),
    "must be its only phase and have policy settings": lambda: stage_of(None),
    "trains the indexer: give its optimizer": lambda: stage_of(POLICY),
    "policy or samples_of, got both": lambda: policy_stage(samples_of=("start",), samples=4),
    "ON_POLICY needs teachers": lambda: policy_stage(phase=ON_POLICY),
    "no other phase has them": lambda: policy_stage(teachers=("start",)),
    "set scale_rewards false and beta 0": lambda: on_policy(beta=0.1),
    "samples and samples_of together": lambda: dataclasses.replace(start_stage(), samples=3),
    "the name of a stage must be letters": lambda: dataclasses.replace(start_stage(), name="../up"),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_stages_that_cannot_be(message):
    with pytest.raises(ValueError, match=message):
        CONTRADICTIONS[message]()


def test_stages_build_on_earlier_ones():
    start, specialist, *_ = whole_stages()
    with pytest.raises(ValueError, match="begins of stage specialist must be stages before it, none, got start"):
        post_config(specialist, start)
    with pytest.raises(ValueError, match="got start twice"):
        post_config(start, start)


def test_a_frozen_indexer_is_left_out_of_what_trains():
    frozen = policy_phase(SPECIALIST, dataclasses.replace(POLICY, freeze_indexer=True))
    assert frozen.trains == ("backbone",) and [name for name, _ in frozen.losses] == ["policy_loss"]
    learning = policy_phase(SPECIALIST, POLICY)
    assert learning.trains == ("backbone", "indexer") and [name for name, _ in learning.losses] == ["policy_loss", "kl"]
    assert policy_phase(SPECIALIST, POLICY) == learning  # so that the step is compiled once


def test_all_of_it_goes_through_json():
    for config in (post_config(), *(preset.config() for preset in PRESETS.values())):
        assert PostConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_unknown_fields_are_named():
    values = post_config().to_json()
    values["stages"][1]["policy"]["delta"] = 0.5
    with pytest.raises(ValueError, match=r"post.stages\[1\].policy has unknown fields \['delta'\]"):
        PostConfig.from_json(values)


def test_the_new_phases_are_known_by_name():
    assert {"SFT", "DISTILL", "SPECIALIST", "MIXED", "ON_POLICY"} <= PHASES.keys()
    assert SFT.trains == DISTILL.trains == ("backbone", "indexer")


def test_tasks_of_a_stage():
    assert [task.name for task in tasks_of(policy_stage(tasks=()), tasks())] == ["copy", "twice"]
    with pytest.raises(ValueError, match="stage specialist names the task 'other'; there are copy, twice"):
        tasks_of(policy_stage(tasks=("other",)), tasks())
    silent = {"copy": copy_task(demonstrate=None)}
    assert tasks_of(policy_stage(), silent)
    with pytest.raises(ValueError, match="learns from demonstrations, of which task copy has none"):
        tasks_of(start_stage(), silent)


def test_a_preset_that_there_is_not():
    with pytest.raises(ValueError, match="preset must be tiny"):
        load_preset("huge")
