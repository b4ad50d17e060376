"""How much a benchmark may cost: minutes on two CPU cores, or hours on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from modelopt_tdq.errors import TdqError

__all__ = ["BUDGETS", "Budget", "budget", "named"]

_Budget = TypeVar("_Budget")


@dataclass(frozen=True)
class Budget:
    """The same for every row of a table.

    Attributes:
        name: Of the budget.
        steps: Optimizer steps of QAT.
        batch: Images per step.
        lr: Learning rate, after a warm-up of a tenth of the steps, annealed to zero by cosine.
        calibration_samples: Trajectories to calibrate on.
        calibration_steps: DDIM steps of those.
        judged_samples: Trajectories for the SQNR of the noise prediction.
        judged_steps: DDIM steps of those, and of the images.
        loss_images: Test images on which the loss is measured.
        images: Generated for the Fréchet distance; 0: none.
        ema: Decay of the average of the weights that is judged; 0: the weights themselves.
        iterations: Of PTQ reconstruction, per block.
    """

    name: str
    steps: int
    batch: int
    lr: float
    calibration_samples: int
    calibration_steps: int
    judged_samples: int
    judged_steps: int
    loss_images: int
    images: int
    ema: float
    iterations: int


BUDGETS = {
    "smoke": Budget("smoke", 2, 4, 2e-4, 2, 4, 2, 4, 8, 0, 0.0, 4),
    "quick": Budget("quick", 100, 16, 1e-3, 8, 20, 8, 20, 1024, 0, 0.0, 60),
    "full": Budget("full", 20_000, 128, 2e-4, 64, 20, 64, 50, 10_000, 10_000, 0.9999, 5_000),
}


def budget(name: str) -> Budget:
    """The budget of that name; raises a TdqError if there is none."""
    return named(BUDGETS, name)


def named(budgets: Mapping[str, _Budget], name: str) -> _Budget:
    """One of several budgets.

    Raises:
        TdqError: There is none of that name.
    """
    if name not in budgets:
        raise TdqError("budget", name, "no such budget", f"Use one of {', '.join(budgets)}")
    return budgets[name]
