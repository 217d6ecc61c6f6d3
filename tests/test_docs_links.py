"""Links of the Markdown pages: their files and headings exist, no page is orphaned."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.*)$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def markdown_files() -> list[Path]:
    """Return the Markdown files of the repository, new ones included."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:  # an unpacked archive has no repository
        folders = [ROOT, *(ROOT / name for name in ("docs", "cache_specs"))]
        return sorted({page for folder in folders for page in folder.rglob("*.md")})
    return [ROOT / name for name in done.stdout.splitlines()]


def _prose(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    anchors: set[str] = set()
    for heading in _HEADING.findall(_prose(page)):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        repeats = [f"{name}-{number}" for number in range(1, 10)]
        anchors.add(next(name for name in [name, *repeats] if name not in anchors))
    return anchors


def _links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield each relative link of a page as text, target file and anchor."""
    for link in _LINK.findall(_prose(page)):
        if "://" not in link and not link.startswith("mailto:"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            yield link, target.resolve(), anchor


@pytest.mark.parametrize("page", markdown_files(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link, target, anchor in _links(page):
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor:
            assert anchor in _anchors(target), f"{page.name}: no heading for {link}"


def test_every_page_is_reachable_from_the_readme() -> None:
    reached, waiting = set(), [(ROOT / "README.md").resolve()]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            if page.suffix == ".md":
                waiting += [target for _, target, _ in _links(page)]
    docs = {path.resolve() for path in (ROOT / "docs").rglob("*") if path.is_file()}
    assert sorted(str(path) for path in docs - reached) == []


def test_readme_is_a_first_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text) <= 6500


def test_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = re.findall(r"`((?:pipeline|kd_train)/[\w/.]+)`", text)
    assert len(names) >= 15
    assert [name for name in names if not (ROOT / name).exists()] == []
