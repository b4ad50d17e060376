"""Pages as they are published: figures, tables and addresses put in where the source says ``{{ ... }}``.

``python docs/_ext/render.py`` writes the repository's README.md from docs/readme.md.jinja.
"""

from __future__ import annotations

import posixpath
import re
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import api
import diagrams
import errors
import figures
import jinja2

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README_SOURCE = DOCS / "readme.md.jinja"

_LINK = re.compile(r"(\]\()((?:\.\./)+[^)\s#]+)((?:#[^)\s]*)?\))")


@cache
def repository() -> str:
    """Address of the repository: the one in ``[project.urls]``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["urls"]["Repository"])


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.globals.update(
        figures.FIGURES,
        repository=repository(),
        error_tables=errors.error_tables,
        error_count=errors.error_count,
        api=api.api,
        svg=diagrams.svg,
        other_pages=other_pages,
    )
    return environment


def other_pages() -> str:
    """Pages that the index does not name: so none is ever left out."""
    index = (DOCS / "index.md").read_text().split()
    return "\n".join(sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in index and path.stem != "index"))


def fill(text: str) -> str:
    """Figures in the place of their names."""
    return _environment().from_string(text).render()


def page(name: str, text: str | None = None) -> str:
    """A page of the site, whose links out of docs/ lead to the repository.

    Args:
        name: Without its suffix.
        text: Of the file, if it was read already.
    """
    source = (DOCS / f"{name}.md").read_text() if text is None else text

    def outwards(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(name), match[2]))
        if path.startswith("docs/"):
            return match[0]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{match[1]}{repository()}/{kind}/main/{path}{match[3]}"

    return _LINK.sub(outwards, fill(source))


def readme() -> str:
    """The README."""
    return fill(README_SOURCE.read_text())


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme())
