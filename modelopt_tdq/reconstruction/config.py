"""Configuration of the algorithm ``tdq_reconstruct``."""

from __future__ import annotations

from typing import Literal

from modelopt.torch.quantization.config import ModeloptField

from modelopt_tdq.config import ALGORITHMS, CorrectionFields
from modelopt_tdq.training.config import LearningFields

__all__ = ["TdqReconstructConfig"]


class TdqReconstructConfig(LearningFields, CorrectionFields):
    """Algorithm ``{"method": "tdq_reconstruct", ...}``: calibrate, then learn rounding and intervals block by block.

    The papers run 20000 iterations per block, on a GPU. The defaults take minutes on a CPU for a small model.
    """

    method: Literal["tdq_reconstruct"] = ModeloptField("tdq_reconstruct")
    intervals: Literal["thin", "mlp", "table", "static"] = ModeloptField(
        default="thin",
        title="What makes the interval of a time",
        description=(
            "thin: a small MLP on the time; mlp: the TDQ module, which overfits few samples; table: a learned value "
            "per interval of `bins`; static: one learned value."
        ),
    )
    learn_weights: Literal[False] = ModeloptField(
        default=False, title="Scales of the weights stay as calibrated; their rounding is learned (`learn_rounding`)"
    )
    samples: int = ModeloptField(default=256, ge=1, title="Recorded samples, spread evenly over the times")
    iterations: int = ModeloptField(default=1000, ge=1, title="Optimizer steps per block")
    batch_size: int = ModeloptField(default=16, ge=1, title="Samples per step, and per call of the model")
    learn_rounding: bool = ModeloptField(default=True, title="AdaRound on integer weights; False: intervals alone")
    rounding_lr: float | None = ModeloptField(
        default=None, gt=0.0, title="Adam, for the rounding; None: 20 / iterations, between 0.001 and 0.02"
    )
    interval_lr: float | None = ModeloptField(
        default=None,
        gt=0.0,
        title="Adam, for the intervals; falls to 0 linearly",
        description=(
            "Of tables, a fraction of the interval. None: 0.002 for tables; for the MLPs, whose last layer starts at "
            "zero, 2 / iterations, between 0.0005 and 0.01."
        ),
    )
    rounding_weight: float = ModeloptField(
        default=0.01,
        ge=0.0,
        title="Of the rounding regularisation",
        description="The error that it is added to counts in units of the calibrated block's error.",
    )
    warm_up: float = ModeloptField(default=0.2, ge=0.0, lt=1.0, title="Fraction of the steps without regularisation")
    beta_start: float = ModeloptField(default=20.0, gt=0.0, title="Exponent of the regularisation after the warm-up")
    beta_end: float = ModeloptField(default=2.0, gt=0.0, title="Exponent of the regularisation at the end")
    qdrop: float = ModeloptField(
        default=0.0, ge=0.0, le=1.0, title="Probability that an activation stays in full precision while learning"
    )
    memory_limit: int = ModeloptField(
        default=2 << 30,
        ge=1,
        title="Bytes",
        description="Most that recorded inputs and targets of a block may occupy; beyond it, they come in chunks.",
    )
    cache_dir: str | None = ModeloptField(
        default=None,
        title="Folder for finished blocks, to resume from, and for chunks",
        description="Without one, nothing can be resumed, and chunks are computed again each time.",
    )


ALGORITHMS["tdq_reconstruct"] = TdqReconstructConfig
