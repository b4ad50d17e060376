"""The option ``--maintenance``: what becomes of the temporal features of a model that is quantized by a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelopt_tdq.errors import TdqError

__all__ = ["MAINTENANCE", "check_maintenance", "schedule_times", "with_maintenance"]

#: "none": they are left as the recipe leaves them; the others as in
#: :class:`~modelopt_tdq.temporal_features.config.TdqTemporalConfig`.
MAINTENANCE = ("none", "naive", "tib", "cache", "auto")


def schedule_times(scheduler: Any, steps: Sequence[int]) -> list[float]:
    """All times that a scheduler visits with these numbers of steps, ascending."""
    times: set[float] = set()
    for count in steps:
        scheduler.set_timesteps(count)
        times |= {float(t) for t in scheduler.timesteps}
    return sorted(times)


def check_maintenance(maintenance: str) -> None:
    """Whether it is one of :data:`MAINTENANCE`.

    Raises:
        TdqError: It is not.
    """
    if maintenance not in MAINTENANCE:
        raise TdqError("maintenance", maintenance, "no such maintenance", f"Use one of {', '.join(MAINTENANCE)}")


def with_maintenance(config: dict[str, Any], maintenance: str, times: Sequence[float] | None = None) -> dict[str, Any]:
    """A config for ``mtq.quantize`` that maintains the temporal features, from one that calibrates.

    Args:
        config: From :func:`modelopt_tdq.recipe`; not changed.
        maintenance: One of :data:`MAINTENANCE`; with "none" the config stays what it is.
        times: To hold rows for, besides the calibrated ones.

    Raises:
        TdqError: There is no such maintenance, or the config's algorithm is another than "tdq" and "tdq_temporal".
    """
    check_maintenance(maintenance)
    if maintenance == "none":
        return config
    algorithm = config["algorithm"]
    if algorithm.get("method") not in ("tdq", "tdq_temporal"):
        raise TdqError(
            "maintenance",
            maintenance,
            f"the recipe's algorithm is {algorithm.get('method')!r}, which leaves the temporal features alone",
            'Use a recipe with method "tdq", or --maintenance none',
        )
    further = {} if times is None else {"times": list(times)}
    return {**config, "algorithm": {**algorithm, "method": "tdq_temporal", "maintenance": maintenance, **further}}
