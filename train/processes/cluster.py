"""The processes of a distributed run: they join, compare what they are, watch each other, and end together.

They speak through the key-value store of JAX's coordination service, never by a collective: a collective waits for
whoever is missing, and the store does not. Process 0 holds that service, judges who is alive, and says so to all.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its client has no public name; Orbax takes it from here too
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

from train.checks import check_integer, check_number, shown
from train.processes.ending import AGAIN, end_now, say_and_end, say_last
from train.processes.relay import Relay

DEATH_TIMEOUT = 30.0  # seconds without a sign of life after which a process is lost
JOIN_TIMEOUT = 300.0  # seconds in which all processes must have started
MISSED_BEATS = 5  # after which a process is lost, if a collective has failed meanwhile
PREFIX = "train/"  # of all keys
POLL_SECONDS = 0.05  # between two looks for what another process must write
TELL_SECONDS = 2.0  # for telling the others of an end that cannot wait
OF_OTHERS = re.compile(r"\b(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): |Gloo|NCCL")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Says which process of how many this is; None leaves it to SLURM or Open MPI.

    Args:
      coordinator: HOST:PORT of process 0.
      count: how many processes there are.
      index: the number of this one.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self):
        given = [x for x in (self.coordinator, self.count, self.index) if x is not None]
        if len(given) in (1, 2):
            raise ValueError(
                "coordinator, num_processes and process_id must be given together or not at all, got "
                f"{self.coordinator}, {self.count} and {self.index}"
            )
        if self.coordinator is None or self.count is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 2**16:
            raise ValueError(f"coordinator must be HOST:PORT like 10.0.0.1:1234, got {shown(self.coordinator)}")
        check_integer("num_processes", self.count)
        if not 0 <= (self.index or 0) < self.count:
            raise ValueError(f"process_id must be from 0 to num_processes - 1 = {self.count - 1}, got {self.index}")


# Joining


def join(processes: Processes, *, death_timeout: float = DEATH_TIMEOUT, join_timeout: float = JOIN_TIMEOUT) -> None:
    """Joins the other processes, before anything else of JAX, and watches them from then on.

    Args:
      processes: which one this is.
      death_timeout: seconds within which all processes end when one has.
      join_timeout: seconds in which all must have started.

    Raises:
      ValueError: if they do not come together.
    """
    check_number("death_timeout", death_timeout, least=1)
    check_number("join_timeout", join_timeout, least=1)
    # It takes SIGTERM for itself, and lets the run go on.
    jax.config.update("jax_enable_preemption_service", False)
    text = f"the processes of the run did not come together within {join_timeout:g} s"
    late = threading.Timer(join_timeout, say_and_end, (text, AGAIN))
    late.daemon = True
    late.start()
    margin = 60 + round(3 * death_timeout + join_timeout)  # JAX aborts where it gives up: it must come after this file
    try:
        with _through_a_relay() as relays:
            jax.distributed.initialize(
                processes.coordinator,
                processes.count,
                processes.index,
                initialization_timeout=margin,
                heartbeat_timeout_seconds=margin,
                shutdown_timeout_seconds=margin,
            )
    except Exception as error:  # of any type: a cluster's environment may lack a variable, or say no number
        reason = f"{type(error).__name__}: {str(error)[:500]}"
        raise ValueError(f"the processes of the run did not come together: {reason}") from error
    finally:
        late.cancel()
    state = distributed.global_state
    _here.watch = Watch(state.process_id, state.num_processes, patience=death_timeout, relay=next(iter(relays), None))
    _here.watch.start()


@contextlib.contextmanager
def _through_a_relay() -> Iterator[list[Relay]]:
    """Lets JAX's client reach the coordinator through a relay, which is in the list once the client is made."""
    make, relays = _jax.get_distributed_runtime_client, []

    def make_behind_relay(address: str, node_id: int, **options: Any) -> Any:
        # With certificates, the client checks the name of the host that it speaks to.
        if node_id > 0 and not options.get("mtls_cert_file"):
            relays.append(Relay(address))
            address = relays[0].address
        return make(address, node_id, **options)

    _jax.get_distributed_runtime_client = make_behind_relay
    try:
        yield relays
    finally:
        _jax.get_distributed_runtime_client = make


# The store


def put(key: str, value: Any) -> None:
    """Writes a JSON value, over what stood there."""
    _client().key_value_set(PREFIX + key, json.dumps(value), allow_overwrite=True)


def read(folder: str) -> dict[str, Any]:
    """Reads the values under a folder of keys, by their names inside of it."""
    start = f"{PREFIX}{folder}/"
    return {key.removeprefix(start): json.loads(value) for key, value in _client().key_value_dir_get(start)}


def _client() -> Any:
    return distributed.global_state.client


# Comparing


def compare(fields: Mapping[str, Any]) -> None:
    """Checks that all processes have the same fields; every process calls it, each time with the same purpose.

    Args:
      fields: JSON values by name.

    Raises:
      ValueError: in every process, naming a field, and its values in process 0 and in the first process that differs.
    """
    index, count = distributed.global_state.process_id, distributed.global_state.num_processes
    if count == 1:
        return
    folder = f"compare/{next(_here.comparisons)}"
    text = json.dumps(fields, sort_keys=True, default=str)
    put(f"{folder}/fields/{index}/all", json.loads(text))
    put(f"{folder}/digests/{index}", hashlib.sha256(text.encode()).hexdigest())
    if index == 0:
        digests = _wait_for(lambda: _all_of(f"{folder}/digests", count))
        others = sorted(int(i) for i, digest in digests.items() if digest != digests["0"])
        told = _describe_difference(folder, others) if others else ""
        put(f"{folder}/outcome/all", told)
    else:
        told = _wait_for(lambda: read(f"{folder}/outcome").get("all"))
    if told:
        raise ValueError(told)


def _all_of(folder: str, count: int) -> dict[str, Any] | None:
    """Reads what all processes must write, None while one has not."""
    found = read(folder)
    return found if len(found) == count else None


def _describe_difference(folder: str, others: list[int]) -> str:
    ours, theirs = (read(f"{folder}/fields/{i}")["all"] for i in (0, others[0]))
    (name, here, there), *more = _differences(ours, theirs)
    rest = f"; they differ in {len(more)} more" if more else ""
    also = f"; {len(others) - 1} more processes differ from process 0" if len(others) > 1 else ""
    return (
        "all processes of a run must be started alike: "
        f"{name} is {shown(here)} in process 0, {shown(there)} in process {others[0]}{rest}{also}"
    )


def _differences(ours: Any, theirs: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Lists the values in which two JSON trees differ, by their names."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = list(dict.fromkeys([*ours, *theirs]))
        return [d for k in keys for d in _differences(ours.get(k), theirs.get(k), f"{name}.{k}".lstrip("."))]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [d for i, pair in enumerate(zip(ours, theirs, strict=True)) for d in _differences(*pair, f"{name}[{i}]")]
    return [] if ours == theirs else [(name, ours, theirs)]


def _wait_for(look: Callable[[], Any]) -> Any:
    """Looks until there is something; if a process is lost meanwhile, the watch ends this one."""
    deadline, pause = time.monotonic() + JOIN_TIMEOUT, POLL_SECONDS
    while (found := look()) is None:
        if any(end["status"] == 0 for end in read("end").values()):
            raise ValueError("another process of the run ended well before this one began")
        if _here.watch is None and time.monotonic() > deadline:
            raise ValueError(f"the other processes of the run must come to the same point within {JOIN_TIMEOUT:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    return found


# Watching


class Watch:
    """Watches the processes of a run from threads of their own, and ends this one when another has ended.

    Every process writes a number that grows, once an interval. Process 0 reads all of them and writes down who is lost
    or has ended; the others read that, and take it for lost when its own number stands still.

    Args:
      index: the number of this process.
      count: how many there are.
      patience: seconds without a sign of life after which a process is lost.
      relay: the relay to the coordinator, if there is one.
    """

    def __init__(self, index: int, count: int, *, patience: float, relay: Relay | None):
        self.index, self.count, self.patience = index, count, patience
        self.interval = min(1.0, patience / 10)
        self._relay, self._over = relay, threading.Event()
        self._beats: dict[int, int] = {}
        self._seen = dict.fromkeys(range(count), time.monotonic())
        self._looked = time.monotonic()
        self._doubted: float | None = None
        self._verdict: dict[str, Any] | None = None
        self._last_words: tuple[str, int, str] | None = None

    def start(self) -> None:
        """Begins to beat and to watch."""
        for work in (self._beat, self._guard):
            threading.Thread(target=work, name="watch", daemon=True).start()

    # Beats and verdicts

    def _beat(self) -> None:
        for number in itertools.count():
            try:
                put(f"beat/{self.index}", number)
                if self.index == 0:
                    put("first/beat", number)
                    self._judge()
                else:
                    self._hear(read("first"))
            except jax.errors.JaxRuntimeError:
                pass  # the coordinator does not answer; the guard counts for how long
            if self._over.wait(self.interval):
                return

    def _guard(self) -> None:
        """Ends this process when process 0, which holds the coordinator, gives no sign of life."""
        while self.index > 0 and not self._over.wait(self.interval):
            self._forgive()
            silent = time.monotonic() - self._seen[0]
            closed = self._relay is not None and self._relay.broken.is_set()
            if closed or silent > self.patience:
                if self._last_words:  # told so, process 0 has ended
                    text, status, prefix = self._last_words
                    say_and_end(text, status, prefix=prefix)
                how = "it closed its connection" if closed else f"no sign of life for {silent:.0f} s"
                say_and_end(f"process 0, which coordinates the run, was lost: {how}", AGAIN)

    def _forgive(self) -> None:
        """Begins to count anew where this process itself stood still, as all do whom a scheduler suspends."""
        now, before = time.monotonic(), self._looked
        self._looked = now
        if now - before > MISSED_BEATS * self.interval:
            self._seen = dict.fromkeys(range(self.count), now)

    def _note(self, process: int, beat: int) -> None:
        if self._beats.get(process) != beat:
            self._beats[process], self._seen[process] = beat, time.monotonic()

    def _judge(self) -> None:
        self._forgive()
        for process, beat in read("beat").items():
            self._note(int(process), beat)
        ends = {int(process): end for process, end in read("end").items()}
        self._verdict = self._verdict or self._find(ends)
        if self._verdict:
            put("first/verdict", self._verdict)
            self._obey(self._verdict)
        elif len(ends) == self.count:
            put("first/over", True)
            self._over.set()

    def _find(self, ends: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
        """Finds who ends the run: a process that says so, one that is lost, or one that may have met the loss of it."""
        now, failed = time.monotonic(), {i: end for i, end in ends.items() if end["status"]}
        for process, end in failed.items():
            if not end["doubtful"]:
                return {"process": process, **end}
        if failed and self._doubted is None:
            self._doubted = now
        patience = min(self.patience, MISSED_BEATS * self.interval) if failed else self.patience
        for process, seen in self._seen.items():
            if process not in ends and now - seen > patience:
                text = f"was lost: no sign of life for {now - seen:.0f} s"
                return {"process": process, "status": AGAIN, "text": text, "doubtful": False}
        if self._doubted is not None and now - self._doubted > 2 * patience:
            process, end = next(iter(failed.items()))
            return {"process": process, **end}
        return None

    def _hear(self, first: dict[str, Any]) -> None:
        self._note(0, first.get("beat", -1))
        if first.get("over"):
            self._over.set()
        if first.get("verdict"):
            self._obey(first["verdict"])

    def _obey(self, verdict: dict[str, Any]) -> None:
        """Ends this process by what process 0 has found, unless it ends by itself."""
        text, status, mine = verdict["text"], verdict["status"], verdict["process"] == self.index
        if mine and not verdict["doubtful"]:
            return
        self.end(text if mine else f"process {verdict['process']} {text}", status)

    # Ending

    def announce(self, text: str, status: int, *, doubtful: bool = False) -> None:
        """Tells the others that this process ends."""
        text = text if text.startswith("ended ") else f"ended: {text}"
        put(f"end/{self.index}", {"status": status, "text": text, "doubtful": doubtful})

    def farewell(self, text: str, status: int) -> None:
        """Tells the others, and waits until they know if the coordinator ends with this process."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.announce(text, status)
        if self.index == 0:
            self._wait_for_others()

    def end(self, text: str, status: int, *, prefix: str = "error: ", doubtful: bool = False) -> NoReturn:
        """Ends this process with a line; of process 0 the others hear before their coordinator is gone."""
        if not doubtful:
            self._last_words = text, status, prefix
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.announce(text, status, doubtful=doubtful)
        if doubtful:  # process 0 finds out whether another was lost, and the watch says it
            time.sleep(self.patience + 2 * MISSED_BEATS * self.interval)
        say_last(text, status, prefix=prefix)
        if self.index == 0:
            self._wait_for_others()
        end_now(status)

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            for process, beat in read("beat").items():
                self._note(int(process), beat)
            now, silence = time.monotonic(), MISSED_BEATS * self.interval
            ends = read("end").items()  # with status 0, or in doubt, a process still listens
            left = {int(process) for process, end in ends if end["status"] and not end["doubtful"]}
            left |= {process for process, seen in self._seen.items() if now - seen > silence}
            if len(left | {0}) == self.count:
                break
            time.sleep(POLL_SECONDS)
        time.sleep(4 * POLL_SECONDS)  # what a process says, it says just before it leaves

    def wait_for_all(self) -> None:
        """Waits until every process has come to its good end; one that ends otherwise ends this one too."""
        self.announce("", 0)
        self._over.wait()


@dataclasses.dataclass
class _Here:
    """Holds what this process knows of its run, as `jax.distributed` does."""

    watch: Watch | None = None
    comparisons: Iterator[int] = dataclasses.field(default_factory=itertools.count)


_here = _Here()


def end(text: str, status: int, *, error: BaseException | None = None, prefix: str = "error: ") -> None:
    """Ends this process of a distributed run with a line, and the others with it; elsewhere it does nothing.

    Args:
      text: what went wrong.
      status: the exit status.
      error: what was raised. If it came from a collective, another process may be the cause: then that one is named.
      prefix: what stands before the text.
    """
    if _here.watch is not None:
        _here.watch.end(text, status, prefix=prefix, doubtful=_is_of_others(error))


def tell(text: str, status: int) -> None:
    """Tells the others that this process ends at once, if they can be told so soon."""
    if (watch := _here.watch) is not None:
        telling = threading.Thread(target=watch.farewell, args=(text, status), daemon=True)
        telling.start()
        telling.join(TELL_SECONDS)


def part() -> None:
    """Parts from the other processes once all have come to their good end, whatever the time between them."""
    watch = _here.watch
    if watch is None:
        return
    watch.wait_for_all()
    late = threading.Timer(watch.patience, end_now, (0,))
    late.daemon = True
    late.start()
    jax.distributed.shutdown()
    late.cancel()
    _here.watch = None


def _is_of_others(error: BaseException | None) -> bool:
    """Says whether an error, or what caused it, came from a collective or from the coordinator."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, jax.errors.JaxRuntimeError) or OF_OTHERS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
