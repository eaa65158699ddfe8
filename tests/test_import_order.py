"""Imports go one way: each room may use what stands left of it in the design, and kernels use JAX alone."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ORDER = (
    "strict_json yarn nsa_sizes config_hf config stacks remat key_range rope pallas_kernels quantization blockwise nn "
    "indexer selection attention dense_attention indexer_loss paged grouped_ffn parallel cache_shapes cache layers "
    "baselines moe decoder prediction model mesh_forward hf inference chat export server __init__ __main__"
).split()
TOPS = ("dsa_jax", "train", "studies", "benchmarks")  # each may import those before it
FILES = {top: sorted((ROOT / top).rglob("*.py")) for top in TOPS}
TESTED = [path for files in FILES.values() for path in files]
KERNELS = sorted((ROOT / "dsa_jax" / "pallas_kernels").rglob("*.py"))


def name_of(path):
    """A file's path below the root, for the tests' names."""
    return str(path.relative_to(ROOT))


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
    """The name under which a file stands in the order: its module, or its folder right below the top."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def module_of(path):
    """The dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_the_files_are_found():
    assert {"indexer", "selection", "attention", "indexer_loss", "model", "pallas_kernels"} <= {
        room(path) for path in FILES["dsa_jax"]
    }
    assert len(KERNELS) > 20 and all(FILES.values())


def test_every_module_has_a_place_in_the_order():
    assert {room(path) for path in FILES["dsa_jax"]} == set(ORDER)


@pytest.mark.parametrize("path", FILES["dsa_jax"], ids=name_of)
def test_the_library_imports_only_what_stands_left(path):
    if path == ROOT / "dsa_jax" / "__init__.py":
        return
    mine = ORDER.index(room(path))
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in (*TOPS[1:], "tests"), f"{path.name} imports {name}"
        if parts[0] == "dsa_jax":
            assert len(parts) > 1 and parts[1] in ORDER, f"{path.name} imports {name}: import from the module itself"
            theirs = ORDER.index(parts[1])
            inside = theirs == mine and path.parent != ROOT / "dsa_jax"
            assert theirs < mine or inside, f"{path.name} imports {name}, which stands right of it"


@pytest.mark.parametrize("path", TESTED, ids=name_of)
def test_the_tops_import_one_way(path):
    top = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        assert name.split(".")[0] not in (*TOPS[TOPS.index(top) + 1 :], "tests"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", TESTED, ids=name_of)
def test_nobody_imports_the_private_names_of_another_room(path):
    for name in imported(path):
        parts = name.split(".")
        private = parts[-1].startswith("_") and not parts[-1].startswith("__")
        assert not (parts[0] in TOPS and private), f"{path.name} imports {name}"


def test_there_are_no_import_cycles():
    """By depth-first search over all modules, never a loop."""
    paths = {module_of(path): path for path in TESTED}

    def module(name):
        """The module of ours that an imported name stands for: itself, or the one that holds it."""
        return name if name in paths else name.rsplit(".", 1)[0]

    graph = {
        name: {module(each) for each in imported(path) if module(each) in paths} - {name}
        for name, path in paths.items()
    }
    done, trail = set(), []

    def visit(name):
        assert name not in trail, f"import cycle: {' → '.join([*trail, name])}"
        if name not in done:
            trail.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(trail.pop())

    for name in sorted(graph):
        visit(name)


def test_the_planner_does_not_import_the_training_loop():
    """Follows imports to their ends: the planner works from the step alone, on any machine."""
    paths = {module_of(path): path for path in FILES["train"]}
    reached, left = set(), [name for name in paths if name.startswith("train.planner")]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            found = (part for each in imported(paths[name]) for part in (each, each.rsplit(".", 1)[0]))
            left += [part for part in found if part in paths]
    assert "train.step" in reached
    assert reached.isdisjoint(
        {"train.run", "train.saved.checkpoint", "train.experiment", "train.commands.arguments", "train.__main__"}
    )


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
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
    """A kernel's file may be as long as one kernel needs."""
    others = [path for path in TESTED if path not in KERNELS]
    assert not {name_of(p): n for p in others if (n := len(p.read_text().splitlines())) > 500}
