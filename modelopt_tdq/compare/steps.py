"""A Polygraphy comparison that knows the time steps."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from modelopt_tdq.compare.layers import codes_by_quantizer
from modelopt_tdq.compare.metrics import CodesDifference, OutputDifference, codes_difference, output_difference
from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.errors import TdqError

__all__ = ["StepComparator"]


class StepComparator:
    """Compares the results of two Polygraphy runners for one call of the model; a ``compare_func``.

    Polygraphy hands over two sets of outputs and no time. The step is the one whose full-precision
    output is nearest to the reference's, which a quantized model that works at all leaves no doubt about.

    Args:
        full_precision: Output of the model without quantization, one per step.
        output: Name of the model's output.
        given: Whether the implementation under test computes with the reference's codes (a graph made by
            :func:`~modelopt_tdq.compare.layers.with_given_codes`): nothing but rounding may then change its output.
    """

    def __init__(
        self, full_precision: Sequence[np.ndarray[Any, Any]], output: str = "output", *, given: bool = False
    ) -> None:
        self.full_precision, self.output = [np.asarray(a, np.float64) for a in full_precision], output
        self.given = given

    def step(self, reference: np.ndarray[Any, Any]) -> int:
        """Index of the step that a reference output belongs to.

        Raises:
            TdqError: It is not near any: other inputs, or another model.
        """
        found = torch.from_numpy(np.asarray(reference, np.float64))
        sqnr = [
            sqnr_db(torch.from_numpy(a), found) if a.shape == reference.shape else -math.inf
            for a in self.full_precision
        ]
        best = int(np.argmax(sqnr))
        if not sqnr[best] > 0:
            raise TdqError(
                self.output,
                reference.shape,
                "the reference output is not near the full-precision output of any step",
                "Run the reference on the inputs that the full-precision outputs were made from",
            )
        return best

    def output_at(self, step: int, reference: Mapping[str, Any], result: Mapping[str, Any]) -> OutputDifference:
        """Compare the output of a known step.

        Args:
            step: Index into ``full_precision``.
            reference: Outputs of the reference by name.
            result: Outputs of the implementation under test by name.

        Raises:
            TdqError: One of the two lacks the output.
        """
        for outputs in (reference, result):
            if self.output not in outputs:
                raise TdqError(
                    "output", self.output, "one of the results lacks it", f"It has {', '.join(list(outputs)[:8])}"
                )
        exact = None if self.given else self.full_precision[step]
        return output_difference(reference[self.output], result[self.output], exact)

    def __call__(
        self, reference: Mapping[str, Any], result: Mapping[str, Any]
    ) -> OrderedDict[str, OutputDifference | CodesDifference]:
        """Compare two results as Polygraphy's Comparator hands them over.

        Returns:
            The output; then the codes of the quantizers that both results hold, in the order in which they run. With
            given codes every layer is judged by itself; otherwise only the first that differs means anything.

        Raises:
            TdqError: The reference does not belong to any step, or one of the two lacks the output.
        """
        compared: OrderedDict[str, OutputDifference | CodesDifference] = OrderedDict()
        step = self.step(np.asarray(reference[self.output])) if self.output in reference else 0
        compared[self.output] = self.output_at(step, reference, result)
        own = codes_by_quantizer((name, result[name]) for name in result)
        for name, codes in codes_by_quantizer((name, reference[name]) for name in reference).items():
            if name in own:
                compared[name] = codes_difference(name, codes.values, own[name].values, fp8=codes.fp8)
        return compared
