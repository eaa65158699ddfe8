"""The type checker behind jaxtyping's import hook: it checks shapes and dtypes, pyright the rest."""

import functools
import operator
import typing

import beartype
import jaxtyping
import numpy as np


def install(*packages):
    """Has the functions of packages that are imported from now on checked.

    Only those whose annotations name a shape: of most calls, which are many while a model is traced, nothing is known.
    """
    every = jaxtyping.jaxtyped

    def where_named(function, **options):
        return every(function, **options) if _names_any(function) else function

    jaxtyping.jaxtyped = lambda function=None, **options: (
        functools.partial(where_named, **options) if function is None else where_named(function, **options)
    )
    jaxtyping.install_import_hook(packages, f"{__name__}.checked")


def checked(function):
    """`beartype.beartype` for the annotations that name an array's shape; NumPy's arrays pass where JAX's do."""
    annotations = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: _accept_numpy(hint) for name, hint in annotations.items() if _names_shape(hint)}
    return beartype.beartype(function)


def _names_any(function):
    return any(map(_names_shape, getattr(getattr(function, "fget", function), "__annotations__", {}).values()))


def _is_array(hint):
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _names_shape(hint):
    return _is_array(hint) or any(_names_shape(part) for part in typing.get_args(hint))


def _accept_numpy(hint):
    """Widens an array, or an array among alternatives, to NumPy's arrays of the same shape and dtype."""
    if _is_array(hint):
        return hint | hint.dtype[np.ndarray, hint.dim_str]
    if isinstance(hint, type(int | str)) or typing.get_origin(hint) is typing.Union:
        return functools.reduce(operator.or_, map(_accept_numpy, typing.get_args(hint)))
    return hint
