"""The comparison that the scripts for ``polygraphy run`` call: it prints what is allowed and what was found."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelopt_tdq.compare.metrics import TOLERANCES, CodesDifference, OutputDifference
from modelopt_tdq.compare.steps import StepComparator

__all__ = ["PrintedComparator"]


class PrintedComparator(StepComparator):
    """A :class:`StepComparator` that prints a line per step, and one per faulty layer, the first of them by name.

    Args:
        full_precision: Output of the model without quantization, one per step.
        times: Of the steps, in the model's own units.
        output: Name of the model's output.
        given: Whether the implementation under test computes with the reference's codes.
    """

    def __init__(
        self,
        full_precision: Sequence[np.ndarray[Any, Any]],
        times: Sequence[float],
        output: str = "output",
        *,
        given: bool = False,
    ) -> None:
        super().__init__(full_precision, output, given=given)
        self.times = list(times)
        self._said: set[str] = set()

    def _once(self, what: str, line: str) -> None:
        if what not in self._said:
            print(line)
        self._said.add(what)

    def __call__(
        self, reference: Mapping[str, Any], result: Mapping[str, Any]
    ) -> OrderedDict[str, OutputDifference | CodesDifference]:
        """See :meth:`StepComparator.__call__`. Polygraphy passes the steps in their order."""
        compared = super().__call__(reference, result)
        step = self.step(np.asarray(reference[self.output]))
        at = f"step {step}, time {self.times[step]:g}"
        self._once("tolerances", TOLERANCES)
        for name, difference in compared.items():
            if name == self.output or not difference:
                print(f"{at} | {'passed' if difference else 'FAILED'} | {name}: {difference}")
            if isinstance(difference, CodesDifference) and not difference:
                self._once("fault", f"FIRST FAULTY LAYER: {name}, {at}")
        layers = [d for d in compared.values() if isinstance(d, CodesDifference)]
        if layers:
            moved, count = sum(d.differing for d in layers), sum(d.count for d in layers)
            failed = sum(not d for d in layers)
            print(f"{at} | {len(layers)} layers, {failed} faulty: {moved} of {count} codes differ")
        return compared
