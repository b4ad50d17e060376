"""Where a result comes from: command, machine, versions, date; written beside every result."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelopt_tdq.lab.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"


def timed(run: Callable[[], Any]) -> float:
    """How long a call takes, by the wall clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def write(name: str, result: dict[str, Any], table: str) -> None:
    """Write ``results/<name>.json`` and ``results/<name>.md``, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    source = provenance(" ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]))
    (RESULTS / f"{name}.json").write_text(json.dumps({**source, **result}, indent=1) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in source["versions"].items())
    head = f"`{source['command']}`, {source['date']}\n{source['machine']}; {versions}\n"
    (RESULTS / f"{name}.md").write_text(f"{head}\n{table}\n")
    print(table)
