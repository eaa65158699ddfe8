"""Compiling before the first step: nothing is compiled later, what is compiled is said and shared, and kept on disk."""

import dataclasses
import functools
import io
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import the_first
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console
from train_cases import one_layer_run, small_params

from dsa_jax.parallel.sharding import make_mesh
from train.compiling import KEEP_ALL, Program, compile_programs, describe_cache, keep_compiled
from train.data import Batch
from train.run import Run
from train.saved.checkpoint import Checkpoints
from train.settings import Stage
from train.state import abstract_params
from train.step import make_begin
from train.watching.progress import RunProgress

pytestmark = pytest.mark.usefixtures("in_a_hurry")

STAGES = (Stage(1, 4, 16), Stage(1, 8, 8, micro_batches=2), Stage(1, 4, 16))
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


class Shaped:
    """Gives the batches of a run's stages, in dtypes that are none of the loader's."""

    def __init__(self, config):
        stages = [stage for phase in config.phases for stage in phase.stages for _ in range(stage.steps)]
        self.shapes, self.taken = [(stage.batch_size, stage.seq_len) for stage in stages], 0

    def __iter__(self):
        return self

    def __next__(self):
        tokens = np.random.default_rng(self.taken).integers(256, size=self.shapes[self.taken])
        self.taken += 1
        batch = Batch.from_tokens(tokens)
        return dataclasses.replace(batch, tokens=tokens.astype(np.uint8), start=batch.start.astype(np.int64))

    def get_state(self):
        return self.taken

    def set_state(self, state):
        self.taken = state


@pytest.fixture
def compilations():
    """Lists what XLA compiles."""
    events = []

    def note(event, *_, **__):
        if event == BACKEND_COMPILE:
            events.append("compilation")

    jax.monitoring.register_event_duration_secs_listener(note)
    yield events
    jax.monitoring.unregister_event_duration_listener(note)


def shown(run):
    """Trains a run, and returns the lines that it prints."""
    out = io.StringIO()
    run.train(Shaped(run.config), RunProgress(run.config, console=Console(file=out, width=200)), compile_ahead=True)
    return out.getvalue().splitlines()


def small_params_of(run):
    """Gives small parameters, placed as a run wants them."""
    like = abstract_params(run.config.model, run.mesh)[1]
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), small_params(run.config.model), like)


@functools.cache
def simple_step(graphdef, settings, *, micro_batches=1, mesh=None):
    """Stands in for `make_step`: adds one to every parameter."""

    def step(state, batch):
        loss = jnp.mean(batch.tokens.astype(jnp.float32))
        params = jax.tree.map(lambda x: x + 1, state.params)
        return dataclasses.replace(state, step=state.step + 1, params=params), {"loss": loss, "lm_loss": loss}

    return jax.jit(step, donate_argnums=0)


@pytest.mark.parametrize(
    ("axes", "step"),
    the_first(2, [(None, simple_step), ({"data": 2, "context": 2}, simple_step), (None, None), ({"data": 2}, None)]),
)
def test_nothing_is_compiled_after_the_first_batch(tmp_path, compilations, monkeypatch, axes, step):
    make_begin.cache_clear()  # whose programs the case before shares
    monkeypatch.setattr(Run, "initial_params", small_params_of)
    if step is not None:
        monkeypatch.setattr("train.run.make_step", step)
    if axes is not None:  # of what is replicated Orbax takes a slice a device, each by a small program of its own
        monkeypatch.setattr(Checkpoints, "save", lambda *_: None)
    config = one_layer_run(tmp_path / "text", checkpoint_every=2)
    _, warmup, sparse = config.phases
    warmup, sparse = (dataclasses.replace(each, stages=STAGES[:n]) for each, n in ((warmup, 3), (sparse, 1)))
    config = dataclasses.replace(config, phases=(warmup, sparse))
    take = Run._next_batch

    def next_batch(self, *arguments):
        compilations.append("batch")
        return take(self, *arguments)

    monkeypatch.setattr(Run, "_next_batch", next_batch)
    mesh = None if axes is None else make_mesh(axes, jax.devices()[: math.prod(axes.values())])
    run = Run(config, tmp_path / "run", mesh=mesh)
    lines = shown(run)
    assert compilations[compilations.index("batch") :] == ["batch"] * 4
    names = ["the state of WARMUP", "WARMUP 4 × 16", "WARMUP 8 × 8 (2 parts)", "the state of SPARSE", "SPARSE 4 × 16"]
    *said, total = [line for line in lines if line.startswith("compiled")]
    assert sorted(re.sub(r" in [\d.]+ s$", "", line) for line in said) == sorted(f"compiled {name}" for name in names)
    assert re.fullmatch(r"compiled 5 programs in [\d.]+ s", total)
    first, *others = run.records()
    seconds = {name for name in first if name.startswith("compile_seconds")}
    assert seconds == {f"compile_seconds/{name.replace('×', 'x')}" for name in names}
    assert not any("compile" in name for record in others for name in record)

    again = Run(dataclasses.replace(config, seed=1), tmp_path / "again", mesh=mesh)  # which shares the programs
    assert not [line for line in shown(again) if line.startswith("compiled")]


def lowered(name, function, *shapes):
    return Program(name, jax.jit(function), tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def test_equal_programs_are_compiled_once_and_called_by_what_they_were_compiled_to():
    lines, one = [], lowered("one", lambda x: x + 1, (3,))
    other = dataclasses.replace(one, name="other", arguments=(jax.ShapeDtypeStruct((4,), jnp.float32),))
    same = Program("same", one.function, one.arguments)
    assert one.executable() is one.function and not one.is_compiled
    assert list(compile_programs([one, same, other], lines.append)) == ["other", "one"][::-1] or len(lines) == 3
    assert isinstance(same.executable(), jax.stages.Compiled) and same.is_compiled
    np.testing.assert_array_equal(other.executable()(np.zeros(4, np.float32)), np.ones(4))
    assert compile_programs([one, same, other], lines.append) == {} and len(lines) == 3
    assert Program("plain", print, ()).executable() is print
    assert compile_programs([Program("plain", print, ())], lines.append) == {}


def test_several_processes_compile_one_by_one_in_the_same_order(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    order, lines = [], []
    compile = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: order.append(self.in_avals) or compile(self))
    programs = [lowered(f"{n}", lambda x: x * 2, (n,)) for n in (5, 3, 4)]
    assert list(compile_programs(programs, lines.append)) == ["5", "3", "4"]
    assert [avals[0][0].shape for avals in order] == [(5,), (3,), (4,)]
    assert [line.split(" in ")[0] for line in lines] == [
        "compiled 5",
        "compiled 3",
        "compiled 4",
        "compiled 3 programs",
    ]


def out_of_memory(self):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes")


@pytest.mark.parametrize("processes", [1, 2])
def test_what_cannot_be_compiled_is_named(monkeypatch, processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax.stages.Lowered, "compile", out_of_memory)
    with pytest.raises(ValueError, match="SPARSE 1 × 8 cannot be compiled: RESOURCE_EXHAUSTED: Out of memory"):
        compile_programs([lowered("SPARSE 1 × 8", jnp.sin, (8,))], print)


def refuse(x):
    raise ValueError("micro_batches must divide the 3 rows")


def test_what_cannot_be_traced_is_named():
    with pytest.raises(ValueError, match="BASE 3 × 8 cannot be compiled: micro_batches must divide the 3 rows"):
        compile_programs([lowered("BASE 3 × 8", refuse, (3, 8))], print)


@pytest.fixture
def cache(tmp_path):
    """Switches the persistent cache on for a test."""
    names = ["jax_compilation_cache_dir", "jax_enable_compilation_cache", *KEEP_ALL]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    keep_compiled(tmp_path / "a" / "cache", environment={})
    yield tmp_path / "a" / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_cache_keeps_what_compiles_quickly_and_is_counted(cache):
    lines = []
    for name, functions in (("first", (jnp.sin,)), ("again", (jnp.sin, jnp.cos))):
        programs = [
            Program(f"{name} {f.__name__}", jax.jit(lambda x, f=f: f(x)), (jax.ShapeDtypeStruct((8,), jnp.float32),))
            for f in functions
        ]
        compile_programs(programs, lines.append)
    assert any(path.name.startswith("jit_") for path in cache.iterdir())
    assert lines[0].startswith("compiled first sin in") and not lines[0].endswith("from the cache")
    assert sorted(line.endswith(", from the cache") for line in lines[1:3]) == [False, True]
    assert lines[3].startswith("compiled 2 programs in") and lines[3].endswith("s, 1 from the cache")
    found = re.fullmatch(r"Compile cache: (\d+) of (\d+) programs came from (.*)", describe_cache() or "")
    assert found and 1 <= int(found[1]) <= int(found[2]) - 2 and found[3] == str(cache)


def test_settings_of_the_environment_come_first(cache):
    name = "jax_persistent_cache_min_compile_time_secs"
    jax.config.update(name, 7.0)
    keep_compiled(environment={name.upper(): "7"})
    assert getattr(jax.config, name) == 7
    keep_compiled(environment={})
    assert getattr(jax.config, name) == 0
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update(name, 7.0)
    keep_compiled(environment={})  # where there is no folder nothing is kept
    assert getattr(jax.config, name) == 7


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="the compile cache .*file/cache cannot be made: Not a directory"):
        keep_compiled(tmp_path / "file" / "cache")


@pytest.mark.parametrize(("field", "dtype"), [("tokens", np.int64), ("stop", np.uint16)])
def test_a_batch_is_made_canonical(field, dtype):
    batch = Batch.from_tokens(np.arange(8).reshape(1, 8))
    assert batch.canonical() is batch
    for given in (lambda x: x.astype(dtype), np.ndarray.tolist):
        made = dataclasses.replace(batch, **{field: given(getattr(batch, field))}).canonical()
        jax.tree.map(np.testing.assert_array_equal, made, batch)
        assert getattr(made, field).dtype == np.int32 and made.valid.dtype == np.bool_
