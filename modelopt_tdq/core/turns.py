"""What processes tell each other in the middle of a call of the model, whichever of its parts run in which process.

A collective in a hook needs all processes to run the same parts in the same order. Experts that get no tokens, or
branches that depend on the data, run in some processes only. So each says at which part it is, and the first of them
has its turn; the others say it again, and those whose call is over listen until all calls are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from modelopt_tdq.core.distributed import gather
from modelopt_tdq.core.together import active

__all__ = ["Turns"]

#: What becomes of the values that processes gave at one part.
Listener = Callable[[list[Any]], None]


def _on_cpu(value: Any) -> Any:
    """Of nested tuples."""
    if isinstance(value, tuple):
        return tuple(map(_on_cpu, value))
    return value.cpu() if isinstance(value, Tensor) else value


class Turns:
    """See the module.

    Args:
        parts: All that may have a turn, in the same order in all processes.

    Attributes:
        samples: Of this process in the present call; 0 if it stands in, and is no evidence
            (:class:`modelopt_tdq.model.replay_ranks.Batch`).
        all_samples: Of all processes in it.
    """

    def __init__(self, parts: Iterable[Any]) -> None:
        self._numbers = {id(part): number for number, part in enumerate(parts)}
        self._listeners: dict[int, Listener] = {}
        self._users = 0
        self.samples = self.all_samples = 1

    @contextmanager
    def used(self, listeners: Mapping[Any, Listener] | None = None) -> Iterator[None]:
        """In the body, parts take turns.

        Args:
            listeners: By part, what hears the values given there in every process, whether it runs there or not.
        """
        added = {self._numbers[id(part)]: listener for part, listener in (listeners or {}).items()}
        self._listeners |= added
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            for number in added:
                del self._listeners[number]

    def exchange(self, part: Any, value: Any) -> list[Any]:
        """The picklable ``value`` of each process that is at ``part``, by rank; this one's is among them.

        Tensors come back on the CPU where there are several processes.
        """
        number = self._numbers[id(part)]
        if not active():
            self._hear(number, [value])
            return [value]
        value = _on_cpu(value)
        while True:
            turn, values = self._turn((number, value))
            if turn == number:
                return values

    def over(self) -> None:
        """A call is over, in which parts took turns: wait until it is in all processes."""
        if active() and self._users:
            while self._turn(None)[0] is not None:
                pass

    def _turn(self, given: tuple[int, Any] | None) -> tuple[int | None, list[Any]]:
        """Whose turn it was, and what was given there; None if all calls are over."""
        said = [one for one in gather(given) if one is not None]
        if not said:
            return None, []
        turn = min(number for number, _ in said)
        values = [value for number, value in said if number == turn]
        self._hear(turn, values)
        return turn, values

    def _hear(self, number: int, values: list[Any]) -> None:
        listener = self._listeners.get(number)
        if listener is not None:
            listener(values)
