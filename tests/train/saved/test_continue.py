"""A run goes on from its folder alone, wherever that and its data have moved, and takes up what may change."""

import contextlib
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from train_cases import fake_step, small_params, small_run, state_of, write_documents, write_preset

from train.__main__ import main
from train.commands.arguments import Arguments
from train.commands.overrides import set_fields, steps_assignments
from train.data import load
from train.experiment import Experiment
from train.run import Run
from train.saved.changes import Position
from train.saved.checkpoint import Checkpoints
from train.saved.folder import Command, Opened, check_unused, checkpoint_steps, read_command, read_run, read_saved
from train.saved.initial import InitialParams
from train.saved.resuming import describe_resumption

pytestmark = pytest.mark.usefixtures("in_a_hurry")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Steps add one to every parameter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.make_step", fake_step(None))
        patch.setattr(Run, "initial_params", lambda self: jax.tree.map(jnp.array, small_params(self.config.model)))
        yield


@pytest.fixture(scope="module")
def begun_once(tmp_path_factory):
    """Leaves a run of nine steps at step 4, the first of WARMUP, beside its text."""
    folder = tmp_path_factory.mktemp("begun")
    run = small_run(folder / "text")
    with contextlib.suppress(KeyboardInterrupt):
        Run(run, folder / "out").train(Stopping(load(run.data), 5))
    assert checkpoint_steps(folder / "out") == [3, 4]
    return folder


@pytest.fixture
def begun(begun_once, tmp_path):
    """Gives the folder of a copy of that run, which was never anywhere else."""
    shutil.copytree(begun_once, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out"
    for path in (out / "run.json", *out.glob("checkpoints/*/meta/metadata")):
        path.write_text(path.read_text().replace(str(begun_once), str(tmp_path)))
    return out


@dataclasses.dataclass
class Stopping:
    """Gives the batches of a text, and is interrupted in the place of batch number `last`."""

    text: object
    last: int

    @property
    def fingerprint(self):
        return self.text.fingerprint

    def batches(self, split, **shape):
        batches = self.text.batches(split, **shape)
        inner = batches.__class__.__next__

        def interrupted(stream):
            self.last -= 1
            if self.last == 0:
                raise KeyboardInterrupt
            return inner(stream)

        batches.__class__ = type("Interrupted", (batches.__class__,), {"__next__": interrupted})
        return batches


def command(*arguments):
    return main([*map(str, arguments)])


def refused(capsys, *arguments):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1000, error
    return error


def changes(out):
    return [(each["step"], each["field"], each["before"], each["after"]) for each in read_run(out)["changes"]]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_is_enough(begun, capsys):
    """No preset, no data; what was not given at the beginning either is as it was."""
    before = (begun / "run.json").read_text()
    assert command("--resume", "--out", begun, "--no-evaluate") == 0
    said = capsys.readouterr().out
    assert f"resuming {begun} at WARMUP 1/3, step 4 of 9\n" in said
    assert [line["step"] for line in metrics(begun)] == list(range(1, 10))
    assert (begun / "run.json").read_text() == before and changes(begun) == []
    assert command("--resume", "--out", begun, "--no-evaluate") == 0
    assert "has done all its steps: SPARSE 3/3, step 9 of 9" in capsys.readouterr().out


def test_how_the_runs_were_made_is_recorded_and_taken_up(tmp_path, begun, monkeypatch):
    run = small_run(tmp_path / "text")
    preset = write_preset(run, tmp_path / "mine.json")
    out = tmp_path / "three"
    monkeypatch.setattr(Experiment, "run", lambda self, *_, **__: self.runs[0].open(resume=False))
    assert command("--preset", preset, "--out", out, "--seeds", 2, "--no-evaluate") == 0
    assert read_command(out) == Command("mine", seeds=2, evaluate=False)
    arguments = Arguments(out=out, resume=True)
    assert arguments.command() == Command("mine", seeds=2, evaluate=False) and arguments.name == "mine"
    assert [each.config.seed for each in arguments.runs()] == [0, 1]
    assert [each.folder.name for each in arguments.runs()] == ["seed0", "seed1"]
    given = Arguments(out=out, resume=True, controls=True, mesh="data=8")
    assert given.command() == Command("mine", seeds=2, controls=True, evaluate=False, mesh="data=8")
    with pytest.raises(ValueError, match="seeds must stay 2"):
        Arguments(out=out, resume=True, seeds=1).command()
    assert Arguments(out=begun, resume=True).command() == Command("out")  # of Python, without a record


def test_nothing_to_resume_is_said(capsys, tmp_path):
    message = refused(capsys, "--resume", "--out", tmp_path / "none")
    assert f"--resume must find a run in {tmp_path}/none, got none: give --preset to begin one there" in message
    assert not (tmp_path / "none").exists()


def test_changes_are_taken_up_said_and_recorded(begun, capsys):
    rates = "--learning-rate", "WARMUP=5e-4"
    flags = "--steps", "WARMUP=4", "--checkpoint-every", 3, "--set", "phases.SPARSE.bias_rate=0.5"
    assert command("--resume", "--out", begun, "--no-evaluate", *rates, *flags) == 0
    expected = [
        (4, "checkpoint_every", 2, 3),
        (4, "phases.WARMUP.indexer.learning_rate", 0.001, 0.0005),
        (4, "phases.WARMUP.stages.0.steps", 3, 4),
        (4, "phases.SPARSE.bias_rate", 0.01, 0.5),
    ]
    assert changes(begun) == expected
    said = capsys.readouterr().out
    for text in (
        "at WARMUP 1/4, step 4 of 10",
        "changed from step 5 on: checkpoint_every 2 → 3",
        "learning_rate of the indexer at step 5: 0.001 → 0.0005",
    ):
        assert text in said
    assert [line["phase"] for line in metrics(begun)] == ["BASE"] * 3 + ["WARMUP"] * 4 + ["SPARSE"] * 3
    assert checkpoint_steps(begun) == [3, 7, 9, 10]
    assert command("--resume", "--out", begun, "--no-evaluate", "--steps", "SPARSE=5") == 0
    assert changes(begun) == [*expected, (10, "phases.SPARSE.stages.0.steps", 3, 5)]
    assert read_saved(begun, 12)["run"] == read_run(begun)["run"]


def test_a_changed_length_moves_a_cosine(tmp_path):
    """Behind one step of 3 it stands at 3/4 of its height, behind one of 6 at cos²(π/12)."""
    run = small_run(tmp_path / "text")
    longer = set_fields(run, steps_assignments(run, ["BASE=6"]))
    saved, position = run.to_json(), Position(1, 0, 1, {})
    assert describe_resumption(tmp_path, longer, Opened(position, saved=saved)) == [
        f"resuming {tmp_path} at BASE 1/6, step 1 of 12",
        "learning_rate of the backbone at step 2: 0.003 → 0.003732",
        "muon_learning_rate of the backbone at step 2: 0.015 → 0.01866",
    ]


def test_an_edited_run_json_and_an_edited_preset_are_changes(begun, tmp_path):
    path = begun / "run.json"
    values = json.loads(path.read_text())
    values["run"]["keep_checkpoints"] = 5
    path.write_text(json.dumps(values))
    values["run"]["phases"][2]["stages"][0]["batch_size"] = 4
    (tmp_path / "edited.json").write_text(json.dumps(values))
    runs = Arguments(out=begun, resume=True).runs()
    runs[0].open(resume=True)
    assert changes(begun) == [(4, "keep_checkpoints", 2, 5)]
    del values["run"]["model"]  # which is the run's
    (tmp_path / "edited.json").write_text(json.dumps(values))
    runs = Arguments(str(tmp_path / "edited.json"), out=begun, resume=True).runs()
    runs[0].open(resume=True)  # killed twice before a checkpoint, it is recorded once
    runs[0].open(resume=True)
    assert changes(begun) == [(4, "keep_checkpoints", 2, 5), (4, "phases.SPARSE.stages.0.batch_size", 2, 4)]


def test_what_must_not_change_is_refused_and_nothing_is_written(begun, capsys):
    before = (begun / "run.json").read_text()
    message = refused(capsys, "--resume", "--out", begun, "--set", "model.index_topk=5", "seed=2")
    assert "model.index_topk 4, here 5 (the model of a run stays)" in message and "seed 0, here 2" in message
    assert f"--init {begun} --phases SPARSE --out NEW" in message
    assert "phase BASE is done" in refused(capsys, "--resume", "--out", begun, "--steps", "BASE=4")
    assert (begun / "run.json").read_text() == before


def test_data_are_known_by_what_they_hold(begun, tmp_path, capsys, monkeypatch):
    """Moved, and named from another place; then others."""
    shutil.copytree(begun, tmp_path / "copy")
    (tmp_path / "text").rename(tmp_path / "moved")
    error = refused(capsys, "--resume", "--out", begun)
    assert "matches none" in error
    monkeypatch.chdir(tmp_path)
    assert command("--resume", "--out", "out", "--no-evaluate", "--data", "moved/*.txt") == 0
    assert changes(begun) == [] and read_run(begun)["run"]["data"]["data"] == ["moved/*.txt"]

    documents = write_documents(tmp_path / "copy")
    assert command("--resume", "--out", documents, "--no-evaluate", "--data", f"{documents}/f*.txt") == 0
    said = capsys.readouterr().out
    assert "the data begin at their start at step 5" in said
    (_, where, *_), (step, field, before, after) = changes(documents)
    known = load(small_run(tmp_path / "text").data).fingerprint
    assert (where, step, field, before) == ("data.data", 4, "data.fingerprint", known)
    assert after == read_run(documents)["data"] == read_saved(documents, 9)["data"] != known
    assert [read_saved(documents, step)["position"]["data"]["next_index"] for step in (6, 9)] == [2, 3]


def test_data_that_changed_unasked_are_refused(begun, tmp_path, capsys):
    with (tmp_path / "text" / "a.txt").open("a") as file:
        file.write("more")
    message = refused(capsys, "--resume", "--out", begun)
    assert "the data must be those of the run" in message and "name them by --data" in message
    glob = f"{tmp_path}/text/*.txt"  # as before: saying it is enough
    runs = Arguments(out=begun, resume=True, data=(glob,)).runs()
    text = load(runs[0].config.data)
    assert runs[0].open(resume=True, data=text, new_data=True).new_data
    assert runs[0].open(resume=True, data=text).new_data  # killed before a checkpoint, it need not be said again
    (change,) = changes(begun)
    assert change[:2] == (4, "data.fingerprint") and change[3] == text.fingerprint


def test_the_stream_of_other_data_begins_at_its_start(begun, tmp_path, monkeypatch):
    """Batches from the changed step on are the first ones of the new text, none is skipped and none seen twice."""
    text = load(dataclasses.replace(small_run(tmp_path / "other").data, data=(f"{write_documents(tmp_path)}/f*.txt",)))
    seen = []
    next_batch = Run._next_batch
    monkeypatch.setattr(Run, "_next_batch", lambda *a: seen.append(next_batch(*a)) or seen[-1])
    run = small_run(tmp_path / "text")
    Run(run, begun).train(text, resume=True, new_data=True)
    stream = text.batches("train", batch_size=2, seq_len=16, seed=100)
    assert (seen[0][0].tokens == next(stream).tokens).all() and (seen[1][0].tokens == next(stream).tokens).all()


# Where the first parameters came from


@pytest.fixture
def source(tmp_path):
    """Leaves a run with a checkpoint of step 3, to begin from."""
    run, folder = small_run(tmp_path / "text"), tmp_path / "source"
    Run(run, folder).open(resume=False)
    with Checkpoints(folder / "checkpoints", run) as checkpoints:
        checkpoints.save(state_of(run), Position(3, 0, 3, {}))
    return folder


def begin_from(source, tmp_path):
    """Leaves a run that begins there with WARMUP at step 2."""
    out = tmp_path / "out"
    preset = str(write_preset(small_run(tmp_path / "text"), tmp_path / "p.json"))
    (run,) = Arguments(preset, init=source, out=out, phases=("WARMUP", "SPARSE")).runs()
    with contextlib.suppress(KeyboardInterrupt):
        run.train(Stopping(load(run.config.data), 3))
    assert checkpoint_steps(out) == [2]
    return out


def test_a_moved_beginning_does_not_matter_once_there_is_a_checkpoint(source, tmp_path, capsys):
    out = begin_from(source, tmp_path)
    moved = source.rename(tmp_path / "moved")
    (run,) = Arguments(out=out, resume=True, init=moved).runs()
    run.open(resume=True)
    assert read_run(out)["init"]["name"] == str(moved)
    gone = moved.rename(tmp_path / "gone")
    assert command("--resume", "--out", out, "--init", moved, "--no-evaluate") == 0  # as a script that repeats itself
    shutil.rmtree(gone)
    assert command("--resume", "--out", out, "--no-evaluate", "--steps", "SPARSE=5") == 0
    assert "init must be a folder" in refused(capsys, "--resume", "--out", out, "--init", tmp_path / "typo")


def test_another_beginning_is_refused(source, tmp_path, capsys):
    out = begin_from(source, tmp_path)
    other = shutil.copytree(source, tmp_path / "other")
    run = small_run(tmp_path / "text")
    with Checkpoints(other / "checkpoints", run) as checkpoints:
        changed = jax.tree.map(lambda x: x + 1, state_of(run))
        checkpoints.save(changed, Position(4, 1, 1, {}))
    message = refused(capsys, "--resume", "--out", out, "--init", other)
    assert f"init '{source}', here '{other}'" in message and "leave --init out" in message
    with pytest.raises(ValueError, match="here None"):
        Run(Arguments(out=out, resume=True).run_config(), out).open(resume=True)


def test_parameters_that_are_not_those_recorded_are_refused(source, tmp_path):
    fingerprint = InitialParams(source).origin.fingerprint
    copied = shutil.copytree(source, tmp_path / "copied")
    assert InitialParams(copied).origin.fingerprint == fingerprint
    with pytest.raises(ValueError, match="init must be what the run began with"):
        InitialParams(source, recorded="0" * 32).params(small_run(tmp_path / "text").model)
    with pytest.raises(ValueError, match="init must be a folder"):
        InitialParams(tmp_path / "gone", recorded=fingerprint).params(small_run(tmp_path / "text").model)


def test_runs_of_before_are_continued(begun):
    """Their run.json has an identity, and their checkpoints no fingerprint of the data."""
    values = read_run(begun)
    identity = {**values["run"], "init": None}
    (begun / "run.json").write_text(json.dumps({"run": values["run"], "identity": identity}))
    path = begun / "checkpoints" / "4" / "meta" / "metadata"
    saved = read_saved(begun, 4)
    del identity["checkpoint_every"]
    path.write_text(json.dumps({"position": saved["position"], "run": identity}))
    (begun / "command.json").unlink(missing_ok=True)
    assert command("--resume", "--out", begun, "--no-evaluate") == 0
    assert read_run(begun).keys() == {"run", "init", "data", "changes"} and changes(begun) == []


def test_a_damaged_record_of_the_command_is_named(begun, capsys):
    for text, message in {"{": "readable JSON", "[]": "must be an object", '{"seed": 3}': "nearest: seeds"}.items():
        (begun / "command.json").write_text(text)
        assert message in refused(capsys, "--resume", "--out", begun)


def test_a_run_in_the_way_is_not_touched(begun, tmp_path, capsys):
    preset = write_preset(small_run(tmp_path / "text"), tmp_path / "p.json")
    assert "--resume continues it" in refused(capsys, "--preset", preset, "--out", begun)
    with pytest.raises(ValueError, match="already holds a run"):
        check_unused(begun)
