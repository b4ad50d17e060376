"""``modelopt-tdq bench rivals``: runs the rows, and writes the tables and the plot."""

from __future__ import annotations

from modelopt_tdq.core.files import write_text
from modelopt_tdq.lab.bench.rivals.present import draw, markdown
from modelopt_tdq.lab.bench.rivals.run import Bench, places, run_rows
from modelopt_tdq.lab.bench.supplement import Store

__all__ = ["run_rivals"]


def run_rivals(bench: Bench, command: str, run: bool = True) -> str:
    """Run what is missing, and write ``rivals.json``, ``rivals.md`` and ``rivals.png``.

    Args:
        bench: What is compared.
        command: To write beside the results.
        run: False: write the tables of the rows there are.

    Returns:
        The tables, as Markdown.

    Raises:
        TdqError: There is no such model, format or row, or the results are of another version.
    """
    bench.output.mkdir(parents=True, exist_ok=True)
    store = Store(bench.path.with_suffix(".json"))
    if run:
        run_rows(bench, store, command)
    tables = {key: [(place.row, store.runs.get(place.key)) for place in rows] for key, rows in places(bench).items()}
    text = markdown(tables)
    write_text(bench.path.with_suffix(".md"), text + "\n")
    draw(tables, bench.path.with_suffix(".png"))
    return text
