"""A worker process: reads stages as JSON lines from its standard input, answers with JSON lines on its standard output.

Processes of their own, so that two stages run side by side on two cores, each with its own number of
threads; and so that what libraries print does not disturb the progress display: it goes to a log.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

from modelopt_tdq.errors import TdqError

__all__ = ["main"]

#: Seconds between two progress messages.
_INTERVAL = 0.2


class _Channel:
    """Answers to the process that started this one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = 0.0

    def send(self, **message: Any) -> None:
        self._stream.write(json.dumps(message) + "\n")
        self._stream.flush()

    def progress(self, fraction: float) -> None:
        now = time.monotonic()
        if now - self._last >= _INTERVAL:
            self._last = now
            self.send(progress=fraction)


def _answer(request: dict[str, Any], channel: _Channel) -> None:
    from modelopt_tdq.lab.demo.settings import DemoSettings
    from modelopt_tdq.lab.demo.stages import run, stages

    settings, backends = DemoSettings.from_dict(request["settings"]), frozenset(request["backends"])
    stage = next(stage for stage in stages(settings, backends) if stage.name == request["stage"])
    try:
        run(stage, settings, backends, channel.progress)
    except TdqError as error:
        channel.send(error=[error.field, repr(error.value), error.problem, error.cure])
    except Exception as error:
        traceback.print_exc()
        channel.send(failed=f"{type(error).__name__}: {error}")
    else:
        channel.send(done=True)


def main() -> None:
    """Serve until the standard input ends. Argument: number of threads."""
    # what libraries print, from Python or not, goes to standard error, which is the log
    channel = _Channel(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    for line in sys.stdin:
        _answer(json.loads(line), channel)


if __name__ == "__main__":
    main()
