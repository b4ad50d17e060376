"""One class in one process: its stages one after another, each answer written down before the next begins."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from modelopt_tdq.core.metrics import json_numbers
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.zoo.stage import FAILED, NOT_RUN, REFUSED, Case, Cell
from modelopt_tdq.lab.bench.zoo.stages import STAGES
from modelopt_tdq.lab.zoo.catalogue import find_entry

__all__ = ["answers", "run_stages", "say", "work"]

#: What a folder holds of the answers: one JSON object per line, the stage that begins, then what it answers.
_ANSWERS = "answers.jsonl"

#: Of an error's text, and of its traceback.
_LENGTH, _FRAMES = 2000, 4


def _cell(error: Exception) -> Cell:
    """The answer of a stage that raised."""
    if isinstance(error, TdqError):
        return {"verdict": REFUSED, "reason": f"{error.field}: {error.problem}"[:_LENGTH]}
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return {"verdict": FAILED, "reason": f"{type(error).__name__}: {error}"[:_LENGTH], "where": where}


def answers(folder: Path) -> tuple[dict[str, Cell], str | None]:
    """The answers in a folder by stage, and the stage that began and did not answer."""
    cells: dict[str, Cell] = {}
    begun: str | None = None
    path = folder / _ANSWERS
    for line in path.read_text().splitlines() if path.is_file() else []:
        found = json.loads(line)
        if "cell" in found:
            cells[found["stage"]], begun = found["cell"], None
        else:
            begun = found["stage"]
    return cells, begun


def say(folder: Path, stage: str, **more: Cell) -> None:
    """Write down that a stage begins or, with ``cell``, what it answers."""
    with (folder / _ANSWERS).open("a") as file:
        file.write(json.dumps(json_numbers({"stage": stage, **more})) + "\n")


def run_stages(case: Case, names: Sequence[str]) -> None:
    """Run stages on a case; their answers are in its folder, whatever becomes of this process.

    Args:
        case: With a folder, which may hold answers of stages that ran elsewhere.
        names: In order.
    """
    for stage in map(STAGES.__getitem__, names):
        cells, _ = answers(case.folder)
        missing = stage.missing(cells)
        if missing is not None:
            say(case.folder, stage.name, cell={"verdict": NOT_RUN, "reason": f"needs {missing}"})
            continue
        say(case.folder, stage.name)
        start = time.monotonic()
        try:
            cell = stage.run(case)
        except Exception as error:  # whatever it is, it is the answer, and no other stage shall miss it
            cell = _cell(error)
        say(case.folder, stage.name, cell={**cell, "seconds": round(time.monotonic() - start, 1)})


def work(name: str, folder: str, names: Sequence[str]) -> None:
    """What the process of a class does.

    Args:
        name: Of the class.
        folder: For its files; what it prints is in ``log.txt``.
        names: Of the stages.
    """
    import torch

    os.setsid()  # so that what it starts can be ended with it
    torch.set_num_threads(1)
    with (Path(folder) / "log.txt").open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        with redirect_stdout(log), redirect_stderr(log):
            run_stages(Case(find_entry(name), Path(folder)), names)
