"""The end of NIPQ's noise."""

from __future__ import annotations

from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.training.learned import learned_quantizers

__all__ = ["stop_noise"]


def stop_noise(model: nn.Module) -> None:
    """From now on, a model that trains with NIPQ rounds; the last part of its training does.

    Raises:
        TdqError: No quantizer of the model uses NIPQ.
    """
    quantizers = [q for q in learned_quantizers(model).values() if q._scheme == "nipq"]
    if not quantizers:
        raise TdqError("model", type(model).__name__, "no quantizer of it trains with noise", 'Use scheme "nipq"')
    for quantizer in quantizers:
        quantizer._scheme = "nipq_rounding"
