"""Whether there are enough samples for what is to be learned."""

from __future__ import annotations

from typing import Any

import torch

from modelopt_tdq.errors import TdqError
from modelopt_tdq.reconstruction.config import TdqReconstructConfig
from modelopt_tdq.reconstruction.samples import Samples
from modelopt_tdq.schedule import row_index

__all__ = ["require_enough_samples"]


def require_enough_samples(
    samples: Samples, description: dict[str, Any], names: list[str], config: TdqReconstructConfig
) -> None:
    """Every learned interval needs a sample at one of its times; a smooth generator needs two times.

    Args:
        samples: Of the run.
        description: Of the source of the intervals.
        names: Of its quantizers.
        config: Of the run.

    Raises:
        TdqError: There are too few.
    """
    timesteps = torch.tensor(description["timesteps"], dtype=torch.float32)
    seen = torch.zeros(len(timesteps), dtype=torch.bool)
    seen[row_index(samples.times, timesteps)] = True
    bins = torch.tensor(description["bins"])
    missing = []
    for column, name in enumerate(names):
        own = bins[:, column]
        empty = sorted(set(own.tolist()) - set(own[seen].tolist()))
        if empty:
            missing.append((name, timesteps[own == empty[0]]))
    smooth = config.intervals in ("thin", "mlp") and len(timesteps) > 1
    if not missing and not (smooth and int(seen.sum()) < 2):
        return
    if missing:
        name, times = missing[0]
        problem = f"no sample for the interval of {name} at {_span(times)}, nor for those of {len(missing) - 1} others"
    else:
        problem = f"{config.intervals} intervals need samples at two times"
    raise TdqError(
        "samples",
        len(samples),
        f"a reconstruction without enough samples for its times: {problem}",
        f"Ask for {len(timesteps)} `samples` or more and record them in forward_loop, or learn fewer intervals: "
        '`bins`, or "intervals": "static"',
    )


def _span(times: torch.Tensor) -> str:
    low, high = float(times.min()), float(times.max())
    return f"time {low:g}" if low == high else f"times {low:g} to {high:g}"
