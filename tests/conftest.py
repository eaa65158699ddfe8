"""The tests' set-up: the platform, the shape checks, and what runs where."""

import gc
import os

import hypothesis
import pytest

VIRTUAL_DEVICES = 8

# The same examples in every run; compiling makes the time of the first one meaningless.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    """Chooses the platform and installs the shape checks, before anything imports JAX."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={VIRTUAL_DEVICES}".strip()
    # What is tested bitwise must be compiled here and now, never taken from a cache that another version has written.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    import shape_checks

    shape_checks.install("dsa_jax", "train", "studies")


def pytest_collection_finish(session):
    """Collects garbage seldom, and never among what is imported: tracing makes many objects, few of them garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(config, items):
    """Skips what needs a GPU where there is none, and slow tests and most meshes unless they are asked for."""
    wanted = [name for name in ("slow", "variants", "meshes") if name in config.option.markexpr]
    if "slow" not in wanted:
        for item in items:  # further cases of what is slow are run with further cases
            if item.get_closest_marker("slow") and not any(map(item.get_closest_marker, wanted)):
                item.add_marker(pytest.mark.skip(reason="takes minutes: make test-slow"))
    if "variants" not in wanted:
        for item in items:
            if item.get_closest_marker("variants"):
                item.add_marker(pytest.mark.skip(reason="another case of what is tested: make test-variants"))
    if "meshes" not in wanted:
        for item in items:
            marker = item.get_closest_marker("meshes")
            if marker is not None and not marker.kwargs.get("always"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: make test-meshes"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import jax

    if jax.default_backend() != "gpu":
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make test-gpu"))


def pytest_terminal_summary(terminalreporter):
    """Says how many choices on meshes were other than one device's."""
    reports = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    properties = [value for report in reports for name, value in report.user_properties if name == "rows_at_a_boundary"]
    if properties:
        at, after, rows = map(sum, zip(*properties, strict=True))
        terminalreporter.write_line(
            f"meshes: {at} of {rows} selections and routings are not one device's, at a boundary; {after} after these"
        )


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """Drops what a file's tests have compiled: each program maps memory, and the system limits how often one may."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="module")
def in_a_hurry():
    """Compiles a file's programs without optimisation."""
    from train.compiling import compiling_quickly

    with compiling_quickly():
        yield


@pytest.fixture
def unchecked():
    """Switches the shape checks off, for tests of the errors that a user without them meets."""
    import cases

    with cases.unchecked():
        yield
