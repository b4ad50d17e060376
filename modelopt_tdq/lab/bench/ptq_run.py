"""One row of Table 4: reconstruct on a few samples of the model's own trajectories, and judge on others."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from modelopt_tdq.config import make_config
from modelopt_tdq.core.metrics import json_numbers
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.budget import Budget
from modelopt_tdq.lab.bench.qat_run import Data, judged
from modelopt_tdq.lab.judge import Reference
from modelopt_tdq.lab.trajectories import calibration_loop
from modelopt_tdq.model.model_table import scale_table

__all__ = ["PtqRun"]


@dataclass(frozen=True)
class PtqRun:
    """What distinguishes one reconstruction from another.

    Attributes:
        weight_bits: Of integers.
        activation_bits: Likewise.
        samples: Inputs of the model, with their times, that calibration and reconstruction see.
        seed: Of the trajectories and of the learning.
        options: Fields of :class:`modelopt_tdq.reconstruction.config.TdqReconstructConfig`.
    """

    weight_bits: int
    activation_bits: int
    samples: int
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def key(self, model: str, budget: Budget) -> str:
        """The same for runs that would give the same result."""
        what = json.dumps([model, asdict(budget), "ptq", asdict(self)], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def measure(
        self, model: nn.Module, sampler: Any, data: Data, budget: Budget, against: Reference, table: Path
    ) -> dict[str, Any]:
        """Reconstruct and judge; plain data for JSON. ``failed`` says why there were too few samples."""
        import modelopt.torch.quantization as mtq

        config = make_config(
            self.weight_bits,
            self.activation_bits,
            method="tdq_reconstruct",
            correction="none",  # the papers have none
            samples=self.samples,
            iterations=budget.iterations,
            seed=self.seed,
            progress=False,
            **self.options,
        )
        # no more times than samples: every time of the schedule is seen at least once
        loop = calibration_loop(sampler, self.samples, min(self.samples, budget.calibration_steps), self.seed)
        start = time.perf_counter()
        try:
            student = mtq.quantize(copy.deepcopy(model), config, loop)
        except TdqError as error:
            if error.field not in ("loss", "samples"):
                raise
            return {"failed": str(error), "run": asdict(self)}
        seconds = time.perf_counter() - start
        found = judged(student, sampler, data, budget, against)
        scale_table(student).save(table)
        return {**json_numbers(found), "train_seconds": round(seconds, 1), "run": asdict(self)}
