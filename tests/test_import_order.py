"""Imports go one way: each module may use what stands left of it in the design, kernels use JAX alone."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ORDER = (
    "config key_range rope pallas_kernels quantization blocks indexer selection attention dense_attention indexer_loss "
    "cache sharding collectives grouped_ffn expert_parallel layers moe model "
    "hf_files hf_table stacked convert generate __init__ __main__"
).split()
TESTED = [path for top in ("dsa_jax", "train", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))]
KERNELS = sorted((ROOT / "dsa_jax" / "pallas_kernels").glob("*.py"))


def imported(path):
    """The absolute dotted names of everything a file imports, wherever in the file it does."""
    package = path.relative_to(ROOT).parent.parts
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def room(path):
    """The name under which a file stands in the order: its module, or its sub-package."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def test_the_files_are_found():
    assert {"indexer", "selection", "attention", "indexer_loss", "model"} <= {
        room(p) for p in TESTED if p.parts[-2] == "dsa_jax"
    }


def test_every_module_has_a_place_in_the_order():
    unknown = {room(path) for path in TESTED if path.is_relative_to(ROOT / "dsa_jax")} - set(ORDER)
    assert not unknown, f"add to design.md's order: {unknown}"


@pytest.mark.parametrize("path", [p for p in TESTED if p.is_relative_to(ROOT / "dsa_jax")], ids=lambda p: p.stem)
def test_the_library_imports_only_what_stands_left(path):
    mine = ORDER.index(room(path))
    if path.name == "__init__.py" and path.parent.name == "dsa_jax":
        return
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in ("train", "benchmarks", "tests", "notebooks"), f"{path.name} imports {name}"
        if parts[0] == "dsa_jax":
            assert len(parts) > 1 and parts[1] in ORDER, f"{path.name} imports {name}: import from the module itself"
            theirs = ORDER.index(parts[1])
            inside = parts[1] == "pallas_kernels" and room(path) == "pallas_kernels"
            assert theirs < mine or inside, f"{path.name} imports {name}, which stands right of it"


@pytest.mark.parametrize("path", [p for p in TESTED if p.is_relative_to(ROOT / "train")], ids=lambda p: p.stem)
def test_training_imports_the_library_and_never_the_other_way(path):
    for name in imported(path):
        assert name.split(".")[0] not in ("benchmarks", "tests", "notebooks"), f"{path.name} imports {name}"


def test_training_has_no_import_cycles():
    """By depth-first search over train/'s modules: `train.phases` first, `train.__main__` last, never a loop."""
    names = {
        path.stem: {n.split(".")[1] for n in imported(path) if n.startswith("train.")}
        for path in TESTED
        if room(path) and path.parent == ROOT / "train"
    }
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"import cycle: {' → '.join([*open_, name])}"
        if name not in done and name in names:
            open_.append(name)
            for other in sorted(names[name] & set(names)):
                visit(other)
            done.add(open_.pop())

    for name in sorted(names):
        visit(name)


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_import_jax_alone(path):
    allowed = {"jax", "jaxlib", "numpy", *sys.stdlib_module_names}  # numpy comes with JAX
    for name in imported(path):
        kernel_helper = name.startswith("dsa_jax.pallas_kernels")
        assert name.split(".")[0] in allowed or kernel_helper, f"{path.name} imports {name}"


def test_no_kitchen_sink():
    assert not [path for path in TESTED if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_no_postponed_annotations():
    """`from __future__ import annotations` hides the shapes from the checker."""
    assert not [path.name for path in TESTED if "__future__.annotations" in imported(path)]


def test_files_stay_under_500_lines():
    long = {str(p.relative_to(ROOT)): n for p in TESTED if (n := len(p.read_text().splitlines())) > 500}
    assert not long
