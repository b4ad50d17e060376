"""Configuration of the algorithms that learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from modelopt.torch.quantization.config import ModeloptField
from pydantic import model_validator

from modelopt_tdq.config import ALGORITHMS, CalibrationFields
from modelopt_tdq.errors import TdqError
from modelopt_tdq.intervals.dynamic import DYNAMIC

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LearningFields", "TdqQatConfig"]


class LearningFields(CalibrationFields):
    """What the learning algorithms add to calibration."""

    _rounds_itself: ClassVar[str | None] = "weights or their rounding are learned from the weights as they are"

    intervals: Literal[
        "mlp", "thin", "table", "static", "dynamic_absmax", "dynamic_statistics", "dynamic_statistics_time"
    ] = ModeloptField(
        default="mlp",
        title="What makes the interval of a time",
        description=(
            "mlp: the TDQ module; thin: a smaller one on the time itself; table: a learned value per interval of "
            "`bins`; static: one learned value; dynamic_*: measured on the activation, baselines that are not exported."
        ),
    )
    scheme: Literal["lsq", "pact", "nipq", "duq", "qil"] = ModeloptField(
        default="lsq", title="Activation quantization while training"
    )
    encoding: Literal["frequency", "random_fourier", "normalized", "raw"] | None = ModeloptField(
        default=None, title="How time enters the MLP; None: frequency for mlp, normalized for thin"
    )
    initialization: Literal["he", "xavier", "zero", "gaussian"] = ModeloptField(
        default="he", title="Of the MLP's hidden weights"
    )
    dropout: float = ModeloptField(default=0.2, ge=0.0, lt=1.0, title="Before the last layer of the MLP")
    learn_weights: bool = ModeloptField(default=True, title="Learn the scales of the weights too (LSQ)")
    rows: int | list[float] | None = ModeloptField(
        default=None, title="Times of the table: N is 0..N-1; None: the calibrated times"
    )
    seed: int = ModeloptField(default=0, title="Of the MLP's weights")
    protect_steps: bool = ModeloptField(default=False, title="Fall back to static scales per row, before learning")
    asymmetric: bool | Literal["auto"] = ModeloptField(
        default="auto", title="Shifted codes, as for outputs of SiLU: an offset that is a multiple of the scale"
    )

    @model_validator(mode="after")
    def _measured_intervals_have_no_scheme(self) -> Self:
        if self.intervals in DYNAMIC and self.scheme != "lsq":
            raise TdqError(
                "scheme", self.scheme, f"{self.intervals} intervals are measured, not learned", 'Use scheme "lsq"'
            )
        return self


class TdqQatConfig(LearningFields):
    """Algorithm ``{"method": "tdq_qat", ...}``: calibrate, then make the scales parameters for QAT."""

    method: Literal["tdq_qat"] = ModeloptField("tdq_qat")


ALGORITHMS["tdq_qat"] = TdqQatConfig
