"""What the documents show runs: the README's snippet and every notebook, with no display."""

import json
import re
from pathlib import Path

import matplotlib
import pytest

pytestmark = pytest.mark.usefixtures("in_a_hurry")

ROOT = Path(__file__).parent.parent


def test_the_readmes_snippets_run(capsys):
    first, *others = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(first, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(3, 2, 100) (3, 2, 100, 32)\n")
    for snippet in others:
        names = {}
        exec(compile(snippet, "README.md", "exec"), names)
        assert names["output"].hidden.shape == (1, 128, 128)
    assert others


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_run_and_are_kept_without_output(path, monkeypatch):
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "agg")
    matplotlib.use("agg", force=True)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)
    names = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), path.name, "exec"), names)
    if path.stem == "step_by_step":
        assert names["losses"][-1] < 0.5 * names["losses"][0]
        assert abs(names["layer"].self_attn.unabsorb(names["sparse"]) - names["dense"]).max() < 1e-5
