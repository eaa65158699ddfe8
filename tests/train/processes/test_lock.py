"""The lock of a run's folder: one owner, told from what a dead one left."""

import contextlib
import errno
import json
import os
import threading

import pytest

from train.processes import lock
from train.processes.lock import Lock, is_running, this_process


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def leave(folder, *, silent=0.0, **changes):
    """Leaves the lock of another process in the folder, whose last sign of life is so many seconds old."""
    path = folder / lock.NAME
    path.write_text(json.dumps({**this_process(), "token": "another", **changes}))
    seen = path.stat().st_mtime - silent
    os.utime(path, (seen, seen))
    return path


def test_one_holds_a_folder_and_the_next_is_told_who(folder):
    with Lock(folder) as first:
        first.check()
        owner = json.loads((folder / lock.NAME).read_text())
        assert owner["process"] == os.getpid() and owner["host"]
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on .*wait for it, stop it"):
            Lock(folder).__enter__()
        assert os.listdir(folder) == [lock.NAME]
    assert os.listdir(folder) == []
    with Lock(folder):
        pass


@pytest.mark.parametrize(
    "changes", [{"process": 2**22 + 1}, {"started": "1"}, {"process": None}, {"process": "x"}], ids=str
)
def test_a_lock_of_a_dead_process_of_this_machine_is_nobodys(folder, changes):
    """The number may have gone to another process since, which began at another time."""
    leave(folder, **changes)
    with Lock(folder) as held:
        held.check()
        assert os.listdir(folder) == [lock.NAME]


def test_a_process_that_has_ended_but_is_not_waited_for_is_dead():
    child = os.posix_spawn("/bin/true", ["true"], {})
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not is_running(child, "1")
    assert lock._started(child) == "ended"
    os.waitpid(child, 0)
    assert is_running(os.getpid(), this_process()["started"])


def test_a_silent_lock_of_another_machine_is_nobodys_after_a_minute(folder, monkeypatch):
    leave(folder, silent=lock.STALE_SECONDS + 5, machine="another")
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("it need not wait"))
    with Lock(folder) as held:
        held.check()


def test_a_lock_of_another_machine_that_gives_a_sign_of_life_holds(folder, monkeypatch):
    path = leave(folder, silent=30, machine="another", host="elsewhere", process=7)
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(path))
    with pytest.raises(ValueError, match="is being written by process 7 on 'elsewhere'"):
        Lock(folder).__enter__()
    assert os.listdir(folder) == [lock.NAME]


def test_a_lock_of_another_machine_is_watched_until_it_is_silent_for_long_enough(folder, monkeypatch):
    path, looks = leave(folder, silent=30, machine="another"), []

    def grow_older(_):
        looks.append(1)
        monkeypatch.setattr(lock, "STALE_SECONDS", lock.STALE_SECONDS - 10)

    monkeypatch.setattr(lock.time, "sleep", grow_older)
    with Lock(folder):
        assert json.loads(path.read_text())["token"] != "another"
    assert len(looks) == 3  # from 60 to 30, which is its age


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": 3}'])
def test_a_damaged_lock_is_told_by_its_age_alone(folder, monkeypatch, text):
    path = leave(folder)
    path.write_text(text)
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(path))
    with pytest.raises(ValueError, match="process None on None.*delete"):
        Lock(folder).__enter__()


def test_a_lock_gives_signs_of_life(folder, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with Lock(folder):
        os.utime(folder / lock.NAME, (0, 0))
        beaten = threading.Event()
        for _ in range(6000):
            if (folder / lock.NAME).stat().st_mtime > 0:
                break
            beaten.wait(0.01)
        assert (folder / lock.NAME).stat().st_mtime > 0


def test_a_folder_that_is_gone_or_another_ones_is_noticed(folder):
    with Lock(folder) as held:
        (folder / lock.NAME).unlink()
        with pytest.raises(ValueError, match="must stay where it is while a run writes it"):
            held.check()
        leave(folder, process=7, host="elsewhere")
        with pytest.raises(ValueError, match="was taken over by process 7 on 'elsewhere'"):
            held.check()
    assert json.loads((folder / lock.NAME).read_text())["token"] == "another"  # it is left to that one


@pytest.mark.parametrize("left", [{}, {"started": "1"}], ids=["of nobody", "of a dead process"])
def test_of_many_that_begin_at_once_one_gets_the_folder(folder, left):
    for _ in range(20):
        if left:
            leave(folder, **left)
        start, stop, got = threading.Barrier(6), threading.Barrier(6), []

        def begin(start=start, stop=stop, got=got):
            start.wait()
            with contextlib.ExitStack() as held, contextlib.suppress(ValueError):
                held.enter_context(Lock(folder))
                got.append(1)
                stop.wait()
                return
            stop.wait()

        threads = [threading.Thread(target=begin) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        assert os.listdir(folder) == []


def test_a_file_system_without_hard_links(folder, monkeypatch):
    def link(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)
    with Lock(folder), pytest.raises(ValueError, match="is being written"):
        Lock(folder).__enter__()


def test_a_folder_that_cannot_be_written_is_named(folder, monkeypatch):
    def link(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ValueError, match="owner.json must be writable: No space left on device"):
        Lock(folder).__enter__()
