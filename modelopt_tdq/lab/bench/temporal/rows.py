"""The rows of the comparison, and what they may cost."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from modelopt_tdq.lab.bench.budget import named

__all__ = ["BITS", "ROWS", "TemporalBudget", "TemporalRun", "runs", "temporal_budget"]

#: Weights and activations, as compared.
BITS = ((8, 8), (4, 8), (4, 4))

#: Label to the fields of ``{"method": "tdq_temporal"}``; None: the temporal layers stay in full precision.
ROWS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "naive": {"maintenance": "naive"},
    "TIB": {"maintenance": "tib"},
    "cache": {"maintenance": "cache"},
    "cache, 16 bits": {"maintenance": "cache", "cache_bits": 16},
    "auto": {"maintenance": "auto"},
}


@dataclass(frozen=True)
class TemporalBudget:
    """The same for every row.

    Attributes:
        name: Of the budget.
        calibration_samples: Trajectories to calibrate on.
        calibration_steps: DDIM steps of those.
        judged: DDIM steps to the number of trajectories of that length, of other seeds, that are judged.
        iterations: Of the reconstruction of the TIB.
        deployed: Bits that are exported and built.
    """

    name: str
    calibration_samples: int
    calibration_steps: int
    judged: dict[int, int]
    iterations: int
    deployed: tuple[tuple[int, int], ...]


_BUDGETS = {
    "smoke": TemporalBudget("smoke", 1, 3, {3: 2, 4: 1}, 4, ()),
    "quick": TemporalBudget("quick", 4, 20, {20: 6, 50: 2}, 300, ((8, 8),)),
    "full": TemporalBudget("full", 64, 20, {20: 1_000, 50: 64}, 20_000, BITS),
}


def temporal_budget(name: str) -> TemporalBudget:
    """The budget of that name; raises a TdqError if there is none."""
    return named(_BUDGETS, name)


@dataclass(frozen=True)
class TemporalRun:
    """One row.

    Attributes:
        weight_bits: Of integers.
        activation_bits: Likewise.
        label: Of the row, see :data:`ROWS`.
        options: Fields of the algorithm, see :data:`ROWS`.
    """

    weight_bits: int
    activation_bits: int
    label: str
    options: dict[str, Any] | None = field(default_factory=dict, hash=False)

    @property
    def bits(self) -> str:
        """``"W4A8"``."""
        return f"W{self.weight_bits}A{self.activation_bits}"

    def key(self, model: str, budget: TemporalBudget) -> str:
        """The same for runs that would give the same result.

        Args:
            model: Checksum of its weights.
            budget: Of the run.
        """
        cost = {name: value for name, value in asdict(budget).items() if name != "deployed"}
        what = json.dumps([model, cost, asdict(self)], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]


def runs() -> list[TemporalRun]:
    """All rows, in the order of the table."""
    return [TemporalRun(*bits, label, options) for bits in BITS for label, options in ROWS.items()]
