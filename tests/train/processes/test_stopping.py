"""Signals, the clock, and the step at which all processes stop."""

import os
import random
import signal
import time

import jax
import pytest

from train.processes import cluster, stopping
from train.processes.ending import AGAIN
from train.processes.stopping import LAG, Pause, Pauses, SignalledError, Stopping, seconds_of


def send(number):
    """Sends this process a signal, and lets its handler run."""
    os.kill(os.getpid(), number)
    time.sleep(0)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_steps_is_a_request(number):
    before = signal.getsignal(number)
    with Stopping() as stop, stop.stepping():
        assert stop.due is None
        send(number)
        assert stop.due == 128 + number
    assert signal.getsignal(number) == before
    with pytest.raises(SignalledError, match=f"ended by {signal.Signals(number).name} after step 9, the last") as error:
        stop.check(9)
    assert error.value.status == 128 + number


def test_a_signal_elsewhere_interrupts():
    with Stopping(), pytest.raises(SignalledError, match="ended by SIGTERM"):
        send(signal.SIGTERM)


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    ends = []
    monkeypatch.setattr(stopping, "say_and_end", lambda text, status: ends.append((text, status)))
    with Stopping() as stop, stop.stepping():
        send(signal.SIGTERM)
        send(signal.SIGINT)
        wait_for(lambda: ends)
    assert ends == [("ended at once by a second signal, SIGINT", 130)]


def test_a_signal_that_the_main_thread_does_not_come_to_ends_the_process(monkeypatch):
    ends = []
    monkeypatch.setattr(stopping, "say_and_end", lambda text, status: ends.append((text, status)))
    monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.01)
    with Stopping():
        with pytest.raises(SignalledError):
            send(signal.SIGTERM)
        wait_for(lambda: ends)
    assert ends == [("ended by SIGTERM", 143)]


def test_time_stops_a_run(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = Stopping(after=100.0)
    pauses = Pauses(9, stopping=stop)
    assert pauses.after(1) is None
    now[0] = 100.0
    assert pauses.after(2) == Pause(AGAIN)


def test_minutes_count_from_the_last_checkpoint(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pauses = Pauses(9, minutes=0.5)
    found = []
    for step in range(1, 10):
        now[0] += 10.0
        pause = pauses.after(step)
        found.append(pause)
        if pause or step == 4:  # a regular checkpoint
            pauses.saved()
    assert [step for step, pause in enumerate(found, 1) if pause == Pause()] == [3, 7]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13800), ("90m", 5400), ("45s", 45), ("1d12h", 129600), ("20", 20), ("1h1.5s", 3601.5)],
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0m", "-5m", "3 h", "5x", "1m2h", "h", "nan", "9" * 400, "５m"])
def test_bad_durations(text):
    with pytest.raises(ValueError, match="stop-after must be a duration like 3h50m") as error:
        seconds_of(text)
    assert len(str(error.value)) < 200


# Processes that agree, simulated with every order of events that a collective in each step allows


class Simulated:
    """Runs `Pauses` of several processes in one, as far apart as they can be, and notes where each stops."""

    def __init__(self, monkeypatch, count, last, seed):
        self.store, self.now, self.random = {}, 0, random.Random(seed)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: self.now)
        monkeypatch.setattr(cluster, "put", self.store.__setitem__)
        monkeypatch.setattr(cluster, "read", self.read)
        monkeypatch.setattr(Pauses, "_count", iter([0] * count))
        self.stops = [Stopping() for _ in range(count)]
        self.pauses = [Pauses(last, stopping=stop) for stop in self.stops]
        self.done, self.found, self.last = [0] * count, [None] * count, last

    def read(self, folder):
        start = f"{folder}/"
        return {key.removeprefix(start): value for key, value in self.store.items() if key.startswith(start)}

    def can_go_on(self, process):
        """Says whether a process may end its next step: it reads the numbers of the one before, which need all."""
        step = self.done[process] + 1
        return self.found[process] is None and step <= self.last and all(done + 1 >= step - 1 for done in self.done)

    def run(self, signals):
        while ready := [p for p in range(len(self.done)) if self.can_go_on(p)]:
            self.now = self.random.choice(ready)
            if (self.now, self.done[self.now] + 1) in signals:
                self.stops[self.now].status = 143
            self.done[self.now] += 1
            pause = self.pauses[self.now].after(self.done[self.now])
            if pause is not None:
                self.found[self.now] = (self.done[self.now], pause.status)
        return self.found


@pytest.mark.parametrize("count", [2, 4])
def test_all_processes_stop_at_one_step(monkeypatch, count):
    for seed in range(200):
        with monkeypatch.context() as patched:
            simulated = Simulated(patched, count, 30, seed)
            first = simulated.random.randint(1, 20)
            signals = {(simulated.random.randrange(count), first + i) for i in range(simulated.random.randint(1, 3))}
            found = simulated.run(signals)
        assert len(set(found)) == 1 and found[0] is not None, (seed, signals, found)
        step, status = found[0]
        assert first <= step <= first + LAG + 5 and status == 143


def test_what_cannot_be_agreed_before_the_end_is_left(monkeypatch):
    simulated = Simulated(monkeypatch, 2, 5, 0)
    assert simulated.run({(0, 4)}) == [None, None]
    assert simulated.done == [5, 5]
