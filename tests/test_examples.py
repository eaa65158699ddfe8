"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsa_jax
import train
from dsa_jax import Config, Transformer

pytestmark = pytest.mark.usefixtures("in_a_hurry")

SKIPPED = ("__main__", "pallas_kernels.")  # commands, and kernels, whose callers have the examples


def examples():
    """Every docstring with an example, of all modules of the packages."""
    found = {}
    for package in (dsa_jax, train):
        names = [package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))]
        for name in names:
            if not any(part in name for part in SKIPPED):
                module = importlib.import_module(name)
                for test in doctest.DocTestFinder().find(module, name):
                    if test.examples:
                        found[test.name] = test
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def surroundings():
    """The names that the examples take for granted."""
    model = Transformer(Config.tiny(), rngs=nnx.Rngs(0))
    return dict(jax=jax, jnp=jnp, np=np, nnx=nnx, dsa_jax=dsa_jax, model=model, tokens=jnp.zeros((1, 8), jnp.int32))


def test_there_are_examples():
    assert {"dsa_jax.selection.select_topk", "dsa_jax.key_range.KeyRange"} <= EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name, surroundings):
    test = EXAMPLES[name]
    test.globs = {**test.globs, **surroundings, **{k: v for k, v in test.globs.items() if not k.startswith("__")}}
    report = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)
