"""The notebooks are scripts of cells: they read well, become notebooks, and run from their first cell to their last."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from dsa_jax.pallas_kernels.dispatch import assume_gpu

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.py"))}
MARKERS = {"# %% [markdown]": "markdown", "# %%": "code"}
FIGURES = {"mechanism": 1, "two_stages": 1, "inside_an_indexer": 3, "kernels": 0, "your_own_model": 2}
LONGEST_CELL = 60  # lines: more than that is no cell to read

each = pytest.mark.parametrize("name", NOTEBOOKS)


def cells(name):
    """Takes a notebook apart into the kind and the text of each cell."""
    parts = re.split(r"^(# %%.*)\n", NOTEBOOKS[name].read_text(), flags=re.M)
    assert parts[0] == ""  # nothing stands before the first cell
    return [(MARKERS[marker], text.strip("\n")) for marker, text in zip(parts[1::2], parts[2::2], strict=True)]


def read(name, jupytext):
    """Reads a notebook as `make notebooks` converts it."""
    return jupytext.read(NOTEBOOKS[name], fmt="py:percent")


def test_there_are_five():
    assert NOTEBOOKS.keys() == FIGURES.keys()


def test_what_is_converted_is_not_kept():
    """Notebooks with outputs are made, by `make notebooks`, and none of them is a file of the project."""
    assert "notebooks/*.ipynb" in (ROOT / ".gitignore").read_text().splitlines()
    assert {path.suffix for path in (ROOT / "notebooks").iterdir() if path.is_file()} <= {".py", ".ipynb"}


@each
def test_a_notebook_begins_with_its_title_and_explains_itself(name):
    first, *others = cells(name)
    assert first[0] == "markdown" and first[1].startswith("# # ")
    assert not any(text.startswith("# # ") for _, text in others)
    for kind, text in [first, *others]:
        assert text and len(text.splitlines()) <= LONGEST_CELL
        if kind == "markdown":
            assert all(line.startswith("#") for line in text.splitlines())
        else:
            compile(text, name, "exec")
            assert not re.search(r"^[%!]", text, re.M)  # a plain script too
    kinds = [kind for kind, _ in [first, *others]]
    assert kinds.count("markdown") >= kinds.count("code") - 2


def test_the_mechanism_takes_ten_cells():
    assert sum(kind == "code" for kind, _ in cells("mechanism")) <= 10


@each
def test_a_notebook_converts(name):
    """Jupytext finds the cells that stand here, and makes a valid notebook without outputs of them."""
    jupytext = pytest.importorskip("jupytext", reason="jupytext is of the extras test and notebooks")
    nbformat = pytest.importorskip("nbformat", reason="nbformat comes with jupytext")
    notebook = nbformat.reads(jupytext.writes(read(name, jupytext), fmt="ipynb"), as_version=4)
    nbformat.validate(notebook)
    assert [cell.cell_type for cell in notebook.cells] == [kind for kind, _ in cells(name)]
    assert notebook.cells[0].source.startswith("# ")
    code = [(cell.source, cell.outputs, cell.execution_count) for cell in notebook.cells if cell.cell_type == "code"]
    assert code == [(text, [], None) for kind, text in cells(name) if kind == "code"]


@pytest.fixture(scope="module")
def ran():
    """Runs a notebook in a fresh namespace, once: its names, what it printed is pytest's, and how many figures it drew.

    Its own asserts hold whatever it shows: gradients kept apart, losses that fall, masses in their order.
    """
    found = {}

    def run(name):
        if name not in found:
            figures = []
            with pytest.MonkeyPatch.context() as patch:
                matplotlib.use("agg", force=True)
                patch.setattr(plt, "show", lambda: (figures.extend(plt.get_fignums()), plt.close("all")))
                names = runpy.run_path(str(NOTEBOOKS[name]))
            found[name] = names, len(figures)
        return found[name]

    return run


@pytest.mark.slow
@each
def test_a_notebook_runs(name, ran, capsys):
    _, figures = ran(name)
    assert figures == FIGURES[name]
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_mechanism_shows_what_it_says(ran):
    names, _ = ran("mechanism")
    assert names["losses"][-1] < 0.2 * names["losses"][0]
    assert names["difference"] < 1e-5
    assert names["kept"]["trained indexer"] > 0.9 * names["kept"]["oracle"]


@pytest.mark.slow
def test_both_stages_come_back_to_the_dense_loss(ran):
    (new, warm, final), stages = ran("two_stages")[0]["table"].values(), ran("two_stages")[0]
    assert warm[0] == new[0]
    assert new[1] > warm[1] > final[1]
    assert final[1] < 1.1 * warm[0]
    assert stages["sparse"][-1]["kl"] < stages["warmup"][0]["kl"]
    assert stages["continued"].shape == (1, 80)


@pytest.mark.slow
def test_the_indexer_that_is_looked_into_beats_the_window(ran):
    mass = ran("inside_an_indexer")[0]["by_name"]
    window, indexer, oracle = (mass[name] for name in ("last K keys", "trained indexer", "oracle"))
    assert ((indexer - window) / (oracle - window)).min() > 0.5
    assert ran("inside_an_indexer")[0]["far"].mean() > 0.3


@pytest.mark.slow
def test_a_model_of_ones_own_keeps_its_gradients_apart_and_learns(ran):
    names, _ = ran("your_own_model")
    assert names["kl_by_backbone"] == 0 and names["language_by_indexer"] == 0
    assert names["history"][-1][0] < 0.1 and names["by_window"] > 2
    assert np.asarray(names["hit"]).any(axis=0).mean() > 0.9


@pytest.mark.slow
def test_every_call_of_the_kernels_notebook_has_a_kernel(ran):
    """At the sizes that are checked and those that are timed; what they compute is tested elsewhere."""
    names, _ = ran("kernels")

    def inputs(sizes):
        x = names["draw_inputs"](**sizes)
        lse = jnp.zeros(x["q"].shape[:3])
        return names["add_pages"](x | {"lse": lse, "dense_lse": lse})

    for sizes in (names["SMALL"], names["LARGE"]):
        x = jax.eval_shape(lambda sizes=sizes: inputs(sizes))
        for call in names["calls"].values():
            with assume_gpu("9.0"):
                jax.jit(lambda x, call=call: call(x, "pallas")).trace(x)  # raises where there is none
