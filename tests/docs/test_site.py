"""The site builds without a warning, holds the whole reference, and fetches nothing from elsewhere."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import dsa_jax

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = [path.stem for path in sorted((ROOT / "docs").glob("*.md"))]


class Page(HTMLParser):
    """The ids of a page, what it links to, and what a browser loads for it."""

    LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href", "object": "data"}

    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.linked, self.loaded = path, set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and values.get("href"):
            self.linked.append(values["href"])
        if values.get(self.LOADED.get(tag, "")):
            self.loaded.append(values[self.LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, of a copy: nothing is written into the repository."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "dsa_jax"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    return folder / "build" / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {path.name: Page(path) for path in sorted(site.glob("*.html"))}


def test_every_document_is_a_page_and_in_the_navigation(pages):
    assert {f"{name}.html" for name in PAGES} <= pages.keys()
    linked = set(pages["index.html"].linked)
    assert {f"{name}.html" for name in PAGES if name != "index"} <= {link.removeprefix("./") for link in linked}


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for page in pages.values():
        assert page.loaded and [each for each in page.loaded if re.match(r"\w+:|//", each)] == []
        for each in page.loaded:
            assert (site / unquote(re.split(r"[?#]", each)[0].lstrip("/"))).exists(), f"{page.path.name}: {each}"
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert styles and not any(re.search(r"@import|url\([\"']?(?:https?:)?//", style) for style in styles)


def test_links_between_pages_lead_to_headings(pages):
    checked = 0
    for page in pages.values():
        for link in page.linked:
            name, _, anchor = unquote(link).partition("#")
            other = pages.get(name.removeprefix("./")) if name else page
            if not anchor or re.match(r"\w+:", link) or other is None:
                continue
            checked += 1
            assert anchor in other.ids or anchor == "__skip", f"{page.path.name}: {link}"
    assert checked > 50


def test_the_reference_is_rendered(site, pages):
    assert {f"dsa_jax.{name}" for name in dsa_jax.__all__} <= pages["reference.html"].ids
    text = (site / "reference.html").read_text()
    assert "Scores every reachable key" in text and "B T J E" in text  # a docstring, and a shape in a signature
