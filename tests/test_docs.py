"""Documents link to what exists: files, headings, and pages that the code names."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "draftkit" / "assets").rglob("*.md"),
]
CODE = [
    path
    for folder in ("draftkit", "benchmarks", "checks", "tools", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".yaml", ".cpp", ".h", ".html", ".js"}
]


def anchors(page: Path) -> set[str]:
    """Of each heading, as GitHub names them: small letters, no punctuation, "-" for a space."""
    text = re.sub(r"^(?: {4}|```).*$", "", page.read_text("utf-8"), flags=re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere; those to other sites are not looked at."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    assert {str(page.relative_to(ROOT)): found for page in PAGES if (found := broken(page))} == {}
    assert sum(len(re.findall(r"\]\(", page.read_text("utf-8"))) for page in PAGES) > 50


def test_a_link_to_nothing_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One heading, and more\n\n    # no heading\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-heading-and-more) [c](other.md#no-heading) [d](gone.md) [e](#here)"
    )
    assert broken(page) == ["other.md#no-heading", "gone.md", "#here"]


def test_every_document_is_reached_from_the_index() -> None:
    seen, to_read = set(), [ROOT / "docs" / "README.md"]
    while to_read:
        page = to_read.pop()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s:#]+)", page.read_text("utf-8"))
        to_read += [(page.parent / link).resolve() for link in links]
    assert set((ROOT / "docs").rglob("*.md")) - seen == set()


def test_every_page_and_heading_that_the_code_names_exists() -> None:
    named = 0
    for path in CODE:
        text = re.sub(r"\n\s*#?\s*", " ", path.read_text("utf-8"))
        for page, heading in re.findall(r'(?<![\w/])(?<!ggml, )(docs/[\w/-]+\.md)(?:, "([^"]+)")?', text):
            named += 1
            assert (ROOT / page).exists(), f"{path} names {page}"
            assert not heading or f"## {heading}\n" in (ROOT / page).read_text("utf-8"), f"{path}: {heading}"
    assert named > 5
