"""Two engines that share a schedule: one for the times at or above a boundary, another for those below.

So the steps that quantization harms most can stay in 16 bits while the rest runs in INT8. Which one computes a call is
told by its real time, whatever the number of steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.call import named_arguments
from modelopt_tdq.model.timestep import times_of_samples
from modelopt_tdq.pipeline.engine_denoiser import EngineDenoiser
from modelopt_tdq.pipeline.guard import StandIn

if TYPE_CHECKING:
    from modelopt_tdq.compare.results import ModelComparison

__all__ = ["SIDES", "Boundary", "EnginesByTime", "require_boundary", "time_boundary"]

#: What the engines are called: that of the times at or above the boundary, where the noise is high, and the other.
SIDES = ("high", "low")


class EnginesByTime(EngineDenoiser):
    """Looks like the denoiser of a pipeline, and lets one of two compute: by the time of the call.

    Where the samples of a call have times on both sides, both compute the whole call, and each sample takes the answer
    that belongs to its time. To look at a time on a GPU waits for it, once per call.

    Args:
        sides: ``high`` and ``low``: an engine in the place of ``original``, or ``original`` itself.
        boundary: The least time that belongs to ``high``, in the model's own units.
        original: The torch denoiser.
        timestep: The argument that holds the time.
    """

    def __init__(
        self, sides: Mapping[str, nn.Module], boundary: float, original: nn.Module, timestep: str = "timestep"
    ) -> None:
        StandIn.__init__(self, original)
        self._keep_place(original)
        self._timestep = timestep
        self.boundary = boundary
        # not submodules: an engine has nothing to be moved, and the original is not this module's
        object.__setattr__(self, "_sides", dict(sides))

    @property
    def sides(self) -> dict[str, nn.Module]:
        """``high`` and ``low``."""
        found: dict[str, nn.Module] = self._sides
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EnginesByTime:
        """The torch denoiser goes where the pipeline goes if it computes one of the sides."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if any(side is self.original for side in self.sides.values()):
            self.original._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's.

        Raises:
            TdqError: The call has no time, the times of one sample's tokens lie on both sides, or as the engines'.
        """
        time = named_arguments(self.original, args, kwargs).get(self._timestep)
        if time is None:
            raise TdqError(self._timestep, None, "the call has no time", f"Pass {self._timestep}")
        above = times_of_samples(torch.as_tensor(time)) >= self.boundary
        if bool(above.all()):
            return self.sides["high"](*args, **kwargs)
        if not bool(above.any()):
            return self.sides["low"](*args, **kwargs)
        if above.dim() > 1 and not bool((above == above[:, :1]).all()):
            raise TdqError(
                self._timestep,
                tuple(above.shape),
                f"times of one sample lie on both sides of the boundary {self.boundary:g}, and an engine computes "
                "whole samples",
                "Use one engine for all times: swap_denoiser(pipeline, engine)",
            )
        above = above.reshape(len(above), -1)[:, 0]
        return _each(above, self.sides["high"](*args, **kwargs), self.sides["low"](*args, **kwargs))


def _each(above: Tensor, high: Any, low: Any) -> Any:
    """Of each sample, the answer that belongs to its time: of tensors, batch first, in any nesting."""
    if isinstance(high, Tensor):
        if high.dim() == 0 or len(high) != len(above):
            raise TdqError(
                "timestep",
                tuple(high.shape),
                "an output does not have the samples in its first dimension, so that they cannot be taken from two "
                "engines",
                "Call it with times on one side of the boundary",
            )
        return torch.where(above.to(high.device).reshape(-1, *(1,) * (high.dim() - 1)), high, low)
    if isinstance(high, Mapping):
        return type(high)(**{name: _each(above, value, low[name]) for name, value in high.items()})
    if isinstance(high, (tuple, list)):
        return type(high)(map(functools.partial(_each, above), high, low))
    return high


@dataclass(frozen=True)
class Boundary:
    """Where to exchange engines: see :func:`time_boundary`.

    Attributes:
        time: The least time that belongs to ``high``, in the model's own units.
        precise: The side whose steps fall short of the target, which should be in higher precision.
        steps: Compared steps on that side.
        of_steps: All that were compared.
    """

    time: float
    precise: Literal["high", "low"]
    steps: int
    of_steps: int


def time_boundary(comparison: ModelComparison, target: float) -> Boundary:
    """The boundary that leaves the fewest steps to higher precision, so that all others reach an SQNR.

    Args:
        comparison: What :func:`~modelopt_tdq.compare.compare_model` found of the quantized model, at the times of a
            whole trajectory.
        target: SQNR of the prediction, in dB, that each step of the quantized model has to reach.

    Returns:
        ``high`` or ``low``, whichever takes fewer steps (``high`` of two equals). The boundary is half-way between the
        two compared times.

    Raises:
        TdqError: All steps reach the target, or none does, or there are no two times.
    """
    by_time = {step.time: step.difference.noise_db for step in comparison.steps}
    times = sorted(by_time)
    short = [not by_time[time] >= target for time in times]
    if len(times) < 2 or all(short) or not any(short):
        worst, best = min(by_time.values(), default=math.nan), max(by_time.values(), default=math.nan)
        raise TdqError(
            "target",
            target,
            f"{sum(short)} of {len(times)} steps fall short of it: they have {worst:.1f} to {best:.1f} dB",
            "Use one engine for all times, or a target between these; compare at the times of a whole trajectory",
        )
    from_below = len(short) - short[::-1].index(True)  # how many of the lowest times hold all that fall short
    from_above = len(short) - short.index(True)
    if min(from_below, from_above) == len(times):
        raise TdqError(
            "target",
            target,
            "the steps that fall short of it lie at both ends of the schedule, and two engines have one boundary",
            "Use a lower target, or keep the layers that harm in high precision: modelopt_tdq.analyze(..., target=...)",
        )
    if from_above <= from_below:
        first = len(times) - from_above
        return Boundary((times[first - 1] + times[first]) / 2, "high", from_above, len(times))
    return Boundary((times[from_below - 1] + times[from_below]) / 2, "low", from_below, len(times))


def require_boundary(boundary: Any, times: Sequence[float]) -> float:
    """The boundary, if it divides the times that are known.

    Args:
        boundary: What the user passed.
        times: Of the schedule, as far as they are known; may be empty.

    Raises:
        TdqError: It is no finite number, or all times lie on one side of it.
    """
    if isinstance(boundary, bool) or not isinstance(boundary, (int, float)) or not math.isfinite(boundary):
        raise TdqError(
            "boundary",
            boundary,
            "two engines need the time at which they are exchanged",
            "Pass boundary=, in the model's own units; modelopt_tdq.time_boundary(comparison, target) finds one",
        )
    if times and not min(times) < boundary <= max(times):
        raise TdqError(
            "boundary",
            boundary,
            f"outside of the schedule, whose times go from {min(times):g} to {max(times):g}",
            "Use a time between these, in the model's own units",
        )
    return float(boundary)
