"""The choice between a Pallas kernel and plain XLA, made for each operation when it is lowered.

An operation's `implementation` is None, "xla" or "pallas". None takes the kernel when lowering for a Hopper GPU alone,
where shape and dtype allow it, and XLA elsewhere. `implementation(…)` says for a block of code what None means there.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
from jax.core import ShapedArray
from jax.extend import source_info_util
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Implementation = Literal["xla", "pallas"]

CAPABILITY = "9.0"  # the compute capability that the kernels are written for: H100, H200, GH200

# Both are part of the key of JAX's caches: what was compiled under one value is not used under another.
_default_implementation = jax.make_user_context(None)
_assumed_capability = jax.make_user_context(None)  # a tuple of one, for None is a capability too: that of no GPU


def implementation(name: Implementation | None) -> contextlib.AbstractContextManager[None]:
    """Says what operations run that leave their `implementation` open, inside a `with` block.

    What is compiled inside keeps to it, also functions that were compiled before under another choice.

    Args:
      name: "xla" takes the plain definitions; "pallas" insists on kernels, and an operation that cannot have one
        raises ValueError; None leaves the choice to each operation, as outside.

    Examples:
      >>> with dsa_jax.implementation("xla"):
      ...     output = jax.jit(model)(tokens)

    Raises:
      ValueError: for any other name.
    """
    _check_name(name)
    return _default_implementation(name)


def assume_gpu(capability: str | None) -> contextlib.AbstractContextManager[None]:
    """Traces as on a machine whose GPUs have this compute capability, "9.0" for Hopper's; None has no GPU.

    For planning and tests: what is traced inside can be lowered for such a machine, and run on one alone.
    """
    return _assumed_capability((capability,))


def is_gpu_assumed() -> bool:
    """Tells whether the GPUs are those of `assume_gpu`, so that nothing may ask the real ones."""
    return _assumed_capability.value is not None


def gpu_capability() -> str | None:
    """Returns the compute capability of this process's NVIDIA GPUs, the lowest if they differ; None without one."""
    assumed = _assumed_capability.value
    return _present_capability() if assumed is None else assumed[0]


@functools.cache
def _present_capability() -> str | None:
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return min((device.compute_capability for device in devices), key=float, default=None)


def resolve(implementation: Implementation | None) -> Implementation | None:
    """Returns the implementation that an operation is told, by its own argument or else by the block around it.

    Raises:
      ValueError: for a name that is none.
    """
    _check_name(implementation)
    return _default_implementation.value if implementation is None else implementation


def check_implementation(operation: str, implementation: Implementation | None) -> None:
    """Raises ValueError unless an operation that has no kernel is left the choice or told "xla"."""
    if resolve(implementation) == "pallas":
        raise ValueError(f"implementation='pallas': {operation} has no Pallas kernel, use None or 'xla'")


def choose_implementation(
    operation: str, implementation: Implementation | None, why_not: str | None, *, xla: Callable, pallas: Callable
) -> Callable[..., Any]:
    """Returns the function to call with the arrays of one operation: `xla`, or the choice between it and `pallas`.

    Args:
      operation: its name, for messages.
      implementation: as the caller of the operation gave it; "pallas" insists, and raises ValueError here, or when it
        is lowered for anything but a Hopper GPU.
      why_not: why the kernel cannot take these shapes and dtypes, or None if it can.
      xla: the plain definition, a function of arrays; functions and `functools.partial`s with keywords alone.
      pallas: the kernel, a function of the same arrays with the same results.
    """
    told = resolve(implementation)
    capability = gpu_capability()
    if told == "pallas":
        if why_not:
            raise ValueError(f"implementation='pallas': {operation} has no kernel for this: {why_not}")
        if capability not in (None, CAPABILITY):
            raise ValueError(f"implementation='pallas': {_needs(operation, f'compute capability {capability}')}")
    elif told == "xla" or why_not or capability != CAPABILITY:
        return xla
    return functools.partial(_bind, operation, told == "pallas", _Call.of(xla), _Call.of(pallas))


def stand_in(operation: str, function: Callable) -> Callable[..., Any]:
    """Returns `function` under a name, as one operation in a trace: for what cannot be traced without its device."""
    return functools.partial(_bind, operation, False, _Call.of(function), _Call.of(function))


def _check_name(implementation):
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation must be None, 'xla' or 'pallas', got {implementation!r}")


def _needs(operation, got):
    return f"{operation} needs an NVIDIA Hopper GPU (compute capability {CAPABILITY}, sm_90), got {got}"


# For which platform a function is compiled is known only when it is lowered, so the choice is a primitive.
# `lax.platform_dependent` would do, but for an export to several platforms at once, which Pallas refuses.

# Mosaic keeps in a kernel's bytes where each of its operations was traced, and the key of the persistent compilation
# cache is of all these bytes; elsewhere JAX leaves such places out of it. What JAX traces once for many callers, like a
# `jnp` function within a kernel, names the first of them: the key would depend on what was traced before, and on where
# this package lies. So all of a kernel is traced at one place, in no file. Equal kernels are compiled once, too.
_PLACE = eval(compile("current()", "dsa_jax", "eval"), {"current": source_info_util.current}).traceback

_choice = Primitive("dsa_jax_implementation")
_choice.multiple_results = True


@dataclasses.dataclass(frozen=True)
class _Call:
    """Holds a function, its keywords and vmapped axes. Equal calls compare equal, so nothing is traced twice."""

    function: Callable
    keywords: tuple[tuple[str, Hashable], ...] = ()
    axes: tuple[tuple[int | None, ...], ...] = ()

    @classmethod
    def of(cls, function):
        if isinstance(function, functools.partial):
            return cls(function.func, tuple(function.keywords.items()))
        return cls(function)

    def __call__(self, *arrays):
        function = functools.partial(self.function, **dict(self.keywords))
        for axes in self.axes:
            function = jax.vmap(function, axes)
        return function(*arrays)

    def vmapped(self, axes):
        return dataclasses.replace(self, axes=(*self.axes, axes))


def _bind(operation, insist, xla, pallas, *arrays):
    results, tree = jax.tree.flatten(jax.eval_shape(xla, *arrays))
    results = tuple((x.shape, x.dtype) for x in results)
    out = _choice.bind(*arrays, operation=operation, insist=insist, xla=xla, pallas=pallas, results=results)
    return jax.tree.unflatten(tree, out)


@_choice.def_abstract_eval
def _shapes(*_, results, **__):
    return [ShapedArray(shape, dtype) for shape, dtype in results]


@_choice.def_impl
@functools.partial(jax.jit, static_argnames=("operation", "insist", "xla", "pallas", "results"))
def _compile(*arrays, **choice):
    return _choice.bind(*arrays, **choice)


def _vmap(arrays, axes, *, xla, pallas, results, **choice):
    axes = tuple(axis if isinstance(axis, int) else None for axis in axes)
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    results = tuple(((size, *shape), dtype) for shape, dtype in results)
    out = _choice.bind(*arrays, xla=xla.vmapped(axes), pallas=pallas.vmapped(axes), results=results, **choice)
    return out, [0] * len(out)


def _lower(context, *arrays, operation, insist, xla, pallas, results):
    platforms = tuple(context.module_context.platforms)
    if insist and platforms != ("cuda",):
        raise ValueError(f"implementation='pallas': {_needs(operation, ' and '.join(platforms))}")
    call = pallas if platforms == ("cuda",) else xla
    lower = mlir.lower_fun(lambda *arrays: jax.tree.leaves(call(*arrays)), multiple_results=True)
    with source_info_util.user_context(_PLACE) if call is pallas else contextlib.nullcontext():
        return lower(context, *arrays)


batching.primitive_batchers[_choice] = _vmap
mlir.register_lowering(_choice, _lower)
