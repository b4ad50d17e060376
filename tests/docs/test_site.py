"""The site builds without a warning, and every link inside of it and of the files leads somewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

pytest.importorskip("myst_nb")
pytest.importorskip("furo")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sphinx.cmd.build import main as sphinx

    folder = tmp_path_factory.mktemp("site")
    warnings = folder / "warnings"
    status = sphinx(
        [
            "-q",
            "-W",
            "--keep-going",
            "-w",
            str(warnings),
            "-d",
            str(folder / "d"),
            str(ROOT / "docs"),
            str(folder / "html"),
        ]
    )
    assert status == 0, warnings.read_text()
    return folder / "html"


class _Page(HTMLParser):
    """Links and names of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.names.add(value)
            if (tag, name) in (("a", "href"), ("link", "href"), ("img", "src"), ("script", "src")) and value:
                self.links.append(value)


def test_links_of_the_site(site: Path) -> None:
    pages = {path: _Page(path.read_text()) for path in site.rglob("*.html")}
    broken = []
    seen = 0
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            seen += 1
            address, fragment = urldefrag(link)
            target = (path.parent / unquote(address.split("?")[0])).resolve() if address else path
            if not target.is_file() or (fragment and target in pages and unquote(fragment) not in pages[target].names):
                broken.append(f"{path.name}: {link}")
    assert seen > 500
    assert not broken


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    import modelopt_tdq as tdq

    names = _Page((site / "api.html").read_text()).names
    assert not [name for name in tdq.__all__ if f"modelopt_tdq.{name}" not in names]


def test_pages_are_filled(site: Path) -> None:
    for page in ("why", "support_matrix", "troubleshooting", "results", "deploy", "how_it_works"):
        text = (site / f"{page}.html").read_text()
        assert "{{" not in text, page
    assert "UNet2DConditionModel" in (site / "support_matrix.html").read_text()
    assert (site / "how_it_works.html").read_text().count("<svg role=") == 4


def _anchors(text: str) -> set[str]:
    """Of the headings of a Markdown file, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize(
    "path",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))],
)
def test_links_of_files(path: str) -> None:
    text = (ROOT / path).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        address, fragment = urldefrag(link)
        target = (ROOT / path).parent / address if address else ROOT / path
        assert target.exists(), link
        if fragment and target.suffix == ".md":
            assert fragment in _anchors(target.read_text()), link
