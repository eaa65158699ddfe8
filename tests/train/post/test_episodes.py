"""The store of episodes: killed at any moment, nothing is trained on twice, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import same_bits
from store_cases import BATCH, MOST_STALE, UPDATES, check, episode, train

from train.files import WriteError
from train.post import episodes as module
from train.post.episodes import JOURNAL, open_store
from train.post.recorded import Recorded

ROOT = Path(__file__).parents[3]


class Killed(BaseException):
    """Stands for the end of the process."""


def uninterrupted(folder: Path) -> list[list]:
    with open_store(folder / "store", most_stale=MOST_STALE) as store:
        weights = train(store, folder / "weights.json")
        check(store, weights)
    return weights


def problems(weights):
    return [[problem for problem, *_ in update] for update in weights]


def test_episodes_come_back_as_they_were(tmp_path):
    kept = [episode(1), episode(2, turns=1), episode(3, turns=0, ended="error")]
    kept[2].recorded, kept[2].error = None, "RuntimeError: naïve \ud800"
    with open_store(tmp_path / "store", most_stale=0) as store:
        store.add(kept, [1.0, 0.5, float("nan")])
    with open_store(tmp_path / "store", most_stale=0) as store:
        found = store.take(0, 3)
    assert [each.reward for each in found[:2]] == [1.0, 0.5] and np.isnan(found[2].reward)
    for mine, own in zip(found, kept, strict=True):
        for name in ("task", "problem", "prompt", "ended", "error", "version"):
            assert getattr(mine.episode, name) == getattr(own, name)
        same_bits(mine.episode.prompt_tokens, own.prompt_tokens)
        for turn, other in zip(mine.episode.turns, own.turns, strict=True):
            assert (turn.text, turn.observation) == (other.text, other.observation)
            for name in ("tokens", "log_probs", "observation_tokens"):
                same_bits(getattr(turn, name), getattr(other, name))
        if own.recorded is None:
            assert mine.episode.recorded is None
        else:
            for name, array in vars(own.recorded).items():
                same_bits(getattr(mine.episode.recorded, name), array)
    with pytest.raises(RuntimeError, match="the environment of a stored episode is gone"):
        found[0].episode.environment.step("a")


def test_first_come_first_served_until_stale(tmp_path):
    with open_store(tmp_path / "store", most_stale=1) as store:
        assert store.take(0, 2) is None
        store.add([episode(n) for n in range(5)], range(5))
        assert [each.episode.problem for each in store.take(0, 2)] == [0, 1] and store.waiting(1) == 3
        store.add([episode(n, 1) for n in range(5, 8)], range(3))
        assert [each.episode.problem for each in store.take(1, 2)] == [2, 3]
        assert [each.episode.problem for each in store.take(2, 2)] == [5, 6], "4 is two updates old"
        counts = store.counts
        assert (counts.added, counts.trained, counts.waiting, counts.stale) == (8, 6, 1, 1)
        assert store.take(3, 1) is None and store.counts.waiting == 1


def test_an_episode_is_taken_as_often_as_it_may_be(tmp_path):
    with open_store(tmp_path / "store", most_stale=9, uses=2) as store:
        store.add([episode(n) for n in range(4)], range(4))
        taken = [[each.episode.problem for each in store.take(update, 2)] for update in range(4)]
        assert taken == [[0, 1], [2, 3], [0, 1], [2, 3]]
        assert store.take(4, 2) is None and store.counts.trained == 4


def test_a_take_is_the_same_again(tmp_path):
    with open_store(tmp_path / "store", most_stale=1) as store:
        store.add([episode(n) for n in range(4)], range(4))
        first = [each.name for each in store.take(0, 2)]
        assert [each.name for each in store.take(0, 2)] == first
    with open_store(tmp_path / "store", most_stale=1) as store:
        assert [each.name for each in store.take(0, 2)] == first
        assert [each.name for each in store.take(1, 2)] != first
        with pytest.raises(ValueError, match="got 1: rewind to the weights that are trained"):
            store.take(1, 3)


def test_rewinding(tmp_path):
    with open_store(tmp_path / "store", most_stale=5) as store:
        store.add([episode(n) for n in range(4)], range(4))
        store.take(0, 2)
        store.add([episode(n, 1) for n in range(4, 6)], range(2))
        store.take(1, 2)
        with pytest.raises(ValueError, match="episodes of weights after 1 updates wait, got update 0|rewind"):
            store.take(0, 1)
        store.rewind(1)
        assert [each.episode.problem for each in store.take(1, 4)] == [2, 3, 4, 5]
        store.rewind(0)
        assert store.counts.unmade == 2 and store.counts.waiting == 4, "those of weights after an update are gone"
        assert [each.episode.problem for each in store.take(0, 4)] == [0, 1, 2, 3]
        assert len(list(store.folder.glob("*.safetensors"))) == 1


def test_what_is_saved_is_forgotten(tmp_path):
    with open_store(tmp_path / "store", most_stale=5) as store:
        for update in range(3):
            store.add([episode(10 * update + n, update) for n in range(2)], range(2))
            store.take(update, 2)
        store.forget(2)
        assert [path.name for path in store.folder.glob("*.safetensors")] == ["00000002.safetensors"]
        assert store.counts.trained == store.counts.added == 6
        with pytest.raises(ValueError, match="those after 2 updates at least, got weights after 1"):
            store.rewind(1)
        store.rewind(2)
        assert [each.episode.problem for each in store.take(2, 2)] == [20, 21]


def test_killed_at_every_write(tmp_path, monkeypatch):
    """Every write to the disk, every renaming and every removal is once the last thing that the process does."""
    want = problems(uninterrupted(tmp_path / "whole"))
    calls = {"left": 0}

    def deadly(function, *, before):
        def run(*args, **kwargs):
            calls["left"] -= 1
            if before and calls["left"] == 0:
                raise Killed
            result = function(*args, **kwargs)
            if not before and calls["left"] == 0:
                raise Killed
            return result

        return run

    deaths = 0
    for before in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", deadly(os.fsync, before=before))
            patch.setattr(Path, "replace", deadly(Path.replace, before=before))
            patch.setattr(Path, "unlink", deadly(Path.unlink, before=before))
            for at in range(1, 200):
                folder, alive = tmp_path / f"{before}{at}", False
                calls["left"] = at
                try:
                    alive = problems(uninterrupted(folder)) == want
                except Killed:
                    deaths += 1
                    calls["left"] = -1
                    assert problems(uninterrupted(folder)) == want
                if alive:
                    break
            assert alive, "the run has more writes than it was killed at"
    assert deaths > 60


def test_a_torn_line_is_cut_off(tmp_path):
    with open_store(tmp_path / "store", most_stale=5) as store:
        store.add([episode(n) for n in range(4)], range(4))
        store.take(0, 2)
    journal = tmp_path / "store" / JOURNAL
    whole = journal.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last) + 1):
        journal.write_bytes(whole[:-cut])
        with open_store(tmp_path / "store", most_stale=5) as store:
            assert [each.episode.problem for each in store.take(0, 2)] == [0, 1]
            assert store.counts.waiting == 2
    assert journal.read_bytes() == whole


@pytest.mark.slow
def test_killed_by_the_system(tmp_path):
    """A process of its own that `SIGKILL` ends again and again, each time after a few more writes."""
    want = problems(uninterrupted(tmp_path / "whole"))
    folder = tmp_path / "killed"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}

    def run(writes: int) -> int:
        command = [sys.executable, str(ROOT / "tests" / "store_cases.py"), str(folder), str(writes)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert not done.stderr, done.stderr
        return done.returncode

    assert [run(writes) for writes in (1, 2, 5, 8, 12)] == [-signal.SIGKILL] * 5
    assert run(10**9) == 0
    assert problems(json.loads((folder / "weights.json").read_text())) == want


def test_a_full_disk_stores_nothing(tmp_path, monkeypatch):
    with open_store(tmp_path / "store", most_stale=5) as store:
        store.add([episode(0)], [0.0])
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(os, "fsync", full)
            with pytest.raises(WriteError, match="No space left on device"):
                store.add([episode(1)], [1.0])
            with pytest.raises(WriteError, match=f"{JOURNAL} must be writable: No space left on device"):
                store.forget(1)
        assert store.counts.added == 1
        store.add([episode(2)], [2.0])
        assert [each.episode.problem for each in store.take(0, 2)] == [0, 2]
    with open_store(tmp_path / "store", most_stale=5) as store:
        assert store.counts.trained == 2


def test_what_cannot_be_is_refused(tmp_path):
    with open_store(tmp_path / "store", most_stale=0) as store:
        with pytest.raises(ValueError, match="another has"), open_store(tmp_path / "store", most_stale=0):
            pass
        with pytest.raises(ValueError, match="the reward of problem 1 of task task must be finite, got nan"):
            store.add([episode(0), episode(1)], [0.0, float("nan")])
        with pytest.raises(ValueError, match="rewards must be one for each of 1 episodes, got 2"):
            store.add([episode(0)], [0.0, 1.0])
        with pytest.raises(ValueError, match=r"must be of the same weights, got versions \[0, 1\]"):
            store.add([episode(0), episode(1, 1)], [0.0, 1.0])
        assert store.counts.added == 0 and not list(store.folder.glob("*.safetensors"))
        store.add([episode(0, 3)], [0.0])
        with pytest.raises(ValueError, match="episodes of weights after 3 updates wait, got update 1: rewind first"):
            store.take(1, 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"an empty folder or one, got .*other, which has thesis\.tex"):
        open_store(tmp_path / "other", most_stale=0).__enter__()
    journal = tmp_path / "store" / JOURNAL
    journal.write_bytes(b"[1]\n" + journal.read_bytes())
    with pytest.raises(ValueError, match="is damaged in line 1"):
        open_store(tmp_path / "store", most_stale=0).__enter__()


def test_a_damaged_rollout_is_named(tmp_path):
    with open_store(tmp_path / "store", most_stale=0) as store:
        store.add([episode(0)], [0.0])
        path = store.folder / "00000000.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"00000000\.safetensors must hold stored episodes, but cannot be read"):
            store.take(0, 1)
        assert store.counts.trained == 0


def test_few_rollouts_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPEN_FILES", 1)
    with open_store(tmp_path / "store", most_stale=5) as store:
        for number in range(3):
            store.add([episode(number)], [float(number)])
        assert [each.reward for each in store.take(0, 3)] == [0.0, 1.0, 2.0] and len(store._read) == 1


def test_records_of_other_kinds_in_one_rollout(tmp_path):
    first, second = episode(0), episode(1)
    second.recorded = Recorded(routes=second.recorded.routes)
    with open_store(tmp_path / "store", most_stale=0) as store:
        store.add([first, second], [0.0, 1.0])
        found = store.take(0, 2)
    same_bits(found[1].episode.recorded.routes, second.recorded.routes)
    assert found[1].episode.recorded.selections is None and found[0].episode.recorded.selections is not None
    assert UPDATES * BATCH > 20
