"""Compiles what a run will execute before its first step, and keeps what is compiled on the disk."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

MAX_THREADS = 5  # that compile at a time; inside each of them XLA has threads of its own
CACHE_EVENTS = "/jax/compilation_cache/"  # of JAX, in the thread that compiles
CACHE_HIT, CACHE_REQUEST = f"{CACHE_EVENTS}cache_hits", f"{CACHE_EVENTS}compile_requests_use_cache"
# What takes JAX less than a second, or little room, is left out of its cache otherwise; a run has much of it.
KEEP_ALL = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}

type Say = Callable[[str], object]

# Beside their functions, and gone with them: the runs that share a step share what it is compiled to.
_executables: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()
_from_cache: set[int] = set()  # threads whose last program came from the disk
_events = collections.Counter[str]()  # of the cache, in this process


@dataclasses.dataclass(frozen=True)
class Program:
    """Names a jitted function with the shapes, dtypes and places of arrays that it will be called with.

    Args:
      name: what it is called in the log.
      function: as `jax.jit` makes it. Any other function has nothing to be compiled.
      arguments: trees of `jax.ShapeDtypeStruct`.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]

    @property
    def key(self) -> tuple[Any, Hashable]:
        """Tells programs apart."""
        leaves, tree = jax.tree.flatten(self.arguments)
        return self.function, (tree, *((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))

    @property
    def is_compiled(self) -> bool:
        """Tells whether it needs no compiling."""
        function, shapes = self.key
        return not isinstance(function, jax.stages.Wrapped) or shapes in _executables.get(function, {})

    def executable(self) -> Callable[..., Any]:
        """Gives what it was compiled to, or its function, which compiles when it is first called."""
        function, shapes = self.key
        kept = _executables.get(function, {}) if isinstance(function, jax.stages.Wrapped) else {}
        return kept.get(shapes, function)


class _Compiled(NamedTuple):
    program: Program
    executable: Any
    seconds: float
    from_cache: bool


def compile_programs(programs: Sequence[Program], say: Say) -> dict[str, float]:
    """Compiles programs, so that nothing is compiled when they are called by their `executable`.

    They are traced and lowered in their order by the thread that calls this, and compiled by others meanwhile; all of
    them are done when it returns. Several processes compile them one by one: XLA has them tell each other in between
    which of its choices were fastest, and they must do so in the same order.

    Args:
      programs: what to compile; what is compiled already is left out.
      say: takes a line for each, and one for all.

    Raises:
      ValueError: if one cannot be compiled, with its name.

    Returns:
      Seconds by name, of what was compiled here.
    """
    began, wanted = time.monotonic(), list({p.key: p for p in programs if not p.is_compiled}.values())
    if not wanted:
        return {}
    _note_cache_events()
    done = []
    for each in _compile_one_by_one(wanted) if jax.process_count() > 1 else _compile_together(wanted):
        function, shapes = each.program.key
        _executables.setdefault(function, {})[shapes] = each.executable
        how = ", from the cache" if each.from_cache else ""
        say(f"compiled {each.program.name} in {each.seconds:.1f} s{how}")
        done.append(each)
    if len(done) > 1:
        cached = f", {sum(each.from_cache for each in done)} from the cache" if _cache_folder() else ""
        say(f"compiled {len(done)} programs in {time.monotonic() - began:.1f} s{cached}")
    return {each.program.name: each.seconds for each in done}


def _compile_one_by_one(programs: Sequence[Program]) -> Iterator[_Compiled]:
    return (_compile(program, *_lower(program)) for program in programs)


def _compile_together(programs: Sequence[Program]) -> Iterator[_Compiled]:
    """Compiles in threads; yields programs as they are done."""
    threads = max(1, min(MAX_THREADS, len(programs), os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(threads, "compile") as pool:
        try:
            tasks = [pool.submit(_compile, program, *_lower(program)) for program in programs]
            for task in concurrent.futures.as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _lower(program: Program) -> tuple[Any, float]:
    """Traces and lowers; also gives the seconds that it took."""
    began = time.monotonic()
    try:
        lowered = program.function.lower(*program.arguments)
    except ValueError as error:
        raise ValueError(f"{program.name} cannot be compiled: {error}") from error
    return lowered, time.monotonic() - began


def _compile(program: Program, lowered: Any, seconds: float) -> _Compiled:
    began, thread = time.monotonic(), threading.get_ident()
    _from_cache.discard(thread)
    try:
        executable = lowered.compile()
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(f"{program.name} cannot be compiled: {error}") from error
    return _Compiled(program, executable, seconds + time.monotonic() - began, thread in _from_cache)


@functools.cache
def _note_cache_events() -> None:
    """Has JAX tell of each program that it seeks on the disk, and of each that it finds."""

    def note(event: str, **_: Any) -> None:
        if event.startswith(CACHE_EVENTS):
            _events[event] += 1
        if event == CACHE_HIT:
            _from_cache.add(threading.get_ident())

    jax.monitoring.register_event_listener(note)


def _cache_folder() -> str | None:
    """Finds the folder of JAX's persistent cache, None where it is off."""
    return jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None


@contextlib.contextmanager
def compiling_quickly() -> Iterator[None]:
    """Compiles without optimisation: of what shows that all runs, at sizes of no matter, most time goes to XLA."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def keep_compiled(folder: Path | str | None = None, environment: Mapping[str, str] = os.environ) -> None:
    """Has JAX keep every program that this process compiles on the disk, and read there what is compiled already.

    Keys are of the program, the devices and the versions of JAX and XLA. What is traced at the same shapes has the same
    key in every process, whatever was traced before it and wherever the package lies: `pallas_kernels/dispatch.py`
    sees to it for kernels.

    Args:
      folder: where; without it where JAX_COMPILATION_CACHE_DIR says, and nowhere if that says nothing.
      environment: whose settings of the cache come first.

    Raises:
      ValueError: if the folder cannot be made.
    """
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the compile cache {folder} cannot be made: {error.strerror}") from error
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).absolute()))
        compilation_cache.reset_cache()  # JAX settles on a folder when it first compiles
    if _cache_folder() is not None:
        _note_cache_events()
        for name, value in KEEP_ALL.items():
            if name.upper() not in environment:
                jax.config.update(name, value)


def describe_cache() -> str | None:
    """Says how many of the programs of this process came from the disk; None where nothing is kept there."""
    folder = _cache_folder()
    return folder and f"Compile cache: {_events[CACHE_HIT]} of {_events[CACHE_REQUEST]} programs came from {folder}"
