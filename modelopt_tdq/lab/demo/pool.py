"""Runs stages on worker processes, as many at a time as there are workers."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.demo.settings import DemoSettings
from modelopt_tdq.lab.demo.stages import Stage

__all__ = ["Display", "run_stages"]

#: (stage, fraction done); 1.0 when it is finished.
Display = Callable[[Stage, float], None]


class _Worker:
    """One process; ``messages`` receives (worker, stage, message)."""

    def __init__(
        self, settings: DemoSettings, backends: frozenset[str], number: int, messages: queue.Queue[Any]
    ) -> None:
        self.log = settings.output / "cache" / f"worker-{number}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.stage: Stage | None = None
        self._request = {
            "settings": {**settings.to_dict(), "output": str(settings.output.absolute())},
            "backends": sorted(backends),
        }
        self._messages = messages
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "modelopt_tdq.lab.demo.worker", str(settings.threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def start(self, stage: Stage) -> None:
        self.stage = stage
        if self._process.stdin is not None:
            try:
                self._process.stdin.write(json.dumps({**self._request, "stage": stage.name}) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                pass  # its end is reported by the reader

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._messages.put((self, json.loads(line)))
        status = self._process.wait()
        self._messages.put((self, {"failed": f"the process ended, status {status}"}))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def run_stages(
    todo: Sequence[Stage], finished: set[str], settings: DemoSettings, backends: frozenset[str], display: Display
) -> None:
    """Run the stages, each once those before it are done.

    Args:
        todo: In order.
        finished: Names of stages that are done already.
        settings: Of the demo.
        backends: That are installed.
        display: Told about progress.

    Raises:
        TdqError: As raised by a stage; or a stage failed otherwise, its log says how.
    """
    if not todo:
        return
    waiting, done = list(todo), set(finished)
    messages: queue.Queue[tuple[_Worker, dict[str, Any]]] = queue.Queue()
    workers = [_Worker(settings, backends, i, messages) for i in range(min(settings.processes, len(todo)))]
    try:
        while len(done) < len(finished) + len(todo):
            _assign(waiting, done, workers)
            worker, message = messages.get()
            stage = worker.stage
            if stage is None:
                raise _failure("start", message, worker.log)
            if "progress" in message:
                display(stage, float(message["progress"]))
            elif "done" in message:
                worker.stage = None
                done.add(stage.name)
                display(stage, 1.0)
            else:
                raise _failure(stage.name, message, worker.log)
    finally:
        for worker in workers:
            worker.stop()


def _assign(waiting: list[Stage], done: set[str], workers: Sequence[_Worker]) -> None:
    for worker in workers:
        running = [w.stage for w in workers if w.stage is not None]
        if worker.stage is not None or any(stage.alone for stage in running):
            continue
        ready = (s for s in waiting if done.issuperset(s.after) and not (s.alone and running))
        stage = next(ready, None)
        if stage is not None:
            waiting.remove(stage)
            worker.start(stage)


def _failure(stage: str, message: dict[str, Any], log: Path) -> TdqError:
    if "error" in message:
        return TdqError(*message["error"])
    return TdqError(
        "stage", stage, f"it failed ({message.get('failed')})", f"See {log}; run the demo again to go on from here"
    )
