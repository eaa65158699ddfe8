"""The seven tasks: their problems, their grades, their demonstrations, and what a hostile model can do."""

import functools
import pickle
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from post_cases import episode, play

from train.post.environment import Task
from train.post.environments import BY_RUBRIC, NAMES, VERIFIABLE, make_tasks
from train.post.environments.problems import HELD_OUT, HELD_SHARE, check_range, chosen, draw
from train.post.rewards import outcome, reward_name, score

TINY = {task.name: task for task in make_tasks()}
LARGE = {task.name: task for task in make_tasks("large")}
EVERY = [pytest.param(task, id=f"{size}-{name}") for size, tasks in (("tiny", TINY), ("large", LARGE))
         for name, task in tasks.items()]  # fmt: skip
NUMBERS = (*range(60), *range(HELD_OUT, HELD_OUT + 20))


def length(one):
    """Bytes of an episode: prompt, turns with an end marker each, observations."""
    return len(one.prompt) + sum(len(turn.text) + 1 + len(turn.observation) for turn in one.turns)


@functools.cache
def played(task):
    """An episode of each number's demonstration, which tests only look at."""
    return [play(task, number, task.demonstrate(number)) for number in NUMBERS]


def test_there_are_seven():
    assert tuple(TINY) == tuple(LARGE) == NAMES == (*VERIFIABLE, *BY_RUBRIC) and len(NAMES) == 7
    assert all(isinstance(task, Task) for task in TINY.values())


@pytest.mark.parametrize("task", EVERY)
def test_a_number_is_always_the_same_problem(task):
    for number in (0, HELD_OUT + 3):
        ours, theirs = task.make(number), task.make(number)
        assert ours is not theirs and ours.reset() == theirs.reset() == theirs.reset()
    (again,) = make_tasks("tiny" if task in TINY.values() else "large", (task.name,))
    assert again.make(5).reset() == task.make(5).reset() and again.demonstrate(5) == task.demonstrate(5)


@pytest.mark.parametrize("task", EVERY)
def test_problems_differ(task):
    assert len({task.make(number).reset() for number in range(60)}) > 45


@pytest.mark.parametrize("task", EVERY)
def test_nothing_that_is_trained_on_is_held_out(task):
    """By what the problem consists of: small families repeat themselves, but not across the split."""
    problem = lambda number: repr(task.make(number).problem)
    trained = {problem(number) for number in range(60)}
    held = {problem(number) for number in range(HELD_OUT, HELD_OUT + 20)}
    assert not trained & held
    assert {zlib.crc32(each.encode()) % HELD_SHARE == 0 for each in held} == {True}


@pytest.mark.parametrize("task", EVERY)
def test_demonstrations_play_to_their_end_within_turns_and_context(task):
    most = 96 if task in TINY.values() else 4_096
    for one in played(task):
        assert one.ended == "done" and 1 <= len(one.turns) <= task.max_turns
        assert len(one.turns) == len(task.demonstrate(one.problem))
        assert length(one) <= most
        assert all(turn.observation.endswith("\n") for turn in one.turns[:-1]) and one.turns[-1].observation == ""


@pytest.mark.parametrize("task", EVERY)
def test_texts_are_ascii_and_no_turn_has_a_line_end(task):
    for one in played(task):
        texts = [one.prompt, *(part for turn in one.turns for part in (turn.text, turn.observation))]
        assert "".join(texts).isascii()
        assert not any("\n" in turn.text for turn in one.turns)
        assert one.prompt.endswith(("\n", ":"))


@pytest.mark.parametrize("task", EVERY)
def test_demonstrations_are_of_mixed_quality(task):
    """Some are right; where all are, some are longer than others that are."""
    episodes = played(task)
    right = [one for one in episodes if one.environment.outcome == 1]
    lengths = {sum(len(turn.text) for turn in one.turns) for one in right}
    assert len(right) > len(episodes) / 8
    assert len(right) < 0.75 * len(episodes) if task.name in ("coding", "search", *BY_RUBRIC) else len(lengths) > 2


@pytest.mark.parametrize("task", EVERY)
def test_rewards_are_numbers_and_a_right_episode_has_more(task):
    scores = score(task.rewards, played(task))
    right = [one.environment.outcome == 1 for one in played(task)]
    assert not scores.dropped.any() and scores.total.max() <= 1.1 and scores.total.min() >= 0
    assert scores.total[right].min() > scores.total[[not each for each in right]].max(initial=-1)


@pytest.mark.parametrize("task", EVERY)
def test_environments_survive_a_pickle(task):
    texts = task.demonstrate(3)
    environment = task.make(3)
    environment.reset()
    for text in texts[:-1]:
        environment.step(text)
    copy = pickle.loads(pickle.dumps(environment))
    assert copy.step(texts[-1]) == environment.step(texts[-1])
    assert copy.outcome == environment.outcome and copy.reset() == environment.reset()


@pytest.mark.parametrize("task", EVERY)
def test_episodes_of_one_problem_share_nothing(task):
    """A group plays one problem: what one episode does, another does not see."""
    one, other = task.make(9), task.make(9)
    prompt = other.reset()
    for text in task.demonstrate(9):
        one.step(text)
    assert other.reset() == prompt and other.outcome == 0.0


HOSTILE = [
    *("", "=", "#", "\n", "\0", "\ud800", "a" * 50_000, "=" * 5_000, "(" * 5_000, "9" * 5_000, "?" * 99, "-1+", "9+"),
    *("set 1 def f(n){while 1{}}", "set 1 " + "x" * 5_000, "set 99 x", "set 1 def f(n){return f(n);}", "test", "0-"),
    *("search " + "the " * 40, "search ", "answer", "answer ", "done now", "def f(n){while 1{n=n*n;}}", "?zz", "?ab\n"),
    *("def f(n){return f(n);}", 'def f(n){x="aaaaaaaa";while 1{x=x+x;}}', "a" * 999 + "=", "d" * 60 + "=", "\u0663="),
    *("#\u0661\u0664", "__import__('os')", "{}", "%s%n", "[[[[", "*" * 300, "(a+)+$", "a99999999999999999999=", "=\n"),
]


@pytest.mark.parametrize("task", EVERY)
def test_hostile_turns_are_worth_nothing_and_do_nothing(task):
    """Said again until the turns are over; each answer is short and ends in a line end."""
    for text in HOSTILE:
        one = play(task, 11, [text] * task.max_turns)
        assert one.environment.outcome == 0.0 or (task.name in BY_RUBRIC and one.environment.outcome < 1)
        assert all(len(turn.observation) < 500 for turn in one.turns)
        assert all(turn.observation.endswith("\n") for turn in one.turns if turn.observation)
        score(task.rewards, [one])


@settings(max_examples=60)
@given(st.sampled_from(NAMES), st.integers(0, 2 * HELD_OUT), st.lists(st.text(max_size=60), max_size=6))
def test_any_turns_are_harmless(name, number, texts):
    for tasks in (TINY, LARGE):
        one = play(tasks[name], number, texts)
        assert (
            0 <= one.environment.outcome <= 1 and 0 <= one.environment.language <= 1
            if "language" in vars(one.environment)
            else 0 <= one.environment.outcome <= 1
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_sizes_bound_what_a_policy_can_fill(name):
    """Turns are bounded; with an answer to each of them a tiny episode of short calls still has room."""
    assert TINY[name].max_turns <= 8 and LARGE[name].max_turns <= 12


def test_penalties_can_be_left_out_and_a_judge_put_in():
    def own(episodes):
        return [0.5] * len(episodes)

    tasks = make_tasks(names=("logic", "writing"), judge=own, penalty=False)
    logic, writing = (score(task.rewards, [play(task, 4, task.demonstrate(4))]) for task in tasks)
    assert logic.total.tolist() in ([0.0], [1.0])
    assert writing.total.tolist() == [0.5] and set(writing.parts) == {"own", "outcome"}


def test_the_length_penalty_is_what_the_recipe_has():
    names = {name: [(reward_name(reward), weight) for reward, weight in task.rewards] for name, task in TINY.items()}
    assert names["arithmetic"] == [("outcome_short", 1.0), ("language", 0.1)]
    assert {str(names[name]) for name in ("programs", "logic", "coding", "search")} == {"[('outcome_short', 1.0)]"}
    assert TINY["logic"].rewards[0][0].alpha == TINY["arithmetic"].rewards[0][0].alpha == 0.2
    assert TINY["search"].rewards[0][0].alpha == TINY["coding"].rewards[0][0].alpha == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "huge"}, "size must be tiny or large, got 'huge'"),
        ({"names": ("chess",)}, "names must be some of arithmetic, .*, got"),
        ({"names": ()}, "names must be some of"),
    ],
)
def test_tasks_that_are_not_there_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_tasks(**arguments)


def test_drawing_checks_its_number_and_gives_up():
    with pytest.raises(ValueError, match="problem must be at least 0, got -1"):
        draw("task", -1, lambda state: 1)
    with pytest.raises(ValueError, match="task has no trained problem at this size"):
        draw("task", 1, lambda state: None)
    side = "held-out" if zlib.crc32(b"'only'") % HELD_SHARE else "trained"
    with pytest.raises(ValueError, match=f"task has no {side} problem"):
        draw("task", HELD_OUT if side == "held-out" else 0, lambda state: "only")


@pytest.mark.parametrize("wrong", [(2, 1), (0, 3), (1, 99), 3, (1, 2, 3), (1.0, 2)])
def test_ranges_are_checked(wrong):
    with pytest.raises(ValueError, match="steps must be"):
        check_range("steps", wrong, least=1, most=64)


def test_shares_are_drawn_as_they_are_given():
    import random

    state = random.Random(0)
    names = [chosen(state, (("a", 30), ("b", 70))) for _ in range(2_000)]
    assert set(names) == {"a", "b"} and 0.25 < names.count("a") / 2_000 < 0.35


def test_an_outcome_is_what_the_environment_says():
    task = TINY["logic"]
    one = play(task, 2, task.demonstrate(2))
    assert outcome([one]) == [1.0] and outcome([episode(task.make(2))]) == [0.0]
