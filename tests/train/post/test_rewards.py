"""Rewards by rule, their weighted sum, and that what is invalid is refused by name."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from post_cases import episode

from train.post.rewards import (
    LengthPenalty,
    RewardError,
    ScriptConsistency,
    checked,
    language,
    outcome,
    reward_name,
    score,
)


def left(outcome=1.0, language=1.0):
    return SimpleNamespace(outcome=outcome, language=language)


def constant(value, name="constant"):
    reward = lambda episodes: [value] * len(episodes)
    reward.__name__ = name
    return reward


def test_outcome_and_language_read_what_the_environment_left():
    episodes = [episode(left(1.0, 0.25), "a"), episode(left(0.5, 0.0), "a")]
    assert outcome(episodes) == [1.0, 0.5]
    assert language(episodes) == [0.25, 0.0]


def test_an_environment_without_an_outcome_is_named():
    with pytest.raises(
        RewardError, match="environments of task need a number called outcome, SimpleNamespace has none"
    ):
        checked(outcome, [episode(SimpleNamespace(), "a")])


def test_the_length_penalty_multiplies_what_is_right():
    """Ten tokens of forty lose a quarter of alpha; a wrong answer loses nothing; beyond the bound nothing more."""
    episodes = [episode(left(1.0), "123456789"), episode(left(0.0), "1"), episode(left(1.0), "x" * 500)]
    np.testing.assert_allclose(LengthPenalty(alpha=0.2, tokens=40)(episodes), [0.95, 0.0, 0.8], rtol=1e-12)


def test_the_length_penalty_counts_all_turns_and_no_observations():
    one = episode(left(), "1234", "1234")
    one.turns[0].observation, one.turns[0].observation_tokens = "x" * 9, np.zeros(9, np.int32)
    assert LengthPenalty(alpha=1.0, tokens=20)([one]) == [0.5]


@pytest.mark.parametrize("bad", [{"alpha": 1.5}, {"alpha": -0.1}, {"alpha": math.nan}, {"tokens": 0}])
def test_a_length_penalty_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LengthPenalty(**bad)


@pytest.mark.parametrize(
    ("text", "share"),
    [("abc", 1.0), ("ab\u4f60\u597d", 0.5), ("\u043f\u0440", 0.0), ("12 + 3", 1.0), ("", 1.0), ("\u00e9a1", 1.0)],
)
def test_script_consistency_counts_letters(text, share):
    assert ScriptConsistency("LATIN")([episode(left(), text)]) == [share]


def test_a_script_that_is_no_word_of_unicode_names_is_refused():
    with pytest.raises(ValueError, match="script"):
        ScriptConsistency("latin")


def test_the_sum_is_weighted_and_its_parts_are_kept():
    scores = score([(outcome, 1.0), (language, 0.1)], [episode(left(1.0, 0.5), "a"), episode(left(0.0, 1.0), "a")])
    np.testing.assert_allclose(scores.total, [1.05, 0.1])
    assert scores.parts["outcome"].tolist() == [1.0, 0.0] and scores.parts["language"].tolist() == [0.5, 1.0]
    assert not scores.dropped.any()


@pytest.mark.parametrize(
    ("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (None, "None"), ("1.0", "'1.0'"), ([1.0, 2.0], r"\[1.0")]
)
def test_what_is_no_finite_number_is_refused_by_name(value, shown):
    with pytest.raises(RewardError, match=rf"the reward wild must return finite numbers, got {shown}.*problem 7"):
        score([(outcome, 1.0), (constant(value, "wild"), 1.0)], [episode(left(), "a", problem=7)])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_wrong_count_is_refused_by_name(count):
    def short(episodes):
        return [0.0] * count

    with pytest.raises(RewardError, match=f"the reward short must return 2 numbers, one an episode, got {count}"):
        score([(short, 1.0)], [episode(left(), "a")] * 2)


def test_a_reward_that_raises_is_named_and_its_message_stays_out():
    def leaking(episodes):
        raise RuntimeError("key sk-123 of the prompt")

    with pytest.raises(RewardError, match="^the reward leaking raised RuntimeError$") as caught:
        score([(leaking, 1.0)], [episode(left(), "a")])
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_reward_that_returns_nothing_is_named():
    with pytest.raises(RewardError, match="the reward nothing raised TypeError"):
        checked(lambda_named("nothing"), [episode(left(), "a")])


def lambda_named(name):
    reward = lambda episodes: None
    reward.__name__ = name
    return reward


def test_scalars_of_numpy_are_numbers():
    values = checked(lambda episodes: np.ones(2, np.float32), [episode(left(), "a")] * 2)
    assert values.tolist() == [1.0, 1.0] and values.dtype == np.float64


def test_episodes_that_ended_in_an_error_are_dropped_and_seen_by_no_reward():
    seen = []

    def watching(episodes):
        seen.extend(each.problem for each in episodes)
        return [1.0] * len(episodes)

    episodes = [episode(left(), "a", problem=0), episode(left(), problem=1, ended="error", error="raised")]
    scores = score([(watching, 2.0)], episodes)
    assert seen == [0]
    assert scores.dropped.tolist() == [False, True]
    np.testing.assert_array_equal(scores.total, [2.0, np.nan])


def test_a_reward_may_drop_an_episode_that_it_has_no_number_for():
    def judging(episodes):
        episodes[1].ended, episodes[1].error = "error", "no answer"
        return [1.0, 0.0, 0.5]

    scores = score([(outcome, 1.0), (judging, 1.0)], [episode(left(), "a") for _ in range(3)])
    np.testing.assert_array_equal(scores.total, [2.0, np.nan, 1.5])
    np.testing.assert_array_equal(scores.parts["outcome"], [1.0, np.nan, 1.0])
    assert scores.dropped.tolist() == [False, True, False]


def test_no_episodes_are_no_error():
    assert score([(outcome, 1.0)], []).total.shape == (0,)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "at least one reward"),
        ([(outcome, 1.0), (outcome, 0.5)], "different names, got outcome, outcome"),
        ([(outcome, math.nan)], "the weight of outcome"),
    ],
)
def test_rewards_that_make_no_sum_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        score(rewards, [episode(left(), "a")])


def test_names_are_those_of_functions_or_their_kinds():
    class Own:
        def __call__(self, episodes):
            return [0.0] * len(episodes)

    names = [reward_name(each) for each in (outcome, LengthPenalty(), ScriptConsistency("CJK"), Own())]
    assert names == ["outcome", "outcome_short", "script_cjk", "Own"]
