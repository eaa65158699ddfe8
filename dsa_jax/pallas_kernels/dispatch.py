"""Pallas kernels for NVIDIA Hopper (sm_90), one file a kernel, and the choice between them and plain XLA."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

CAPABILITY = "9.0"  # the compute capability that the kernels are written for: H100, H200, GH200


def check_implementation(operation: str, implementation: str | None) -> None:
    """Raises ValueError unless an operation that has no kernel is left the choice or told "xla"."""
    _check_name(implementation)
    if implementation == "pallas":
        raise ValueError(f"implementation='pallas': {operation} has no Pallas kernel, use None or 'xla'")


def choose_implementation(
    operation: str, implementation: str | None, why_not: str | None, *, xla: Callable, pallas: Callable
) -> Callable[..., Any]:
    """Returns the function to call with the arrays of one operation: `xla`, or the choice between it and `pallas`.

    `None` takes the kernel when lowering for CUDA alone, on a machine whose GPUs are Hopper's, unless something speaks
    against it. "pallas" insists: it raises ValueError here, or when it is lowered for anything but a Hopper GPU.

    Args:
      operation: its name, for messages.
      implementation: None, "xla" or "pallas".
      why_not: why the kernel cannot take these shapes and dtypes, or None if it can.
      xla: the plain definition, a function of arrays; functions and `functools.partial`s with keywords alone.
      pallas: the kernel, a function of the same arrays with the same results.
    """
    _check_name(implementation)
    capability = gpu_capability()
    if implementation == "pallas":
        if why_not:
            raise ValueError(f"implementation='pallas': {operation} has no kernel for this: {why_not}")
        if capability not in (None, CAPABILITY):
            raise ValueError(f"implementation='pallas': {_needs(operation, f'compute capability {capability}')}")
    elif implementation == "xla" or why_not or capability != CAPABILITY:
        return xla
    return functools.partial(_bind, operation, implementation == "pallas", _Call.of(xla), _Call.of(pallas))


def _check_name(implementation):
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation must be None, 'xla' or 'pallas', got {implementation!r}")


def _needs(operation, got):
    return f"{operation} needs an NVIDIA Hopper GPU (compute capability {CAPABILITY}, sm_90), got {got}"


@functools.cache
def gpu_capability() -> str | None:
    """The compute capability of this process's NVIDIA GPUs, the lowest if they differ; None without one."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return min((device.compute_capability for device in devices), key=float, default=None)


# For which platform a function is compiled is known only when it is lowered, so the choice is a primitive.
# `lax.platform_dependent` would do, but for an export to several platforms at once, which Pallas refuses.

_choice = Primitive("dsa_jax_implementation")
_choice.multiple_results = True


@dataclasses.dataclass(frozen=True)
class _Call:
    """A function with its keywords and vmapped axes, equal when they are: what is traced once is not traced again."""

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
    return mlir.lower_fun(lambda *arrays: jax.tree.leaves(call(*arrays)), multiple_results=True)(context, *arrays)


batching.primitive_batchers[_choice] = _vmap
mlir.register_lowering(_choice, _lower)
