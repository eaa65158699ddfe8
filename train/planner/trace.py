"""Traces the training step of one device, for a mesh of H200s on any machine, as a list of operations without arrays.

The step is one `shard_map`, so what is inside is the program of one device. It is traced as Hopper would lower it: the
Pallas kernels stand in it under their names, with shapes, and so costs can be read from it.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from dsa_jax import Config
from dsa_jax.pallas_kernels import CAPABILITY, assume_gpu
from dsa_jax.parallel.expert_parallel import CAPACITY_FACTOR
from train.settings import PhaseSettings
from train.state import abstract_batch, abstract_mesh, abstract_params, abstract_state, placed
from train.step import build_step

KERNEL = "dsa_jax_implementation"
OPAQUE = {"custom_vmap_call", "mpmd_map", "pallas_call", "core_map"}  # a kernel's inside: registers and shared memory
VIEWS = {
    "reshape", "squeeze", "expand_dims", "transpose", "stop_gradient", "name", "copy", "sharding_constraint",
    "optimization_barrier", "bitcast_convert_type", "new_ref", "freeze",
}  # fmt: skip
SAME_SIZE = {"broadcast_in_dim", "convert_element_type", "pad", "slice", "dynamic_slice"}  # views where nothing changes
COLLECTIVES = {
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged all-to-all",
}
LOOPS = ("scan", "while")


@dataclasses.dataclass
class Block:
    """Holds operations in order; `inputs` and `outputs` are numbers of values, None for a literal's output."""

    ops: list["Op"]
    inputs: list[int]
    outputs: list[int | None]


@dataclasses.dataclass
class Op:
    """Describes an operation: the values it reads and makes, and of a loop or a choice its blocks, how many times."""

    name: str
    inputs: list[int | None]
    outputs: list[int]
    params: Mapping[str, Any]
    shapes: list[Any]  # of the inputs, literals too
    results: list[Any]  # shapes of the outputs
    blocks: list[Block] = dataclasses.field(default_factory=list)
    trips: float = 1
    consts: int = 0  # of a loop's inputs, those that stand before the carry
    carries: int = 0


@dataclasses.dataclass
class Program:
    """Holds the operations of one device, the bytes of every value, and the mesh."""

    block: Block
    sizes: list[int]
    shape: Mapping[str, int]


def trace_step(
    config: Config,
    settings: PhaseSettings,
    shape: Mapping[str, int],
    *,
    batch_size: int,
    seq_len: int,
    micro_batches: int,
) -> Any:
    """Traces the jitted step for a mesh of H200s."""
    graphdef, _ = abstract_params(config)
    mesh = abstract_mesh(shape)
    arguments = placed(abstract_state(config, settings), mesh), abstract_batch(batch_size, seq_len, mesh)
    with assume_gpu(CAPABILITY):
        return build_step(graphdef, settings, micro_batches=micro_batches, mesh=mesh).trace(*arguments)


def lower_step(traced: Any) -> str:
    """Lowers a traced step for CUDA, kernels and all, to StableHLO; raises what the lowering raises."""
    with assume_gpu(CAPABILITY):
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def step_program(traced: Any, shape: Mapping[str, int]) -> Program:
    """Takes from a traced step the program by which one device gets its gradients, without what no result needs."""
    return program_of(_find(traced.jaxpr, "shard_map").params["jaxpr"], shape)


def program_of(jaxpr: Jaxpr, shape: Mapping[str, int]) -> Program:
    """Lists a jaxpr's operations, calls expanded, that its results need."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    builder = _Builder()
    return Program(builder.block(jaxpr), builder.sizes, shape)


def _find(jaxpr: Any, name: str) -> JaxprEqn:
    found = list(_equations(jaxpr, name))
    if len(found) != 1:
        raise ValueError(f"the step must have one {name}, got {len(found)}")
    return found[0]


def _equations(jaxpr: Any, name: str) -> Iterator[JaxprEqn]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == name:
            yield eqn
        else:
            for inner in _inner(eqn):
                yield from _equations(inner, name)


def _inner(eqn: JaxprEqn) -> list[Jaxpr]:
    """Finds the jaxprs among an equation's parameters."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    return [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def nbytes(aval: Any) -> int:
    """Counts bytes of a value; none where there is no array, such as of a token."""
    inner = getattr(aval, "inner_aval", aval)
    return inner.size * inner.dtype.itemsize if hasattr(inner, "size") and hasattr(inner.dtype, "itemsize") else 0


class _Value(NamedTuple):
    """Names a value by its number, and by the views through which it is seen."""

    number: int
    views: tuple[str, ...] = ()


def _viewed(value: Any, view: str) -> Any:
    return value if isinstance(value, Literal) else value._replace(views=(*value.views, view))


class _Builder:
    """Numbers values and expands calls."""

    def __init__(self):
        self.sizes: list[int] = []

    def new(self, aval: Any) -> int:
        self.sizes.append(nbytes(aval))
        return len(self.sizes) - 1

    def results(self, eqn: JaxprEqn) -> list[_Value]:
        return [_Value(self.new(var.aval)) for var in eqn.outvars]

    def block(self, jaxpr: Jaxpr) -> Block:
        names = {var: _Value(self.new(var.aval)) for var in (*jaxpr.constvars, *jaxpr.invars)}
        inputs = [names[var].number for var in jaxpr.invars]
        ops: list[Op] = []
        self.add(jaxpr, names, ops, {})
        return Block(ops, inputs, _numbers(_named(jaxpr.outvars, names)))

    def add(self, jaxpr: Jaxpr, names: dict, ops: list[Op], known: dict) -> None:
        for eqn in jaxpr.eqns:
            name, inner = eqn.primitive.name, _inner(eqn)
            inputs = _named(eqn.invars, names)
            if name in LOOPS or name == "cond":
                results = self.results(eqn)
                ops.append(self.control(eqn, _numbers(inputs), [value.number for value in results]))
            elif inner and name not in OPAQUE and not name.startswith("scatter") and name != KERNEL:
                called = inner[0]
                inside = dict(zip(called.invars, inputs, strict=True))
                inside |= {var: _Value(self.new(var.aval)) for var in called.constvars}
                self.add(called, inside, ops, known)
                results = _named(called.outvars, inside)
            elif _is_view(eqn):
                views = zip(inputs, eqn.outvars, strict=False)
                results = [_viewed(value, f"{name} {eqn.params} {var.aval}") for value, var in views]
            elif (key := _key(eqn, inputs)) and key in known:
                results = known[key]
            else:
                results = self.results(eqn)
                known |= {key: results} if key else {}
                ops.append(_op(eqn, _numbers(inputs), [value.number for value in results]))
            names |= dict(zip(eqn.outvars, results, strict=True))

    def control(self, eqn: JaxprEqn, inputs: list[int | None], outputs: list[int]) -> Op:
        """Describes a loop or a choice, and its blocks."""
        op = _op(eqn, inputs, outputs)
        if op.name == "cond":
            op.inputs, op.blocks = inputs[1:], [self.block(branch) for branch in _inner(eqn)]
            return op
        if op.name == "while":
            body = eqn.params["body_jaxpr"].jaxpr
            before = eqn.params["cond_nconsts"]
            op.inputs, op.consts = inputs[before:], eqn.params["body_nconsts"]
            op.carries = len(outputs)
            begins = eqn.invars[before + op.consts]
            op.trips = expected_trips(body, is_rest=isinstance(begins, Literal) and begins.val > 0)
        else:
            body = eqn.params["jaxpr"].jaxpr
            # What is scanned over, or stacked, has one dimension more outside.
            op.carries = _as_large(eqn.outvars, body.outvars)
            op.consts, op.trips = _as_large(eqn.invars, body.invars) - op.carries, eqn.params["length"]
        op.blocks = [self.block(body)]
        return op


def _as_large(outer: Iterable[Any], inner: Iterable[Any]) -> int:
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outer, inner, strict=True))


def _op(eqn: JaxprEqn, inputs: list[int | None], outputs: list[int]) -> Op:
    shapes = [var.aval for var in eqn.invars]
    return Op(eqn.primitive.name, inputs, outputs, eqn.params, shapes, [var.aval for var in eqn.outvars])


def _key(eqn: JaxprEqn, inputs: list) -> tuple | None:
    """Makes a key that two operations share of which XLA keeps one; None for kernels and operations with an effect."""
    name = eqn.primitive.name
    if (eqn.effects and name not in COLLECTIVES) or name == KERNEL or _inner(eqn):
        return None
    return name, tuple(map(str, inputs)), str(eqn.params), str(eqn.outvars[0].aval)


def _named(variables: Iterable[Any], names: dict) -> list:
    """Looks up the numbers of variables; literals stay as they are."""
    return [var if isinstance(var, Literal) else names[var] for var in variables]


def _numbers(values: list) -> list[int | None]:
    return [None if isinstance(value, Literal) else value.number for value in values]


def _is_view(eqn: JaxprEqn) -> bool:
    """Says whether the result is the first argument itself, or another layout of it, which products take as it is."""
    name = eqn.primitive.name
    if not eqn.invars or not eqn.outvars:
        return False
    given, made = (variables[0].aval for variables in (eqn.invars, eqn.outvars))
    same = nbytes(given) == nbytes(made) and getattr(given, "dtype", None) == getattr(made, "dtype", None)
    return name in VIEWS or (name in SAME_SIZE and same)


def expected_trips(body: Jaxpr, *, is_rest: bool = False) -> float:
    """Expects how often a loop runs whose end depends on the data: with experts chosen evenly.

    Rounds of an exchange between shards of experts: one, or none in the rest behind pieces that no loop sends. Chunks
    of the rows that arrived, in a buffer `CAPACITY_FACTOR` times what even routing fills: those.
    """
    if any(True for name in ("all_to_all", "ragged_all_to_all") for _ in _equations(body, name)):
        return 0 if is_rest else 1
    sliced: list[Any] = [e.invars[0].aval for e in _equations(body, "dynamic_slice") if e.params["slice_sizes"][0] == 1]
    return math.ceil(max((aval.shape[0] for aval in sliced), default=1) / CAPACITY_FACTOR)
