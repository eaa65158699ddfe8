"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from train_cases import one_layer_run, small_batch, small_config, small_phases, write_preset

import dsa_jax
import train
from dsa_jax import Transformer
from train.settings import Stage

pytestmark = pytest.mark.usefixtures("in_a_hurry")

SKIPPED = ("__main__", "pallas_kernels.")  # commands, and kernels, whose callers have the examples


def examples():
    """Finds every docstring with an example in the packages' modules."""
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
def model():
    """Makes the model of the examples."""
    return Transformer(small_config(), rngs=nnx.Rngs(0))


@pytest.fixture
def surroundings(model, tmp_path, monkeypatch):
    """Makes the names and files that the examples take for granted."""
    monkeypatch.chdir(tmp_path)
    phases = (small_phases(Stage(1, 2, 16))["WARMUP"],)
    write_preset(one_layer_run(tmp_path / "books", phases=phases), tmp_path / "small.json")
    batch = small_batch()
    return dict(
        jax=jax, jnp=jnp, np=np, nnx=nnx, dsa_jax=dsa_jax, model=model, tokens=jnp.zeros((1, 8), jnp.int32), batch=batch
    )


def test_there_are_examples():
    assert {"dsa_jax.selection.select_topk", "dsa_jax.key_range.KeyRange", "train.run.Run"} <= EXAMPLES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name, surroundings):
    test = EXAMPLES[name]
    test.globs = {**surroundings, **test.globs}
    report = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)
