"""Episodes as the bytes of one safetensors file: arrays of all of them joined, and their texts as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from train.post.environment import Episode, Step, Turn
from train.post.recorded import Recorded

RECORDS = ("routes", "selections", "kept_ids", "kept_offsets")


class PlayedEnvironment:
    """Stands for the environment of a stored episode, which is gone."""

    def reset(self) -> str:
        """Raises RuntimeError."""
        raise RuntimeError("the environment of a stored episode is gone: its reward was stored with it")

    def step(self, text: str) -> Step:
        """Raises RuntimeError."""
        raise RuntimeError("the environment of a stored episode is gone: its reward was stored with it")


def pack_episodes(episodes: Sequence[Episode], rewards: Sequence[float]) -> bytes:
    """Packs episodes and their rewards, without their environments."""
    tokens, log_probs, facts = [], [], []
    records: dict[str, list[np.ndarray]] = {name: [] for name in RECORDS}
    for episode in episodes:
        tokens.append(episode.prompt_tokens)
        for turn in episode.turns:
            tokens += [turn.tokens, turn.observation_tokens]
            log_probs.append(turn.log_probs)
        record = episode.recorded or Recorded()
        found = {name: getattr(record, name) for name in RECORDS if getattr(record, name) is not None}
        for name, array in found.items():
            records[name].append(array)
        facts.append(_facts(episode) | {"records": {name: len(array) for name, array in found.items()}})
    join = lambda parts, dtype: np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)  # noqa: E731
    arrays = {"tokens": join(tokens, np.int32), "log_probs": join(log_probs, np.float32)}
    arrays |= {"rewards": np.asarray(rewards, np.float32)}
    arrays |= {name: np.ascontiguousarray(np.concatenate(parts)) for name, parts in records.items() if parts}
    return save(arrays, metadata={"episodes": json.dumps(facts)})


def _facts(episode: Episode) -> dict[str, Any]:
    turns = [
        {
            "text": turn.text,
            "tokens": len(turn.tokens),
            "observation": turn.observation,
            "observation_tokens": len(turn.observation_tokens),
        }
        for turn in episode.turns
    ]
    names = ("task", "problem", "prompt", "ended", "error", "version")
    own = {name: getattr(episode, name) for name in names}
    return own | {"prompt_tokens": len(episode.prompt_tokens), "turns": turns}


def unpack_episodes(path: Path) -> list[tuple[Episode, float]]:
    """Reads episodes and their rewards.

    Raises:
      ValueError: if the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            facts = json.loads((file.metadata() or {})["episodes"])
        cuts = {name: _Cut(array) for name, array in arrays.items()}
        return [(_episode(each, cuts), float(cuts["rewards"].take(1)[0])) for each in facts]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} must hold stored episodes, but cannot be read: {error}") from error


class _Cut:
    """Takes an array off from its beginning."""

    def __init__(self, array: np.ndarray):
        self._array, self._at = array, 0

    def take(self, count: int) -> np.ndarray:
        self._at += count
        if self._at > len(self._array):
            raise ValueError(f"{count} more entries are wanted than there are")
        return self._array[self._at - count : self._at]


def _episode(facts: dict[str, Any], cuts: dict[str, _Cut]) -> Episode:
    tokens, log_probs = cuts["tokens"], cuts["log_probs"]
    prompt_tokens, turns = tokens.take(facts["prompt_tokens"]), []
    for turn in facts["turns"]:
        own = tokens.take(turn["tokens"])
        answer = tokens.take(turn["observation_tokens"])
        turns.append(Turn(turn["text"], own, log_probs.take(len(own)), turn["observation"], answer))
    records = {name: cuts[name].take(count) for name, count in facts["records"].items()}
    return Episode(
        task=facts["task"],
        problem=facts["problem"],
        prompt=facts["prompt"],
        prompt_tokens=prompt_tokens,
        turns=turns,
        environment=PlayedEnvironment(),
        ended=facts["ended"],
        error=facts["error"],
        recorded=Recorded(**records) if records else None,
        version=facts["version"],
    )
