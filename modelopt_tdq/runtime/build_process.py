"""Runs ``_build_worker.py``: a builder in a process of its own, whose crash is an error like any other."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from modelopt_tdq.errors import MissingExtraError, TdqError
from modelopt_tdq.runtime.build_options import BACKENDS

__all__ = ["run_builder"]


def run_builder(request: dict[str, Any], request_file: Path) -> dict[str, Any]:
    """Build what ``request`` describes; returns the worker's answer.

    Raises:
        TdqError: What the worker says, or its crash.
        MissingExtraError: The backend is not installed.
    """
    request_file.write_text(json.dumps(request))
    worker = Path(__file__).with_name("_build_worker.py")
    with open(request["log"], "ab") as log:
        done = subprocess.run(
            [sys.executable, str(worker), str(request_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    answer_file = Path(request["answer"])
    log_file = Path(request["log"])
    if log_file.stat().st_size == 0:
        log_file.unlink()
    if done.returncode != 0 or not answer_file.is_file():
        how = f"exit status {done.returncode}"
        if done.returncode < 0:
            how = signal.Signals(-done.returncode).name
        raise TdqError(
            "onnx_path",
            request["onnx"],
            f"the builder crashed ({how})",
            f"Its log is kept in {log_file}; a quantize scale that is not a constant is a known cause",
        )
    answer: dict[str, Any] = json.loads(answer_file.read_text())
    if error := answer.get("error"):
        if error[0] == "missing":
            extra = BACKENDS[request["backend"]]
            raise MissingExtraError(
                "backend",
                request["backend"],
                f"it is not installed ({error[1]})",
                f"Install the extra that brings it: pip install 'modelopt-tdq[{extra}]'",
            )
        field, value, problem, cure = error
        raise TdqError(field, value, problem, cure)
    return answer
