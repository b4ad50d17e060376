"""Numbers that belong together: sets that grow together, two at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["Joined"]


class Joined:
    """The numbers from 0 to ``count`` - 1, each alone at first.

    Args:
        count: Of the numbers.
        groups: Of numbers that belong together from the beginning.
    """

    def __init__(self, count: int, groups: Iterable[Sequence[int]] = ()) -> None:
        self._first = list(range(count))
        self.join_all(groups)

    def join(self, one: int, other: int) -> None:
        """These two belong together from now on, with all that belongs to either."""
        one, other = self._root(one), self._root(other)
        self._first[max(one, other)] = min(one, other)

    def join_all(self, groups: Iterable[Sequence[int]]) -> None:
        """Likewise, all numbers of each group."""
        for group in groups:
            for number in group[1:]:
                self.join(group[0], number)

    def groups(self) -> list[list[int]]:
        """The sets, each ascending, in the order of their first numbers."""
        found: dict[int, list[int]] = {}
        for number in range(len(self._first)):
            found.setdefault(self._root(number), []).append(number)
        return list(found.values())

    def _root(self, number: int) -> int:
        while self._first[number] != number:
            number = self._first[number]
        return number
