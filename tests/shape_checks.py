"""The type checker behind jaxtyping's import hook: it checks shapes and dtypes, pyright the rest."""

import typing

import beartype
import jaxtyping


def checked(function):
    """`beartype.beartype` for the annotations that name an array's shape."""
    annotations = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: hint for name, hint in annotations.items() if _names_shape(hint)}
    return beartype.beartype(function)


def _names_shape(hint):
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_names_shape(part) for part in typing.get_args(hint))
