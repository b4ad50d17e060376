"""Processes of torch.distributed (gloo), forked from a server that has imported torch and ModelOpt already."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["modelopt.torch.quantization", "diffusers", "torch.distributed.fsdp"])


def _main(run: Callable[[int], Any], rank: int, number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number)
    try:
        torch.save(run(rank), folder / f"{rank}.pt")
    except BaseException:  # seen by the test as a missing result
        traceback.print_exc()
    os._exit(0)  # as a process that ends by itself, but without a word with the others


def _script(text: str, printed: Path) -> None:
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    code = 0
    try:
        exec(text, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_fresh(script: str, folder: Path, wait: float = 120.0) -> tuple[int, str]:
    """Exit code of a process that runs ``script``, and what it printed.

    It has imported torch, ModelOpt and diffusers, nothing of this package, and shares nothing with the test.
    """
    printed = folder / "printed.txt"
    process = _CONTEXT.Process(target=_script, args=(script, printed))
    process.start()
    process.join(wait)
    process.kill()
    process.join()
    return process.exitcode if process.exitcode is not None else -1, printed.read_text()


def run_in_processes(run: Callable[[int], Any], number: int, folder: Path, wait: float = 120.0) -> list[int]:
    """Exit codes of processes that ``run`` with their rank.

    Args:
        run: A function of a module.
        number: Of processes.
        folder: For what they return (``<rank>.pt``) and print (``<rank>.txt``); empty.
        wait: Seconds after which those that still run are killed.
    """
    processes = [_CONTEXT.Process(target=_main, args=(run, rank, number, folder)) for rank in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(wait)
        process.kill()
        process.join()
    return [process.exitcode if process.exitcode is not None else -1 for process in processes]


def results(run: Callable[[int], Any], number: int, folder: Path, wait: float = 120.0) -> list[Any]:
    """What each process returned; all must have."""
    run_in_processes(run, number, folder, wait)
    missing = [rank for rank in range(number) if not (folder / f"{rank}.pt").exists()]
    assert not missing, "\n".join((folder / f"{rank}.txt").read_text() for rank in missing)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]


def _module(command: Sequence[str], pipe: Connection, log: str) -> None:
    for number, stream in enumerate((pipe.fileno(), pipe.fileno(), os.open(log, os.O_WRONLY | os.O_APPEND))):
        os.dup2(stream, number)
    pipe.close()
    sys.argv, sys.stdin, sys.stdout, sys.stderr = [*command], open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    os._exit(0)


class ForkedModule:
    """Stands for ``subprocess.Popen([sys.executable, "-m", module, ...])`` with pipes: imports nothing anew."""

    def __init__(self, command: Sequence[str], *, stderr: TextIO, **_: Any) -> None:
        assert command[:2] == [sys.executable, "-m"]
        ours, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_module, args=(command[2:], theirs, stderr.name))
        self._process.start()
        theirs.close()
        self.stdin, self.stdout = open(os.dup(ours.fileno()), "w"), open(ours.fileno(), closefd=False)  # noqa: SIM115
        self._pipe = ours

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
