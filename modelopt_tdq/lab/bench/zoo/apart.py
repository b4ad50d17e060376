"""Processes for the classes, each with a time limit; a crash or an endless loop ends one of them alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from modelopt_tdq.lab.bench.zoo.stage import FAILED, NOT_RUN, Cell
from modelopt_tdq.lab.bench.zoo.stages import STAGES
from modelopt_tdq.lab.bench.zoo.work import answers, say, work

__all__ = ["START", "run_class"]

#: How processes begin: forked from a server that has imported the libraries and made no model, quantized or not.
START = "forkserver"

_PRELOADED = [
    "modelopt.torch.quantization",
    "modelopt_tdq.export.onnx_export",
    "modelopt_tdq.lab.bench.zoo.work",
    "modelopt_tdq.lab.zoo.catalogue",
    "diffusers",
    "onnxruntime",
    "onnxscript",
    "torch.onnx",
]

#: Lines of what a process printed that are kept when it ended badly.
_LAST_LINES = 10


def _run(name: str, folder: Path, stages: Sequence[str], limit: float, start: str) -> str:
    """Run stages in a process; how it ended if not by itself."""
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=work, args=(name, str(folder), list(stages)))  # type: ignore[attr-defined]
    process.start()
    try:
        process.join(limit)
    finally:  # also where somebody interrupts this one: a session of its own is not interrupted with it
        late = process.is_alive()
        if late:
            _end(process)
        process.join()
    if late:
        return f"over {limit:g} s"
    code = process.exitcode or 0
    return f"the process ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}" if code else ""


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """With what it started, such as a builder: they are one session."""
    pid = process.pid
    try:
        if pid is not None and os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
            return
    except ProcessLookupError:
        return
    process.kill()


def run_class(name: str, folder: Path, stages: Sequence[str], limit: float, start: str = START) -> dict[str, Cell]:
    """Run the stages of one class: in one process, those that are to be fresh in another.

    Args:
        name: Of the class.
        folder: For its files; empty.
        stages: Names, in order.
        limit: Seconds for each of the two processes.
        start: Way of ``multiprocessing`` to start a process.

    Returns:
        The answer of every stage. That in which a process died, or was ended, says so; those behind it did not run.
    """
    fresh = [stage for stage in stages if STAGES[stage].fresh]
    for part in ([stage for stage in stages if stage not in fresh], fresh):
        ended = _run(name, folder, part, limit, start) if part else ""
        if ended:
            _keep(folder, part, ended)
    cells, _ = answers(folder)
    return {stage: cells[stage] for stage in stages}


def _keep(folder: Path, stages: Sequence[str], ended: str) -> None:
    """Answers for the stages that a process did not get to."""
    cells, begun = answers(folder)
    log = folder / "log.txt"
    said = log.read_text(errors="replace").splitlines()[-_LAST_LINES:] if log.is_file() else []
    left = [stage for stage in stages if stage not in cells]
    at = begun or (left[0] if left else None)
    for stage in left:
        if stage == at:
            say(folder, stage, cell={"verdict": FAILED, "reason": ended, "said": said})
        else:
            say(folder, stage, cell={"verdict": NOT_RUN, "reason": f"{at}: {ended}"})
