"""Files that cannot be written: named in one line, the old ones whole."""

import dataclasses
import errno
import json
import os

import jax
import jax.numpy as jnp
import pytest
from train_cases import fake_step, small_params, small_run

from train.data import load
from train.files import WriteError, replace_text
from train.processes import cluster, ending
from train.reporting.report import write_report
from train.run import Run
from train.watching.metrics import MetricsLog

REASONS = [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ESTALE, errno.EIO]


def raise_always(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))  # as the system does, without a path

    return fail


@pytest.mark.parametrize("number", REASONS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_cannot_be_replaced_stays_and_is_named(tmp_path, monkeypatch, number, call):
    path = tmp_path / "file.json"
    replace_text(path, "old")
    monkeypatch.setattr(os, call, raise_always(number))
    if call == "replace":
        monkeypatch.setattr("pathlib.Path.replace", raise_always(number))
    with pytest.raises(WriteError, match=f"^{path} must be writable: {os.strerror(number)}$"):
        replace_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.json"]


class FullFile:
    """Stands in for a file on a full disk: what it holds cannot be written, not even when it is closed."""

    def __init__(self, number):
        self.flush = self.close = self.fileno = raise_always(number)

    def write(self, text):
        return len(text)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("train.run.make_step", fake_step(None))
    monkeypatch.setattr(Run, "initial_params", lambda self: jax.tree.map(jnp.array, small_params(self.config.model)))


def test_metrics_that_cannot_be_written_name_the_last_checkpoint_and_the_run_goes_on_later(
    tmp_path, monkeypatch, quick
):
    config = small_run(tmp_path / "text")
    out, data, write = tmp_path / "out", load(config.data), MetricsLog._write

    def write_on_full_disk(log, step, *rest):
        if step == 4:
            log._file.close()
            log._file = FullFile(errno.ESTALE)
        write(log, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "_write", write_on_full_disk)
        message = f"{out}/metrics.jsonl must be writable: {os.strerror(errno.ESTALE)}; the last good checkpoint: "
        with pytest.raises(ValueError, match=f"^{message}{out}/checkpoints/[23]$"):
            Run(config, out).train(data)
    Run(config, out).train(data, resume=True)
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [*range(1, 10)]


def test_a_checkpoint_that_cannot_be_begun_is_named(tmp_path, monkeypatch, quick):
    config = small_run(tmp_path / "text")
    monkeypatch.setattr("train.saved.checkpoint.ocp.CheckpointManager.save", raise_always(errno.EROFS))
    with pytest.raises(ValueError, match="checkpoints could not be written: .*Read-only.*; the last whole one: none"):
        Run(config, tmp_path / "out").train(load(config.data))
    assert not (tmp_path / "out" / "owner.json").exists()


@dataclasses.dataclass
class Unwritable:
    """Stands in for results on a full disk."""

    number: int

    def save(self, folder):
        raise OSError(self.number, os.strerror(self.number))


def test_a_report_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        write_report(Unwritable(errno.ENOSPC), tmp_path / "out")


# The last line


@pytest.fixture
def afresh():
    ending.forget()
    yield
    ending.forget()


def test_the_command_that_resumes_stands_behind_an_error_once_there_is_a_run(afresh, capsys):
    ending.resume_with("python -m train --resume --out 'my run'")
    assert ending.say("no such preset", 2) == 2
    ending.mark_resumable()
    ending.say("first\nsecond " + 1000 * "x", 2)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: no such preset"
    assert second.startswith("error: first second xxx") and len(second) < 920
    assert second.endswith("…; resume with python -m train --resume --out 'my run'")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: connection closed"), True),
        (jax.errors.JaxRuntimeError("anything"), True),
        (ValueError("seq_len must be at most 64"), False),
        (None, False),
    ],
    ids=str,
)
def test_errors_that_another_process_may_have_caused(error, expected):
    assert cluster._is_of_others(error) is expected
    wrapped = ValueError("a checkpoint could not be written")
    wrapped.__cause__ = error
    assert cluster._is_of_others(wrapped) is expected
