"""The store of episodes: what was sampled and what was trained on, on the disk, so that a killed run goes on.

A rollout is a file, which is whole before a line of the journal tells of it. A line also tells, before each update,
which episodes it takes. Weights are saved less often than updates are made: a run that goes on from the weights after c
updates calls `rewind(c)`, and what later updates have taken waits again, for those updates never were.
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from train.checks import check_integer
from train.data.indexed import sync, sync_folder
from train.files import replace_bytes, writing
from train.post.environment import Episode
from train.post.packed import pack_episodes, unpack_episodes

JOURNAL = "episodes.jsonl"
OPEN_FILES = 4  # rollouts that are kept in memory


class Name(NamedTuple):
    """Names an episode: the number of its rollout, and its place there."""

    rollout: int
    place: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """Holds an episode of the store, whose environment is gone, and the reward that it got."""

    name: Name
    episode: Episode
    reward: float


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts the episodes of a store: each that was added is one of the others.

    Attributes:
      added: that were sampled.
      trained: that updates have taken as often as they may be.
      waiting: that updates may still take.
      stale: that were too old when their turn came, and give no update.
      unmade: whose weights were lost before they were saved: the run samples them anew.
    """

    added: int
    trained: int
    waiting: int
    stale: int
    unmade: int


class _Take(NamedTuple):
    update: int
    names: list[Name]
    stale: list[Name]


class _Rollout(NamedTuple):
    version: int
    count: int


class EpisodeStore:
    """Keeps episodes until they are trained on; `open_store` opens one.

    Args:
      folder: of the store.
      journal: its file of lines, open and locked.
      most_stale: how many updates the weights may have had since an episode was sampled.
      uses: how many updates take an episode.

    Examples:
      >>> from train.post.environment import Turn
      >>> ids = np.zeros(3, np.int32)
      >>> episode = Episode("sums", 7, "1+1=", ids, [Turn("2", ids, np.zeros(3, np.float32))], None, "done")
      >>> with open_store(Path("store"), most_stale=0) as store:
      ...     store.rewind(0)
      ...     number = store.add([episode, episode], [1.0, 0.0])
      ...     batch = store.take(0, 2)
      >>> [each.reward for each in batch]
      [1.0, 0.0]
    """

    def __init__(self, folder: Path, journal: BinaryIO, *, most_stale: int, uses: int = 1):
        check_integer("most_stale", most_stale, least=0)
        check_integer("uses", uses)
        self.folder, self.most_stale, self.uses = folder, most_stale, uses
        self._journal = journal
        self._rollouts: dict[int, _Rollout] = {}
        self._takes: list[_Take] = []
        self._next = self._added = self._unmade = self._final = self._old_trained = self._old_stale = 0
        self._used: collections.Counter[Name] = collections.Counter()
        self._stale: set[Name] = set()
        self._read: collections.OrderedDict[int, list[Stored]] = collections.OrderedDict()
        for number, line in enumerate(_whole_lines(journal), 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{folder / JOURNAL} is damaged in line {number}: {error}") from error
        self._tidy()

    # What a run does.

    def rewind(self, updates: int) -> None:
        """Goes back to the weights after so many updates: what later ones took waits again.

        Episodes that later weights have sampled are left out: these weights are gone.

        Raises:
          ValueError: if episodes that are needed were forgotten.
        """
        check_integer("updates", updates, least=0)
        if updates < self._final:
            raise ValueError(
                f"the episodes of {self.folder} are those after {self._final} updates at least, got weights after "
                f"{updates}"
            )
        later = any(take.update >= updates for take in self._takes)
        if later or any(rollout.version > updates for rollout in self._rollouts.values()):
            self._log({"rewind": updates})
            self._tidy()

    def add(self, episodes: Sequence[Episode], rewards: Sequence[float]) -> int:
        """Stores one rollout, all of it or nothing; returns its number.

        Raises:
          ValueError: for no episodes, ones of different weights, or a reward that is not finite of an episode that did
            not end with an error.
          WriteError: if the disk is full; nothing is stored.
        """
        if not episodes or len(rewards) != len(episodes):
            raise ValueError(f"rewards must be one for each of {len(episodes)} episodes, got {len(rewards)}")
        versions = {episode.version for episode in episodes}
        if len(versions) > 1:
            raise ValueError(f"the episodes of a rollout must be of the same weights, got versions {sorted(versions)}")
        for episode, reward in zip(episodes, rewards, strict=True):
            if not np.isfinite(reward) and episode.ended != "error":
                raise ValueError(
                    f"the reward of problem {episode.problem} of task {episode.task} must be finite, got {reward}"
                )
        number = self._next
        replace_bytes(self._path(number), pack_episodes(episodes, rewards))
        sync_folder(self.folder)
        self._log({"add": number, "version": int(versions.pop()), "count": len(episodes)})
        return number

    def take(self, update: int, count: int) -> list[Stored] | None:
        """Takes the episodes of an update, those that have waited longest; the disk knows of it before it returns.

        Taken again for the same update they are the same.

        Args:
          update: how many updates the weights have had.
          count: of the episodes.

        Returns:
          the episodes, or None if fewer wait that are fresh enough: then more are to be added.

        Raises:
          ValueError: for an update that is not the next one, or episodes of weights that are yet to come.
        """
        check_integer("update", update, least=0)
        check_integer("count", count)
        if self._takes and update <= self._takes[-1].update:
            again = [take for take in self._takes if take.update == update]
            if not again or len(again[0].names) != count:
                raise ValueError(
                    f"update must be after {self._takes[-1].update}, the last that took episodes, got {update}: "
                    "rewind to the weights that are trained"
                )
            return [self._stored(name) for name in again[0].names]
        if newest := [each.version for each in self._rollouts.values() if each.version > update]:
            raise ValueError(f"episodes of weights after {max(newest)} updates wait, got update {update}: rewind first")
        names, stale = self._choose(update, count)
        if len(names) < count:
            return None
        stored = [self._stored(name) for name in names]
        self._log({"take": update, "names": names, "stale": stale})
        return stored

    def rollout(self, number: int) -> list[Stored]:
        """Gives all episodes of a rollout, taken or not, in the order in which they were added.

        Raises:
          ValueError: if the store has none of that number, or no longer.
        """
        if number not in self._rollouts:
            raise ValueError(f"{self.folder} must have the rollout {number}, got {sorted(self._rollouts)}")
        return [self._stored(Name(number, place)) for place in range(self._rollouts[number].count)]

    def waiting(self, update: int) -> int:
        """Counts the episodes that wait and are fresh enough for an update, each as often as it may be taken."""
        return len(self._choose(update, None)[0])

    def forget(self, updates: int) -> None:
        """Says that the weights after so many updates are saved: what they were trained on is no longer needed."""
        check_integer("updates", updates, least=0)
        if updates > self._final:
            self._log({"forget": updates})
            self._tidy()

    @property
    def counts(self) -> Counts:
        """Counts the episodes."""
        alive = [Name(number, place) for number, each in self._rollouts.items() for place in range(each.count)]
        stale = sum(name in self._stale for name in alive)
        trained = sum(name not in self._stale and self._used[name] >= self.uses for name in alive)
        return Counts(
            added=self._added,
            trained=trained + self._old_trained,
            waiting=len(alive) - trained - stale,
            stale=stale + self._old_stale,
            unmade=self._unmade,
        )

    # The journal.

    def _log(self, event: dict[str, Any]) -> None:
        """Writes an event to the disk, and only then has it count."""
        line = json.dumps(event).encode() + b"\n"
        with writing(self.folder / JOURNAL):
            end = self._journal.seek(0, os.SEEK_END)
            try:
                left = line
                while left:
                    left = left[self._journal.write(left) :]
                sync(self._journal)
            except OSError:
                self._journal.truncate(end)
                raise
        self._apply(json.loads(line))

    def _apply(self, event: dict[str, Any]) -> None:
        if "add" in event:
            self._next = event["add"] + 1
            self._added += event["count"]
            self._rollouts[event["add"]] = _Rollout(event["version"], event["count"])
        elif "take" in event:
            names = [[Name(*name) for name in event[kind]] for kind in ("names", "stale")]
            self._count(_Take(event["take"], *names), 1)
        elif "rewind" in event:
            self._apply_rewind(event["rewind"])
        elif "forget" in event:
            self._apply_forget(event["forget"])
        else:
            raise ValueError(f"unknown event {sorted(event)}")

    def _count(self, take: _Take, sign: int) -> None:
        for name in take.names:
            self._used[name] += sign
        if sign > 0:
            self._takes.append(take)
            self._stale.update(take.stale)
        else:
            self._takes.remove(take)
            self._stale.difference_update(take.stale)

    def _apply_rewind(self, updates: int) -> None:
        for take in [take for take in self._takes if take.update >= updates]:
            self._count(take, -1)
        for number in [n for n, rollout in self._rollouts.items() if rollout.version > updates]:
            self._unmade += self._rollouts.pop(number).count

    def _apply_forget(self, updates: int) -> None:
        """Leaves out rollouts of which nothing waits, and which no update from this one on has taken."""
        self._final = updates
        used_later = {
            name.rollout for take in self._takes if take.update >= updates for name in take.names + take.stale
        }
        self._takes = [take for take in self._takes if take.update >= updates]
        for number, rollout in list(self._rollouts.items()):
            names = [Name(number, place) for place in range(rollout.count)]
            if number not in used_later and all(n in self._stale or self._used[n] >= self.uses for n in names):
                self._old_stale += sum(name in self._stale for name in names)
                self._old_trained += sum(name not in self._stale for name in names)
                self._stale.difference_update(names)
                del self._rollouts[number]
                for name in names:
                    del self._used[name]

    # Episodes.

    def _choose(self, update: int, count: int | None) -> tuple[list[Name], list[Name]]:
        """Chooses the episodes of an update in the order in which they came, and those that are too old for it."""
        names, stale = [], []
        for number, rollout in self._rollouts.items():
            places = [Name(number, place) for place in range(rollout.count)]
            left = [name for name in places if name not in self._stale and self._used[name] < self.uses]
            if update - rollout.version > self.most_stale:
                stale += left
                continue
            # Who has been taken less often comes first: a rollout goes through all its episodes before any comes again.
            for turn in range(self.uses):
                names += [name for name in left if self._used[name] <= turn]
            if count is not None and len(names) >= count:
                break
        return names if count is None else names[:count], stale

    def _stored(self, name: Name) -> Stored:
        if name.rollout not in self._read:
            path = self._path(name.rollout)
            found = unpack_episodes(path)
            self._read[name.rollout] = [
                Stored(Name(name.rollout, place), episode, reward) for place, (episode, reward) in enumerate(found)
            ]
            while len(self._read) > OPEN_FILES:
                self._read.popitem(last=False)
        self._read.move_to_end(name.rollout)
        return self._read[name.rollout][name.place]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def _tidy(self) -> None:
        """Removes files of which the journal does not tell, or no longer."""
        for path in self.folder.glob("*.safetensors*"):
            if path.suffix == ".tmp" or int(path.stem) not in self._rollouts:
                path.unlink(missing_ok=True)
        for number in [number for number in self._read if number not in self._rollouts]:
            del self._read[number]


@contextlib.contextmanager
def open_store(folder: Path, *, most_stale: int, uses: int = 1) -> Iterator[EpisodeStore]:
    """Makes the folder of a store, or opens it, for one process at a time.

    Args:
      folder: of nothing but a store.
      most_stale, uses: as in `EpisodeStore`.

    Raises:
      ValueError: if another process has it open, it holds something else, or its journal is damaged.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in folder.iterdir()}
    if others and JOURNAL not in others:
        raise ValueError(f"a store of episodes must be an empty folder or one, got {folder}, which has {min(others)}")
    with writing(folder / JOURNAL):
        file = (folder / JOURNAL).open("a+b", buffering=0)  # what fails must not be written later
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"a store of episodes is one process's at a time, but another has {folder}") from error
        yield EpisodeStore(folder, file, most_stale=most_stale, uses=uses)


def _whole_lines(file: BinaryIO) -> list[bytes]:
    """Reads the lines of a journal, and cuts off what a process has left that was killed while it wrote."""
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        file.truncate(sum(map(len, lines[:-1])))
        lines.pop()
    return lines
