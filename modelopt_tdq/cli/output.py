"""What commands print: for people, quietly, or as JSON for programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TextIO

import typer

__all__ = ["Output", "finish", "shown"]


@dataclass(frozen=True)
class Output:
    """How a command prints.

    Attributes:
        quiet: Nothing but warnings and errors.
        json: Nothing but one JSON object, what the command did; warnings and errors as ever.
        stdout: Where the JSON goes.
    """

    quiet: bool
    json: bool
    stdout: TextIO


#: Of the command that runs.
_RUNNING: ContextVar[Output | None] = ContextVar("output", default=None)


class _WithoutBars(io.TextIOBase):
    """Standard error without progress bars, whoever draws them: those begin with a return to the start of the line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._in_bar = stream, False

    def write(self, text: str) -> int:
        self._in_bar = "\r" in text or (self._in_bar and not text.strip())
        if not self._in_bar:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def shown(output: Output) -> Iterator[None]:
    """While the body runs, what it prints goes where ``output`` says."""
    running = _RUNNING.set(output)
    try:
        if output.quiet or output.json:
            with redirect_stdout(io.StringIO()), redirect_stderr(_WithoutBars(sys.stderr)):
                yield
        else:
            yield
    finally:
        _RUNNING.reset(running)


def finish(done: Mapping[str, Any], failed: bool = False) -> None:
    """The end of a command: prints ``done`` where JSON was asked for.

    Args:
        done: What it did, as plain data.
        failed: Whether the exit status is 1.

    Raises:
        typer.Exit: It failed.
    """
    output = _RUNNING.get()
    if output is not None and output.json:
        output.stdout.write(json.dumps(done, indent=1, allow_nan=False, default=str) + "\n")
    if failed:
        raise typer.Exit(1)
