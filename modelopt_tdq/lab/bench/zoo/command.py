"""``modelopt-tdq bench zoo``: runs the classes one after another, keeps what they answer, and writes the matrix."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelopt_tdq.core.files import write_text
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.supplement import Store, labelled_progress
from modelopt_tdq.lab.bench.zoo.apart import START, run_class
from modelopt_tdq.lab.bench.zoo.present import markdown
from modelopt_tdq.lab.bench.zoo.stage import Cell
from modelopt_tdq.lab.bench.zoo.stages import STAGES, chosen_stages
from modelopt_tdq.lab.provenance import installed_versions, provenance
from modelopt_tdq.lab.zoo.catalogue import ENTRIES, find_entry

__all__ = ["LIMIT", "Bench", "run_zoo"]

#: Seconds for one class.
LIMIT = 300.0


@dataclass(frozen=True)
class Bench:
    """What is run, and how.

    Attributes:
        output: Folder of ``zoo.json`` and ``zoo.md``.
        only: Names of classes; empty for all.
        stages: Names of stages, which bring those that they need; empty for all.
        limit: Seconds for one class; restoring, in a process of its own, has as many.
        again: Run finished classes, too.
        start: See :func:`~modelopt_tdq.lab.bench.zoo.apart.run_class`.
    """

    output: Path
    only: Sequence[str] = ()
    stages: Sequence[str] = ()
    limit: float = LIMIT
    again: bool = False
    start: str = START

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise TdqError("limit", self.limit, "not positive", "Pass the seconds that a class may take")
        chosen_stages(self.stages)
        for name in self.only:
            find_entry(name)

    @property
    def classes(self) -> list[str]:
        """Names, in the order in which they run."""
        return list(dict.fromkeys(self.only or ENTRIES))


def _is_kept(row: dict[str, Any] | None, stages: Sequence[str], versions: dict[str, str]) -> bool:
    """Whether a class need not run again: the same versions, and every stage that is asked for."""
    return row is not None and row["source"]["versions"] == versions and set(stages) <= set(row["stages"])


def _command(name: str, bench: Bench) -> str:
    """How to get one row again."""
    stages = f" --stages {','.join(bench.stages)}" if bench.stages else ""
    return f"modelopt-tdq bench zoo --again --only {name}{stages}"


def _row(
    name: str, cells: dict[str, Cell], seconds: float, source: dict[str, Any], before: dict[str, Any] | None
) -> dict[str, Any]:
    """What is kept of a class: with answers of the same versions of stages that were not asked for this time."""
    if before is not None and before["source"]["versions"] == source["versions"]:
        kept = {**before["stages"], **cells}
        cells = {stage: kept[stage] for stage in STAGES if stage in kept}
    return {"kind": ENTRIES[name].kind, "stages": cells, "seconds": seconds, "source": source}


def run_zoo(bench: Bench, run: bool = True) -> str:
    """Run the classes that the results lack, and write ``zoo.json`` after each, and ``zoo.md``.

    Args:
        bench: What is run.
        run: False: write the matrix of the rows there are.

    Returns:
        The matrix, as Markdown.

    Raises:
        TdqError: The results that are there are of another version of this command.
    """
    store = Store(bench.output / "zoo.json")
    stages = [stage.name for stage in chosen_stages(bench.stages)]
    versions = installed_versions()
    missing = [
        name for name in bench.classes if run and (bench.again or not _is_kept(store.runs.get(name), stages, versions))
    ]
    with labelled_progress(len(missing)) as advance:
        for name in missing:
            advance(name, 0)
            start = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="tdq_zoo_") as folder:
                cells = run_class(name, Path(folder), stages, bench.limit, bench.start)
            seconds = round(time.monotonic() - start, 1)
            store.add(name, _row(name, cells, seconds, provenance(_command(name, bench)), store.runs.get(name)))
            advance(name, 1)
    text = markdown({name: store.runs.get(name) for name in ENTRIES})
    write_text(bench.output / "zoo.md", text + "\n")
    return text
