"""Processes that succeed or fail together.

A process that failed must not enter a collective to say so: the others may wait in another one, inside the model's
own ``forward`` (FSDP, tensor and context parallel). So failures, and signs of life, go through the store of
torch.distributed, which every process may read and write at any time.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from modelopt_tdq.errors import TdqError

__all__ = ["active", "check", "collective_device", "meet", "together"]

#: Seconds between two signs of life, and between two looks at what became of the others.
BEAT = 0.5

#: Seconds without a sign of life after which a process counts as dead.
SILENCE = 60.0

#: Seconds after the failure of another process for which this one may go on with a call of the model. Then the
#: process groups are aborted, which frees it from a collective (NCCL); where that does not help, it ends.
STUCK = 60.0

#: Seconds between that abort and the end.
ABORT = 10.0

#: Seconds for which a process that failed waits until all others know.
TOLD = 5.0


def active() -> bool:
    """Whether there are several processes of torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def collective_device() -> str:
    """Where tensors of collectives lie, the same in all processes: on the CPU if the backend knows it."""
    return str(dist.distributed_c10d._get_object_coll_device())


@dataclass(frozen=True)
class _Failure:
    rank: int
    message: str

    def error(self, broken: bool) -> TdqError:
        problem = f"this process failed, and with it all others: {self.message.rstrip('.')}"
        cure = "See the output of that process"
        if broken:
            cure += ", and start the processes again: a collective was interrupted"
        return TdqError("rank", self.rank, problem, cure)


class _Run:
    """One run of all processes: what they tell each other, and a thread that watches over the next process."""

    def __init__(self, task: str) -> None:
        self.rank, self._size = dist.get_rank(), dist.get_world_size()
        self._task = task
        # a connection of its own: torch.distributed may wait in the original one for as long as it likes
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=SILENCE))
        number = store.add(f"modelopt_tdq/runs/{self.rank}", 1)
        self._store = dist.distributed_c10d.PrefixStore(f"modelopt_tdq/{number}/", store)
        self._meetings = 0
        self._failure: _Failure | None = None
        self._knows = threading.Lock()
        #: A collective was interrupted.
        self._broken = False
        #: What this process raised because another one had failed.
        self._raised: TdqError | None = None
        #: Nothing of the body is running any more.
        self._out = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="modelopt_tdq processes", daemon=True)

    def begin(self) -> None:
        """Wait for the others, and see that they began the same.

        Raises:
            TdqError: A process does not begin, or begins something else.
        """
        self._store.set(f"task/{self.rank}", self._task)
        self._store.set(f"alive/{self.rank}", "0")
        self._thread.start()
        try:
            # a collective rather than a meeting: it notices a process that ended before it began
            dist.all_reduce(torch.zeros(1, device=collective_device()))
        except RuntimeError as error:
            absent = [rank for rank in range(self._size) if not self._store.check([f"task/{rank}"])]
            raise TdqError(
                "rank",
                absent or self.rank,
                f"`{self._task}` did not begin in every process ({error})",
                "Run it in every process of torch.distributed",
            ) from error
        self.meet()
        first = self._store.get("task/0").decode()
        if first != self._task:
            raise TdqError(
                "rank", self.rank, f"this process began `{self._task}`, and rank 0 `{first}`", "Run the same in all"
            )

    def meet(self) -> None:
        """Wait until every process is here.

        Raises:
            TdqError: One has failed or died.
        """
        self._meetings += 1
        here, pause = f"meeting/{self._meetings}", BEAT / 1000
        try:
            if self._store.add(here, 1) == self._size:
                self._store.set(f"{here}/all", "1")
            while not self._store.check([f"{here}/all"]):
                self.check()
                time.sleep(pause)
                pause = min(2 * pause, BEAT / 10)
        except RuntimeError as error:
            self._raised = self._lost(error).error(self._broken)
            raise self._raised from error

    def check(self) -> None:
        """Raise if another process is known to have failed."""
        failure = self._known()
        if failure is not None:
            self._raised = failure.error(self._broken)
            raise self._raised

    def end(self) -> None:
        """Leave after all have succeeded."""
        self.meet()
        self._store.add("left", 1)
        begin = time.monotonic()
        # rank 0 usually keeps the store, and leaves last
        while not self.rank and self._store.add("left", 0) < self._size and time.monotonic() - begin < TOLD:
            time.sleep(BEAT / 100)

    def failed(self, error: BaseException) -> TdqError | None:
        """Tell the others, unless it was one of them that failed: then an error that says so, or None if this does."""
        self._out.set()
        begin = time.monotonic()
        if isinstance(error, RuntimeError) and _in_collective(error.__traceback__):
            # a collective breaks when another process ends: its reason, or its death, will be known soon
            self._broken = True
            while self._known() is None and time.monotonic() - begin < SILENCE + 4 * BEAT:
                time.sleep(BEAT / 10)
        other = self._known() if self._broken else None
        if other is None and error is not self._raised:
            self._tell(_Failure(self.rank, f"{type(error).__name__}: {error}"))
        begin = time.monotonic()
        with suppress(RuntimeError):  # where the store is gone, nobody is left to be waited for
            while self._store.add("told", 0) < self._size and time.monotonic() - begin < TOLD:
                self._known()
                time.sleep(BEAT / 10)
        if other is None or other.rank == self.rank or error is self._raised:
            return None
        return other.error(self._broken)

    def leave(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join(TOLD)

    def _tell(self, failure: _Failure) -> None:
        with suppress(RuntimeError):
            number = self._store.add("failures", 1)
            self._store.set(f"failure/{number}", json.dumps([failure.rank, failure.message]))

    def _known(self) -> _Failure | None:
        with self._knows:
            try:
                if self._failure is None and self._store.check(["failure/1"]):
                    self._failure = _Failure(*json.loads(self._store.get("failure/1")))
                    self._store.add("told", 1)
            except RuntimeError as error:
                self._failure = self._failure or self._lost(error)
            return self._failure

    def _lost(self, error: RuntimeError) -> _Failure:
        return _Failure(0, f"it, or the launcher, kept the store of torch.distributed, which is gone ({error})")

    def _watch(self) -> None:
        """Signs of life of this process; those of the next one; what to do when one has failed."""
        following, seen, silent, failed = (self.rank + 1) % self._size, b"", 0, 0
        beats = 0
        while not self._over.wait(BEAT):
            beats += 1
            failure = self._known()
            if failure is not None:
                failed += not self._out.is_set()
                if failed * BEAT > STUCK + ABORT:
                    self._stop(failure)
                if failed * BEAT > STUCK and not self._broken:
                    self._abort()
                continue
            with suppress(RuntimeError):  # a lost store is a failure by itself
                self._store.set(f"alive/{self.rank}", str(beats))
                if self._store.check([f"alive/{following}"]):
                    sign = self._store.get(f"alive/{following}")
                    # counted in looks, not in seconds: this process may have been stopped itself
                    silent = 0 if sign != seen else silent + 1
                    seen = sign
                if silent * BEAT > SILENCE:
                    message = f"it gave no sign of life for {SILENCE:g} s: its process ended, or hangs"
                    self._tell(_Failure(following, message))

    def _abort(self) -> None:
        self._broken = True
        with suppress(Exception):  # what cannot be aborted ends with the process
            dist.distributed_c10d._abort_process_group()

    def _stop(self, failure: _Failure) -> None:
        where = "This process waits in a collective that can no longer complete, and ends"
        print(f"rank {self.rank}: {failure.error(True)} {where}.", file=sys.stderr, flush=True)
        os._exit(1)


def _in_collective(traceback: TracebackType | None) -> bool:
    """Whether an error came out of torch.distributed: one of the two innermost frames is of it."""
    modules: list[str] = []
    while traceback is not None:
        modules.append(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next
    return any(module.startswith(("torch.distributed", "torch.nn.parallel")) for module in modules[-2:])


#: The run that this process is in.
_RUN: ContextVar[_Run | None] = ContextVar("modelopt_tdq_run", default=None)


def meet() -> None:
    """Wait until every process is here, if this is inside :func:`together`.

    Raises:
        TdqError: One has failed or died.
    """
    run = _RUN.get()
    if run is not None:
        run.meet()


def check() -> None:
    """Raise if another process has failed, if this is inside :func:`together`.

    Raises:
        TdqError: Names its rank and its message.
    """
    run = _RUN.get()
    if run is not None:
        run.check()


@contextmanager
def together(task: str) -> Iterator[None]:
    """If the body raises in one process, it raises in all, and none is left waiting for the others.

    The others raise where they next call :func:`meet` or :func:`check`: the process groups stay as they were. A
    process that waits in a collective of the model meanwhile is freed when the failed process ends, at once with
    gloo; if that one lives on, this one's process groups are aborted 60 s after the failure, and if it still waits 10 s
    later (a gloo collective cannot be aborted), it prints the reason and ends with exit code 1. A process that gives
    no sign of life for 60 s counts as failed. So all end within some two minutes of the first failure. Where a process
    is merely slow, the others wait for it without limit.

    Does nothing in one process, and inside another ``together``.

    Args:
        task: What the body does; the same in all processes.

    Raises:
        TdqError: The body failed in another process; names its rank and its message. Or a process began
            something else, or did not begin within the process group's own timeout.
    """
    if not active() or _RUN.get() is not None:
        yield
        return
    run = _Run(task)
    token = _RUN.set(run)
    try:
        run.begin()
        yield
        run.end()
    except BaseException as error:
        other = run.failed(error)
        if other is None:
            raise
        raise other from error
    finally:
        run.leave()
        _RUN.reset(token)
