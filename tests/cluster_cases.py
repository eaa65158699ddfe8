"""Runs of several processes that meet with a death, a signal or a difference at a chosen moment.

The processes are forked from one that has imported everything, as importing takes longer than the runs. Their step is
a small one with a real collective, over real batches on a real mesh; everything else is the command itself.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0  # seconds that processes may take on a busy machine
DEATH_TIMEOUT = 3.0


@dataclasses.dataclass(frozen=True)
class Ended:
    """Holds what a process left."""

    status: int
    out: str
    err: str


class Cluster:
    """Forks processes of a run from one that has imported everything."""

    def __init__(self, environment: dict[str, str]):
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        self._parent = subprocess.Popen(
            [sys.executable, "-c", "import cluster_cases; cluster_cases.fork_on_demand()"],
            env=environment | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, *arguments: str, count: int = 2, events=(), extra=None, alone=False) -> list[Ended]:
        """Runs the command in `count` processes to their ends.

        Args:
          folder: where their streams go.
          *arguments: of the command.
          count: how many processes.
          events: `(process, moment, what)` of what happens in which process; see `_arm`.
          extra: more arguments of single processes, by number.
          alone: whether it is no distributed run.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        folder.mkdir(parents=True, exist_ok=True)
        orders = []
        for index in range(count):
            flags = ["--distributed", "--coordinator", address, "--num-processes", str(count)]
            flags += ["--process-id", str(index), "--death-timeout", str(DEATH_TIMEOUT)]
            given = [*arguments, "--no-evaluate", *([] if alone else flags), *(extra or {}).get(index, [])]
            mine = [(moment, what) for process, moment, what in events if process == index]
            orders.append({"arguments": given, "events": mine, "streams": str(folder / str(index))})
        self._write(orders)
        statuses = self._read(folder, count)
        return [
            Ended(status, *((folder / f"{i}.{name}").read_text() for name in ("out", "err")))
            for i, status in enumerate(statuses)
        ]

    def close(self) -> None:
        """Ends the parent."""
        self._parent.communicate("", timeout=PATIENCE)

    def _write(self, orders) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(orders) + "\n")
        self._parent.stdin.flush()

    def _read(self, folder: Path, count: int) -> list[int]:
        assert self._parent.stdout is not None
        answer = self._parent.stdout.readline()
        assert answer, "the parent of the processes has ended"
        statuses = json.loads(answer)
        assert None not in statuses, [(folder / f"{i}.err").read_text() for i in range(count)]
        return statuses


def fork_on_demand() -> None:
    """Reads orders from stdin, forks a process for each, and writes how they ended."""
    import train_cases  # noqa: F401

    import train.__main__
    import train.commands.arguments  # noqa: F401

    for line in sys.stdin:
        children = [_fork(order) for order in json.loads(line)]
        print(json.dumps(_wait(children)), flush=True)


def _fork(order) -> int:
    child = os.fork()
    if child:
        return child
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order['streams']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    status = 70
    try:
        from train.__main__ import main

        _simplify()
        _arm(order["events"])
        status = main(order["arguments"])
    except SystemExit as error:
        status = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(children: list[int]) -> list[int | None]:
    """Waits for processes and gives their statuses, those of killed ones negative, None of one that did not end."""
    deadline, found = time.monotonic() + PATIENCE, {}
    while len(found) < len(children):
        for child in children:
            ended, status = (0, 0) if child in found else os.waitpid(child, os.WNOHANG)
            if ended:
                found[child] = os.waitstatus_to_exitcode(status)
            elif child not in found and len(found) == len(children) - 1:
                os.kill(child, signal.SIGCONT)  # the last one may have been suspended
            if child not in found and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                found[child] = None
        time.sleep(0.02)
    return [found[child] for child in children]


def _simplify() -> None:
    """Puts a small step and small parameters in place of the model's."""
    import jax
    import jax.numpy as jnp
    from train_cases import small_params

    import train.run
    from dsa_jax.parallel.sharding import parameter_shardings

    def make_step(graphdef, settings, *, micro_batches=1, mesh=None):
        @jax.jit
        def step(state, batch):
            loss = jnp.mean(batch.tokens.astype(jnp.float32))
            return dataclasses.replace(state, step=state.step + 1), {"loss": loss, "lm_loss": loss}

        return lambda state, batch: step(state, batch)

    def initial_params(self):
        params = small_params(self.config.model)
        if self.mesh is None:
            return jax.tree.map(jnp.array, params)
        places = parameter_shardings(params, self.mesh)
        return jax.tree.map(lambda x, at: jax.make_array_from_callback(x.shape, at, lambda i: x[i]), params, places)

    train.run.make_step = make_step
    train.run.Run.initial_params = initial_params


# What happens, and when


def fill(folder: str) -> None:
    """Fills the file system of a folder to the last block."""
    with contextlib.suppress(OSError), open(f"{folder}/filling", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def mount(*arguments: str) -> bool:
    """Mounts, if this process may."""
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


FULL_DISKS = {
    "fill": fill,
    "detach": lambda folder: subprocess.check_call(["umount", "--lazy", folder]),
}


def _arm(events) -> None:
    """Lets things happen in this process.

    A moment is "start" (before the processes compare), "step N" (between steps N and N + 1), "save N" (when the
    checkpoint of step N is begun). What happens is the name of a signal, "raise", "sleep" (and never wake), "NAME
    soon", which lets the process go on, into the next collective, before the signal comes, or one of `FULL_DISKS` with
    a folder.
    """
    from train.processes import cluster
    from train.processes.stopping import Pauses
    from train.saved.checkpoint import Checkpoints

    happens = dict(events)

    def meet(moment):
        what = happens.get(moment)
        if what == "raise":
            raise ValueError("something went wrong here")
        if what == "sleep":
            while True:
                time.sleep(1.0)
        if what is not None:
            name, *soon = what.split()
            if name in FULL_DISKS:
                FULL_DISKS[name](*soon)
                return
            number = signal.Signals[name]
            if soon:
                threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
            else:
                os.kill(os.getpid(), number)

    meet("forked")
    compare, after, save = cluster.compare, Pauses.after, Checkpoints.save

    def compare_then(fields):
        meet("start")
        return compare(fields)

    def after_then(self, step):
        meet(f"step {step}")
        return after(self, step)

    def save_then(self, state, position):
        meet(f"save {position.step}")
        return save(self, state, position)

    cluster.compare, Pauses.after, Checkpoints.save = compare_then, after_then, save_then


@contextlib.contextmanager
def started(environment):
    """Starts a parent of processes for the time of some tests."""
    cluster = Cluster(environment)
    try:
        yield cluster
    finally:
        cluster.close()
