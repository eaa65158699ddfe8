"""The documents' code runs and prints what they say, and the things that they name exist."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import dsa_jax

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in DOCUMENTS}
SNIPPETS = {name: blocks for name, text in TEXTS.items() if (blocks := re.findall(r"```python\n(.*?)```", text, re.S))}
NOT_RUN = {"docs/serving.md": 1}  # `py` blocks: they need a run, or a server

ALL = "\n".join(TEXTS.values())


def test_the_documents_are_found():
    pages = "README docs/mechanism docs/training docs/checkpoints docs/many_devices docs/kernels docs/performance"
    assert {f"{name}.md" for name in pages.split()} <= TEXTS.keys()
    assert {"README.md", "docs/mechanism.md", "docs/training.md", "docs/many_devices.md"} <= SNIPPETS.keys()
    assert {name: n for name, text in TEXTS.items() if (n := text.count("```py\n"))} == NOT_RUN


def _marked(name):
    """The pages of the site take minutes together."""
    return pytest.param(name, marks=pytest.mark.slow if name.startswith("docs/") else ())


@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize("name", [_marked(name) for name in SNIPPETS])
def test_snippets_run_and_print_what_stands_beside_them(name, capsys):
    """The snippets of a document share their names, in order; a print's comment is its output."""
    source = "\n".join(SNIPPETS[name])
    prints = re.findall(r"^ *print\(.*", source, re.M)
    expected = [re.search(r"\)  # (.*)$", line) for line in prints]
    assert all(expected), f"each print needs its output beside it, got {prints}"
    names = {}
    exec(compile(source, name, "exec"), names)
    assert capsys.readouterr().out.splitlines() == [match[1] for match in expected if match]
    if name == "docs/mechanism.md":
        assert names["output"].selected.shape == (3, 2, 100, 32)


def test_the_readme_is_short_and_shows_its_pictures():
    readme = TEXTS["README.md"]
    assert len(readme.splitlines()) < 150
    assert re.findall(r"\]\((docs/figures/\w+\.svg)\)", readme) == [
        f"docs/figures/{name}.svg" for name in ("mechanism", "kernels", "steps")
    ]
    assert not re.search(r"^\|.*\|$", readme, re.M)  # tables stand in docs/


def test_the_file_tree_names_what_exists():
    tree = re.search(r"## Files\n\n```\n(.*?)```", TEXTS["README.md"], re.S)
    assert tree is not None
    folder, found = "", []
    for line in tree[1].splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = names[0]
            found += names
        else:
            found += [folder + name for name in names]
    assert len(found) > 20
    assert [name for name in found if not (ROOT / name).exists()] == []


def test_paths_in_code_spans_exist():
    spans = re.findall(r"`((?:dsa_jax|train|studies|benchmarks|tests|docs|notebooks)/[\w./]*)`", ALL)
    assert len(set(spans)) > 20
    assert [path for path in set(spans) if not (ROOT / path).exists()] == []
    kernels = re.findall(r"`(\w+/\w+\.py)`", TEXTS["docs/kernels.md"])
    assert len(kernels) > 8
    assert [path for path in kernels if not (ROOT / "dsa_jax" / "pallas_kernels" / path).exists()] == []


def test_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    made = set(re.findall(r"(?:`|\n)make ([a-z-]+)", ALL))
    assert {"demo", "test", "docs"} <= made and made <= targets
    modules = set(re.findall(r"python -m ([a-z_.]+[a-z_])", ALL.replace("\n", " ")))
    assert {"studies.tiny", "benchmarks.tables"} <= modules
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"dsa-jax", "dsa-train"} <= scripts.keys()
    assert set(re.findall(r"\bdsa-\w+", re.sub(r"name = .*", "", ALL))) <= scripts.keys()


def test_the_reference_has_every_public_name():
    entries = re.findall(r"^::: dsa_jax\.(\w+)$", TEXTS["docs/reference.md"], re.M)
    assert len(entries) == len(set(entries))
    assert set(entries) == set(dsa_jax.__all__)


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    latest = re.search(r"^## (\d.*)$", TEXTS["CHANGELOG.md"], re.M)
    assert latest is not None and latest[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in TEXTS["README.md"]
    assert dsa_jax.__version__ == version
