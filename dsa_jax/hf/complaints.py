"""Says in one line what is wrong with a checkpoint: problems of a kind in one group, counted, with the likely cause."""

import collections
import operator
import re
from collections.abc import Collection, Iterable

from dsa_jax.strict_json import shown_name

_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")
_MAX_RUNS = 4  # of numbers that are written out

# Tensors that every checkpoint has, by which a prefix of all names is found.
_ANCHORS = ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight")


def grouped(problems: Iterable[tuple[str, str]]) -> list[str]:
    """Joins problems that differ in the numbers of layers and experts alone.

    They come in turns of what is wrong, so that the first of each is near the beginning.

    Args:
      problems: names of tensors, and what is wrong with each.

    Examples:
      >>> grouped((f"layers.{i}.weight", "is missing") for i in (0, 1, 2, 5))
      ['layers.{0–2, 5}.weight is missing, 4 tensors']
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, what in problems:
        groups.setdefault((_NUMBER.sub("{}", name), what), []).append(name)
    turns: collections.Counter[str] = collections.Counter()
    lines: list[tuple[int, str]] = []
    for (pattern, what), names in groups.items():
        verb = " ".join(what.split()[:2])
        turns[verb] += 1
        if len(names) == 1:
            lines.append((turns[verb], f"{shown_name(names[0])} {what}"))
            continue
        columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
        numbers = iter([_runs(set(column)) for column in columns])
        text = re.sub(r"\{\}", lambda _, numbers=numbers: next(numbers, "{}"), pattern)
        lines.append((turns[verb], f"{shown_name(text)} {what}, {len(names):,} tensors"))
    return [line for _, line in sorted(lines, key=operator.itemgetter(0))]


def _runs(numbers: set[int]) -> str:
    """Writes a set of numbers as runs, in braces if it is more than one number."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{first}" if first == last else f"{first}–{last}" for first, last in runs]
    if len(texts) > _MAX_RUNS:
        texts = [*texts[:_MAX_RUNS], "…"]
    return texts[0] if len(numbers) == 1 else "{" + ", ".join(texts) + "}"


def likely_cause(missing: Collection[str], found: Collection[str]) -> list[str]:
    """Guesses why many tensors are missing, from the names that the files hold and the model has no place for.

    Returns:
      A sentence, or nothing.
    """
    for anchor in _ANCHORS:
        for name in found:
            prefix = name.removesuffix(anchor)
            if prefix != name and sum(prefix + each in found for each in missing) * 2 > len(missing):
                return [f"every name begins with {shown_name(prefix)!r}, which must be taken off"]
    if sum(each.removeprefix("model.") in found for each in missing) * 2 > len(missing):
        return ["the names lack their beginning 'model.'"]
    fused = [name for name in found if re.search(r"\.experts\.(gate_up_proj|down_proj)(\.weight)?$", name)]
    if fused and any(re.search(r"\.experts\.\d+\.", name) for name in missing):
        example = shown_name(max(fused).split(".mlp.")[-1])
        return [
            f"the experts of a layer are fused in one tensor, `{example}`, where each expert must have its own: save "
            "them with transformers' save_original_format=True"
        ]
    return []
