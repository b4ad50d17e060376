"""Processes that succeed or fail together: whatever happens to one, every other ends with its reason, in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import results, run_in_processes

from modelopt_tdq import TdqError
from modelopt_tdq.core import together as module
from modelopt_tdq.core.distributed import agreed, all_reduce, broadcast, gather, union
from modelopt_tdq.core.together import check, meet, together


def _hurry() -> None:
    """Real times are a minute and more."""
    module.BEAT, module.SILENCE, module.STUCK, module.ABORT, module.TOLD = 0.05, 1.0, 1.0, 0.5, 1.0


def _outcome(task: str, body: Callable[[], Any]) -> str:
    """What a process says of a run: "done", or its error."""
    try:
        with together(task):
            body()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def _raise(error: BaseException) -> None:
    raise error


def _computing() -> None:
    for _ in range(400):
        time.sleep(0.01)
        check()


def _outcomes(rank: int) -> dict[str, Any]:
    """Everything that leaves the process groups as they were."""
    _hurry()
    first, found = rank == 0, {}
    found["reduced"] = all_reduce(torch.tensor([1.0, rank]), "sum").tolist(), union({float(rank), 7.0})
    found["broadcast"] = broadcast({"x": [torch.tensor(rank)], "n": rank} if rank else {}, 1)
    found["fine"] = _outcome("fine", lambda: gather(rank))
    failing = {
        "in a reduction": lambda: gather(0),
        "computing": _computing,
        "done already": lambda: None,
        "nested": lambda: _outcome("inner", meet) and meet(),
    }
    for name, body in failing.items():
        found[name] = _outcome(name, body if first else lambda: _raise(ValueError("boom")))
    found["interrupted"] = _outcome("interrupted", meet if first else lambda: _raise(KeyboardInterrupt()))
    found["both"] = _outcome("both", lambda: _raise(ValueError(f"of {rank}")))
    found["another task"] = _outcome("this" if first else "that", meet)
    found["other values"] = _outcome("values", lambda: agreed("algorithm", {"same": 1, "bits": 8 - 4 * rank}))
    found["slow"] = _outcome("slow", lambda: time.sleep(0 if first else 2.0))  # longer than the silence of the dead
    found["fine in the end"] = _outcome("fine", lambda: gather(rank))
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(_outcomes, 2, tmp_path_factory.mktemp("together"))


def test_numbers_and_objects_of_all(outcomes: list[dict[str, Any]]) -> None:
    for found in outcomes:
        assert found["reduced"] == ([2.0, 1.0], [0.0, 1.0, 7.0])
        assert found["broadcast"] == {"x": [torch.tensor(1)], "n": 1}


@pytest.mark.parametrize("name", ["in a reduction", "computing", "done already", "nested"])
def test_all_fail_with_the_message_of_one(outcomes: list[dict[str, Any]], name: str) -> None:
    first, second = (found[name] for found in outcomes)
    assert second == "ValueError: boom"
    assert first.startswith("TdqError: rank = 1: this process failed, and with it all others: ValueError: boom.")


def test_what_one_process_did_otherwise_is_named(outcomes: list[dict[str, Any]]) -> None:
    first, second = outcomes
    assert "KeyboardInterrupt" in first["interrupted"]
    assert [found["both"] for found in outcomes] == ["ValueError: of 0", "ValueError: of 1"]
    assert second["another task"].startswith("TdqError: rank = 1: this process began `that`, and rank 0 `this`")
    assert "began `that`" in first["another task"]
    for found in outcomes:
        assert "'bits': it is 8 in the process of rank 0, and 4 in that of rank 1" in found["other values"]


def test_the_process_groups_stay_as_they_were(outcomes: list[dict[str, Any]]) -> None:
    for found in outcomes:
        assert found["fine"] == found["fine in the end"] == found["slow"] == "done"


def _killed(rank: int) -> Any:
    """The last process dies; of the others, one waits in a collective of a model, and one for all to meet."""
    _hurry()
    gather(rank)  # connected
    bodies = (lambda: dist.all_reduce(torch.zeros(1)), meet, lambda: os.kill(os.getpid(), signal.SIGKILL))
    begin = time.monotonic()
    return _outcome("killed", bodies[rank]), time.monotonic() - begin


def test_a_process_that_dies(tmp_path: Path) -> None:
    assert run_in_processes(_killed, 3, tmp_path) == [0, 0, -signal.SIGKILL]
    for rank in (0, 1):
        outcome, seconds = torch.load(tmp_path / f"{rank}.pt")
        assert outcome.startswith("TdqError: rank = 2: ")
        assert "no sign of life for 1 s" in outcome
        assert seconds < 5


def _raises(rank: int) -> str:
    """One fails while the other waits for it in a collective of the model."""
    _hurry()
    gather(rank)
    return _outcome("stuck", lambda: _raise(ValueError("boom")) if rank else dist.all_reduce(torch.zeros(1)))


def test_one_that_waits_in_a_collective_is_freed_by_the_end_of_the_other(tmp_path: Path) -> None:
    first, second = results(_raises, 2, tmp_path)
    assert second == "ValueError: boom"
    assert "ValueError: boom" in first
    assert "start the processes again" in first


def _raises_and_lives(rank: int) -> None:
    _raises(rank)
    time.sleep(3)


def test_one_that_can_never_be_freed_ends_with_the_reason(tmp_path: Path) -> None:
    begin = time.monotonic()
    assert run_in_processes(_raises_and_lives, 2, tmp_path) == [1, 0]
    assert time.monotonic() - begin < 60
    printed = (tmp_path / "0.txt").read_text()
    assert "rank = 1: this process failed, and with it all others: ValueError: boom" in printed
    assert "This process waits in a collective that can no longer complete, and ends" in printed


def _absent(rank: int) -> str:
    _hurry()
    return "" if rank else _outcome("alone", meet)


def test_one_that_ends_before_it_begins(tmp_path: Path) -> None:
    assert results(_absent, 2, tmp_path)[0].startswith("TdqError: rank = [1]: `alone` did not begin in every process")


def test_one_process_alone() -> None:
    with together("alone"):
        meet()
        check()
        assert gather(3) == [3]
        assert broadcast(4, 0) == 4
        agreed("algorithm", {"bits": 8})
    with pytest.raises(TdqError, match="own"), together("alone"):
        raise TdqError("field", 1, "own", "cure")
