"""Every link between documents leads to a file, and to a heading under GitHub's rules and under the site's."""

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))


def prose(text):
    """The text without blocks and spans of code."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))


def links(text):
    """The targets of links and pictures, in order."""
    return re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose(text))


def headings(text):
    """The headings as they are read, without marks of code and links."""
    found = re.findall(r"^#{1,6} +(.*?)\s*$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", each).replace("`", "").replace("*", "") for each in found]


def github_slug(heading):
    """Lower case, without punctuation, every blank a hyphen."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_slug(heading):
    """As Python-Markdown has it: ASCII alone, runs of blanks and hyphens one hyphen."""
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(path):
    """The anchors of a document that both renderers make, and those of the reference's entries."""
    text = path.read_text()
    by_github, by_site = ({slug(heading) for heading in headings(text)} for slug in (github_slug, site_slug))
    return (by_github & by_site) | set(re.findall(r"^::: (\S+)$", text, re.M))


def broken(path):
    """The links of a document that lead nowhere, each with the reason."""
    for target in links(path.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        if not other.exists():
            yield f"{target}: no such file"
        elif path.parent.name == "docs" and not other.is_relative_to(ROOT / "docs"):
            yield f"{target}: outside docs/, which the site does not have"
        elif anchor and (other.suffix != ".md" or anchor not in anchors(other)):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert list(broken(path)) == []


def test_there_are_links_to_check():
    found = [target for path in DOCUMENTS for target in links(path.read_text())]
    assert len(found) > 40 and any("#" in target for target in found)


def test_headings_of_a_document_have_anchors_of_their_own():
    for path in DOCUMENTS:
        slugs = [github_slug(heading) for heading in headings(path.read_text())]
        assert path.name == "CHANGELOG.md" or len(slugs) == len(set(slugs)), path


def test_the_checker_finds_what_is_wrong(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "README.md").write_text("# Top\n")
    (docs / "other.md").write_text("# Über `x`\n\n## A, b\n\n::: dsa_jax.name\n")
    page = docs / "page.md"
    page.write_text(
        "[a](other.md#a-b) [b](other.md#dsa_jax.name) [c](https://example.org) `[d](none.md)`\n\n"
        "```\n[e](none.md)\n```\n"
        "[f](none.md) [g](other.md#none) [h](../README.md) ![i](none.svg) [j](#none) [k](other.md#über-x)\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    reasons = [reason.partition(":") for reason in broken(page)]
    assert [(target, reason.split(",")[0].strip()) for target, _, reason in reasons] == [
        ("none.md", "no such file"),
        ("other.md#none", "no such heading"),
        ("../README.md", "outside docs/"),
        ("none.svg", "no such file"),
        ("#none", "no such heading"),
        ("other.md#über-x", "no such heading"),  # the site calls it uber-x
    ]
