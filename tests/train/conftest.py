"""Fixtures that the tests of the training command share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Processes compile in a hurry, and each step once: here and in `test_train_cli`, if one worker has both."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
