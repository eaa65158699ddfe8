"""A run that trains on stored episodes, in which weights are the list of what they were trained on."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from train.files import replace_text
from train.post.environment import Episode, Turn
from train.post.episodes import EpisodeStore, open_store
from train.post.recorded import Recorded

GROUP, BATCH, UPDATES, SAVE_EVERY, MOST_STALE = 2, 4, 9, 3, 2


def episode(number: int, version: int = 0, turns: int = 2, ended: str = "done") -> Episode:
    """An episode that differs from all others by its prompt."""
    rng = np.random.default_rng(number)
    ids = lambda n: rng.integers(64, size=n).astype(np.int32)
    played = [Turn(f"t{n}", ids(3 + n), rng.normal(size=3 + n).astype(np.float32), "o", ids(2)) for n in range(turns)]
    count = 4 + sum(len(turn.tokens) + 2 for turn in played)
    record = Recorded(
        routes=rng.integers(8, size=(count - 1, 2, 2)).astype(np.uint8),
        selections=rng.integers(count, size=(count - 1, 2, 4)).astype(np.int16),
        kept_ids=ids(count),
        kept_offsets=np.arange(count + 1, dtype=np.int32),
    )
    world = None  # the store knows nothing of it
    return Episode("task", number, f"prompt {number}", ids(4), played, world, ended, "", record, version)  # type: ignore[arg-type]


def train(store: EpisodeStore, saved: Path, *, rollout: int = 6) -> list[list]:
    """Goes on from the saved weights to the last update; returns what the weights were trained on, by update."""
    weights = json.loads(saved.read_text()) if saved.exists() else []
    store.rewind(len(weights))
    store.forget(len(weights))
    while len(weights) < UPDATES:
        update = len(weights)
        while (batch := store.take(update, BATCH)) is None:
            # Samples depend on the weights alone, as those of a seeded engine do.
            base = 1000 * update + 100 * store.waiting(update)
            store.add([episode(base + i, update) for i in range(rollout)], [float(base + i) for i in range(rollout)])
        for each in batch:
            assert each.reward == each.episode.problem and each.episode.prompt == f"prompt {each.episode.problem}"
            assert update - each.episode.version <= MOST_STALE
        weights.append([[each.episode.problem, *each.name] for each in batch])
        if not len(weights) % SAVE_EVERY:
            replace_text(saved, json.dumps(weights))
            store.forget(len(weights))
    return weights


def check(store: EpisodeStore, weights: list[list]) -> None:
    """Holds that nothing was trained on twice, out of its order, or lost."""
    names = [tuple(name) for update in weights for _, *name in update]
    assert len(weights) == UPDATES and len(set(names)) == len(names) == UPDATES * BATCH
    assert names == sorted(names), "first come, first served"
    counts = store.counts
    assert counts.trained == len(names)
    assert counts.added == counts.trained + counts.waiting + counts.stale + counts.unmade


def kill_at(write: int) -> None:
    """Has the system kill this process, as by `kill -9`, when it brings something to the disk for that time."""
    before, left = os.fsync, [write]

    def fsync(file):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        before(file)

    os.fsync = fsync


if __name__ == "__main__":  # a process of its own, to be killed
    folder = Path(sys.argv[1])
    kill_at(int(sys.argv[2]))
    with open_store(folder / "store", most_stale=MOST_STALE) as opened:
        check(opened, train(opened, folder / "weights.json"))
