"""Judging words: the questions of a small model that is its own judge, and their answers."""

import pytest
from post_cases import episode, play

from train.post.environments.judging import Judged, judging
from train.post.environments.problems import HELD_OUT
from train.post.environments.rubric import Criterion
from train.post.environments.writing import LARGE, Word, writing
from train.post.judge import JudgeError, SelfJudge, short_question


@pytest.mark.parametrize(
    ("rule", "argument", "asked", "answer"),
    [
        ("begins", "k", "bk", "y"),
        ("ends", "k", "ek", "n"),
        ("characters", "5", "c5", "y"),
        ("characters", "4", "c4", "n"),
        ("alphabet", "abcdefghijklmnopqrstuvwxyz", "a", "y"),
    ],
)
def test_questions_and_answers(rule, argument, asked, answer):
    judged = Judged("kaoem", Criterion(rule, argument), "3f9a")
    assert judged.prompt == f"J3f9a|kaoem|3f9a{asked}:"
    assert judged.answer == answer and judged.grade(answer).outcome == 1.0
    assert [judged.grade(text).outcome for text in ("yn", "", "Y", {"y": "n", "n": "y"}[answer])] == [0.0] * 4


def test_both_answers_are_frequent_and_demonstrations_right():
    task = judging()
    answers = [task.demonstrate(number)[0] for number in range(200)]
    assert 60 < answers.count("y") < 140 and set(answers) == {"y", "n"}
    for number in (*range(50), HELD_OUT):
        assert play(task, number, task.demonstrate(number)).environment.outcome == 1.0
        assert len(task.make(number).reset()) < 60


def test_a_self_judge_that_knows_the_answers_gives_the_rules_grade():
    """The questions that it asks are those of the task."""
    task = writing()

    def probability(prompts):
        believed = []
        for prompt in prompts:
            _, text, end = prompt.split("|")
            asked, argument = end[4], end[5:-1]
            rules = {"b": text.startswith(argument), "e": text.endswith(argument), "c": argument == str(len(text))}
            believed.append(float(rules.get(asked, text.isalpha())))
        return believed

    episodes = [play(task, number, task.demonstrate(number)) for number in range(30)]
    judged = SelfJudge(probability, question=short_question)(episodes)
    assert judged == pytest.approx([one.environment.outcome for one in episodes])
    assert len(set(judged)) > 2


def test_a_long_text_is_cut_and_stays_in_its_fence():
    prompt = short_question(Word("k", "m", 5).rubric[0], "k" * 99 + "|", "3f9a")
    assert prompt == "J3f9a|" + "k" * 24 + " [cut]|3f9abk:"


def test_what_has_no_short_question_is_refused():
    with pytest.raises(JudgeError, match="short_question needs criteria that have a rule"):
        SelfJudge(lambda prompts: [], question=short_question)(
            [episode(writing(LARGE).make(0), "Dear you, is it?", task="writing")]
        )
    with pytest.raises(ValueError, match="kind of what is judged must be word, got note"):
        judging(LARGE)
