"""Trains a dense MLA transformer, its lightning indexer, and both through the selection.

`train.run.Run` takes a `train.settings.RunConfig` from its first step to its last; `python -m train` (or `dsa-train`)
is the command around it; `train.planner` says what a step needs before there is a machine.

`import train` alone is enough: `train.run` and the others are imported when they are named.
"""

import importlib
import pkgutil
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in __dir__():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
