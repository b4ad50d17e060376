"""Quantizers that learn: their interval comes from the model's source, or is measured on the activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.intervals.dynamic import DynamicIntervals
from modelopt_tdq.model.place import release
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.timestep import per_sample
from modelopt_tdq.training.schemes import SCHEMES, Deployed

__all__ = ["DynamicQuantizer", "LearnedQuantizer"]

_PREFIX = "_learned_"


class LearnedQuantizer(TemporalQuantizer):
    """In training mode its interval comes from the model's source and carries gradients; in eval mode, from its table.

    Attributes:
        _scheme: Name of the scheme.
        _column: Its column in the source's output.
        _zero: Shift of the codes in steps; 0 where symmetric.
    """

    _scheme: str
    _column: int
    _zero: float

    def learn(self, scheme: str, column: int, zero: float, further: Mapping[str, Tensor]) -> None:
        """Set what the quantizer learns with.

        Args:
            scheme: Key of :data:`SCHEMES`.
            column: In the source's output.
            zero: Shift of the codes in steps.
            further: Initial values of the scheme's further parameters.
        """
        self._scheme, self._column, self._zero = scheme, column, zero
        self.forget()
        for name, value in further.items():
            self.register_parameter(_PREFIX + name, nn.Parameter(value))

    def forget(self) -> None:
        """Drop the further parameters."""
        for name in [n for n in self._parameters if n.startswith(_PREFIX)]:
            del self._parameters[name]

    def unlearn(self) -> None:
        """Become the calibrated quantizer again that it was, in place, with the table that it has."""
        self.forget()
        self._modules.pop("intervals", None)
        for name in ("_scheme", "_column", "_zero", "_learns"):
            self.__dict__.pop(name, None)
        self.__class__ = TemporalQuantizer

    @property
    def further(self) -> dict[str, Tensor]:
        """The scheme's further learned parameters, by its names for them."""
        if any(p is not None and p.is_meta for p in self._parameters.values()):
            release(self)
        found = {n.removeprefix(_PREFIX): p for n, p in self._parameters.items() if n.startswith(_PREFIX)}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    @property
    def awaits_state(self) -> bool:
        """Whether it was restored, and the state dict is still to be loaded."""
        return self.has_table and bool(self._scale.isnan().any())

    def deployed(self, interval: Tensor) -> Deployed:
        """What becomes of intervals of any shape."""
        return SCHEMES[self._scheme].deployed(interval, self._zero, self._num_bits, self.further)

    def _require_settable(self) -> None:
        raise TdqError(
            "amax",
            self._quantizer_name,
            "its scale is learned, and training would undo what is set",
            "Call modelopt_tdq.stop_learning(model) first",
        )

    def _fake_quantize(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return super()._fake_quantize(inputs)
        intervals = self._timestep.intervals
        if intervals is None:
            self._timestep.require()
            raise TdqError(
                "model",
                type(self).__name__,
                "part of the model is in training mode, but its root is not",
                "Call train() or eval() on the whole model",
            )
        interval = per_sample(intervals[:, self._column].to(inputs.device), inputs)
        values = self.learned_values(self.shifted(self.smoothed(inputs)), interval)
        return self.shifted_back(values)

    def learned_values(self, inputs: Tensor, interval: Tensor) -> Tensor:
        """x_hat with the scheme's gradient, for an interval that goes with ``inputs``."""
        return SCHEMES[self._scheme].train(inputs, interval, self._zero, self._num_bits, self.further)


class DynamicQuantizer(LearnedQuantizer):
    """Measures its interval on every sample, in training and in eval mode: a baseline without a table."""

    no_table: ClassVar[str] = "its scale is measured on the activation while the model runs: no table holds it"

    def measure(self, intervals: DynamicIntervals) -> None:
        """Set what it measures with."""
        self.intervals = intervals

    def _fake_quantize(self, inputs: Tensor) -> Tensor:
        inputs = self.shifted(self.smoothed(inputs))
        interval = self.intervals(inputs, self._timestep.require())
        if self.training:
            return self.shifted_back(self.learned_values(inputs, interval))
        with torch.no_grad():
            return self.shifted_back(self.deployed(interval)(inputs, self._num_bits))
