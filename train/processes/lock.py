"""The lock of a run's folder: one process writes there, and a lock that a dead one left is told from a live one's."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from train.checks import shown
from train.files import writing

NAME = "owner.json"
BEAT_SECONDS = 10.0  # between two signs of life
STALE_SECONDS = 60.0  # without one, after which a lock of another machine is nobody's
LOOK_SECONDS = 1.0  # between two looks at a lock of which it is not clear
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of a file system that has no hard links


class Lock:
    """Holds a run's folder while it is entered, by a file that says who does: host, process, and when that started.

    The file appears by a hard link, which one process alone can make, over NFS too. Its time of modification is the
    sign of life, which the file server sets: clocks of different machines are never compared. An owner on this machine
    is alive if its process is there and began when the file says; one elsewhere if it gives a sign of life.

    Args:
      folder: the run's folder, which must be there.

    Raises:
      ValueError: when entered, naming who holds the folder.
    """

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self._owner = {**this_process(), "token": uuid.uuid4().hex}
        self._over = threading.Event()

    def __enter__(self) -> Self:
        spare = self._path.with_name(f"{NAME}.{self._owner['token']}")
        with writing(self._path):
            try:
                spare.write_text(json.dumps(self._owner) + "\n")
                while not _link(spare, self._path):
                    self._clear(spare)
            finally:
                spare.unlink(missing_ok=True)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        with contextlib.suppress(OSError):  # a folder that is gone needs no lock
            if self._is_mine():
                self._path.unlink()

    def check(self) -> None:
        """Checks that the folder is still there and this process's, before more is written into it.

        Raises:
          ValueError: if the folder is gone, or another process has taken it because this one gave no sign of life.
        """
        with writing(self._path):
            owner = read_owner(self._path)
        if owner is None:
            raise ValueError(f"{self._path.parent} must stay where it is while a run writes it: {NAME} is gone from it")
        if owner.get("token") != self._owner["token"]:
            raise ValueError(f"{self._path.parent} was taken over by {_describe(owner)}: only one may write it")

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a mount that is gone is met by whatever writes there
                if self._is_mine():
                    os.utime(self._path)

    def _is_mine(self) -> bool:
        return (read_owner(self._path) or {}).get("token") == self._owner["token"]

    def _clear(self, spare: Path) -> None:
        """Takes away a lock that is nobody's, or refuses.

        Raises:
          ValueError: if its owner is alive.
        """
        owner = read_owner(self._path)
        if owner is None:
            return
        if not self._is_dead(owner, spare):
            raise ValueError(
                f"{self._path.parent} is being written by {_describe(owner)}: wait for it, stop it, or give another "
                f"--out; if there is no such process, delete {self._path}"
            )
        with _alone(self._path.parent):
            if read_owner(self._path) == owner:  # else another has cleared it, and perhaps taken it
                self._path.unlink()

    def _is_dead(self, owner: dict[str, Any], spare: Path) -> bool:
        if owner.get("machine") == self._owner["machine"]:
            return not is_running(owner.get("process"), owner.get("started"))
        first = self._path.stat().st_mtime
        while True:
            os.utime(spare)
            try:
                with self._path.open() as file:  # opened, a file over NFS shows its newest time
                    last = os.fstat(file.fileno()).st_mtime
            except FileNotFoundError:
                return True
            if last != first:
                return False
            if spare.stat().st_mtime - last > STALE_SECONDS:
                return True
            time.sleep(LOOK_SECONDS)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time clear a folder, where its file system can lock one; ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # over NFS a folder may not be locked
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def this_process() -> dict[str, Any]:
    """Says which process this is, among those of all machines."""
    return {"host": platform.node(), "machine": _machine(), "process": os.getpid(), "started": _started(os.getpid())}


def is_running(process: Any, started: Any) -> bool:
    """Says whether a process of this machine is there, and is the one that began then."""
    if not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return _started(process) == started


def read_owner(path: Path) -> dict[str, Any] | None:
    """Reads who holds a folder, None if nobody does; nothing is known of a file that was damaged."""
    try:
        owner = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    return f"process {shown(owner.get('process'))} on {shown(owner.get('host'))}"


def _machine() -> str:
    """Names what a process number is unique in: a boot of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _started(process: int) -> str | None:
    """Gives the time at which a process began, in ticks since the machine did; None where there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "ended" if state in "ZX" else fields[18]
    except (OSError, IndexError):
        return None


def _link(source: Path, target: Path) -> bool:
    """Gives a file a second name, unless that is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _copy_new(source, target)
    return True


def _copy_new(source: Path, target: Path) -> bool:
    """Does the same on a file system without hard links, by a copy."""
    try:
        with target.open("x") as file:
            file.write(source.read_text())
    except FileExistsError:
        return False
    return True
