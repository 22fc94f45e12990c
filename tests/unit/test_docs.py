"""What the documentation points at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from balloonlab.measure.figures import FIGURES, PHASE_FIGURES

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FILE = re.compile(r"`((?:tests|scripts|hostdev)/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    missing = [name for name in FILE.findall(page.read_text()) if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        there = (page.parent / target) if target else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), (target, anchor)


def test_every_figure_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    rows = [f"| `{figure.name}` | {figure.meaning} |" for figure in FIGURES]
    rows += [f"| `PHASE.{figure.name}` | {figure.meaning} |" for figure in PHASE_FIGURES]
    assert [row for row in rows if row not in guide] == []
