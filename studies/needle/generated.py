"""Asks for needles as a user would: the answers are generated, through pages of an FP8 cache."""

from collections.abc import Iterator

import numpy as np

from dsa_jax import LLM, SamplingParams, Transformer
from studies.needle.needles import DIGITS
from studies.needle.questions import Cell, Questions


def ask_by_generation(model: Transformer, questions: Iterator[Questions], *, cache_format: str = "fp8") -> Cell:
    """Generates the digits of every answer greedily behind all that stands before it.

    The prompts of a row share all but their last tokens, which the engine reads once.

    Args:
      model: the transformer.
      questions: rows, as `draw_questions` gives them.
      cache_format: of the pages.

    Returns:
      how many answers are right in all their digits.
    """
    drawn = [
        (each.batch.tokens[row], each.batch.targets[row], each.answers[row])
        for each in questions
        for row in range(len(each.batch.tokens))
    ]
    length, most = max(len(tokens) for tokens, *_ in drawn), max(len(answers) for *_, answers in drawn)
    llm = LLM(model, max_length=length, rows=most, cache_format=cache_format)
    params = SamplingParams(temperature=0.0, max_tokens=DIGITS)
    right: list[bool] = []
    for tokens, targets, answers in drawn:
        for number in np.argsort(answers[:, 0]):  # so that each finds the pages of the one before it
            prompt = tokens[: answers[number, 0] + 1].tolist()
            [result] = llm.generate([prompt], params)
            right.append(result.outputs[0].tokens == targets[answers[number]].tolist())
    return Cell(sum(right), len(right))
