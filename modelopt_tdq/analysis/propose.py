"""The fewest layers to leave in high precision for a target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from modelopt_tdq.analysis.probe import Probe
from modelopt_tdq.analysis.sensitivity import Sensitivity

__all__ = ["Proposal", "propose"]


@dataclass(frozen=True)
class Proposal:
    """Layers to keep in high precision so that the output reaches a target at the probed times.

    Attributes:
        target_db: What was asked for.
        layers: The layers, most harmful first.
        sqnr_db: [T] measured with those layers in high precision and everything else quantized.
        rules: The same as ``quant_cfg`` rules, to be appended to those of the config.
    """

    target_db: float
    layers: tuple[str, ...]
    sqnr_db: tuple[float, ...]
    rules: list[dict[str, Any]] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        """Whether the measured output reaches the target at every probed time."""
        return min(self.sqnr_db, default=math.inf) >= self.target_db


def _removal_order(sensitivity: Sensitivity, allowed: Tensor) -> list[str]:
    """All layers, in the order in which leaving them out helps most at the time that lacks most.

    Args:
        sensitivity: Of the layers.
        allowed: [T] squared error at the target.
    """
    order: list[str] = []
    left = set(sensitivity.noise)
    partners: dict[str, set[str]] = {}
    for group in sensitivity.shared:
        for name in group:
            partners.setdefault(name, {name}).update(group)

    def saved(name: str) -> Tensor:
        """[T] what leaving out this layer saves."""
        beside = partners.get(name, {name}) & left
        rest = beside - {name}
        return sensitivity.together(beside) - (sensitivity.together(rest) if rest else 0.0)

    total = sensitivity.together(left)
    while left:
        time = int((total / allowed).argmax())
        savings = {name: saved(name) for name in sorted(left)}
        worst = max(savings, key=lambda name: float(savings[name][time]))
        total = total - savings[worst]
        left.remove(worst)
        order.append(worst)
    return order


def propose(probe: Probe, sensitivity: Sensitivity, target_db: float) -> Proposal:
    """As few layers as suffice for the measured output to reach the target.

    Their errors add up closely enough to put them in order. Whether the target is reached is measured, with everything
    else quantized: by bisection over that order; then each layer is tried out once more, the least harmful first.

    Args:
        probe: Times to look at.
        sensitivity: Of the same probe, with the scales as they are.
        target_db: SQNR of the model's output to reach at every probed time, in dB.
    """
    allowed = probe.energy * 10.0 ** (-target_db / 10.0)
    order = _removal_order(sensitivity, allowed)

    def measured(kept: list[str]) -> Tensor:
        off = tuple(f"{name}." for name in kept)
        with probe.only(lambda name: not name.startswith(off)):
            return probe.noise()

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if bool((measured(order[:middle]) <= allowed).all()):
            high = middle
        else:
            low = middle + 1
    kept = order[:low]
    for name in reversed(order[: low - 1]):  # without the last, it was not reached
        others = [other for other in kept if other != name]
        if bool((measured(others) <= allowed).all()):
            kept = others
    rules = [{"quantizer_name": f"{name}.*_quantizer", "enable": False} for name in kept]
    return Proposal(target_db, tuple(kept), probe.sqnr_db(measured(kept)), rules)
