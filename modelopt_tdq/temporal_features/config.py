"""Configuration of the algorithm ``tdq_temporal``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from modelopt.torch.quantization.config import ModeloptField
from pydantic import model_validator

from modelopt_tdq.config import ALGORITHMS, CalibrationFields, CorrectionFields
from modelopt_tdq.core.fake_quant import SUPPORTED_BITS
from modelopt_tdq.errors import TdqError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["STRATEGIES", "Strategy", "TdqTemporalConfig"]

Strategy = Literal["naive", "tib", "cache"]

#: What can become of one temporal feature, cheapest graph first; "naive" is the baseline.
STRATEGIES: tuple[Strategy, ...] = ("cache", "tib", "naive")


class TdqTemporalConfig(CalibrationFields, CorrectionFields):
    """Algorithm ``{"method": "tdq_temporal", ...}``: calibrate, and maintain the temporal features.

    All layers whose outputs depend on the time alone are quantized, whatever the rules of ``quant_cfg`` say of them,
    and what they give becomes a table with a row per time. The others are rounded and corrected as ``tdq`` does it,
    unless their scales are kept.
    """

    method: Literal["tdq_temporal"] = ModeloptField("tdq_temporal")
    maintenance: Literal["auto", "tib", "cache", "naive"] = ModeloptField(
        default="auto",
        title="What becomes of the temporal features (Temporal Feature Matters, section 4)",
        description=(
            "tib: the temporal block is quantized with a scale and zero point per time, and its weights' rounding "
            "learned as one unit; cache: the full-precision features are stored quantized; auto: whichever has the "
            "smaller error, block by block; naive: quantized like any other layer, the baseline."
        ),
    )
    granularity: Literal["block", "step"] = ModeloptField(
        default="block", title="`auto` decides per feature, or per feature and time"
    )
    choose: dict[str, Literal["tib", "cache"]] = ModeloptField(
        default={}, title="By hand: globs over features, each with its strategy; the last that matches counts"
    )
    cache_bits: int | None = ModeloptField(
        default=None, title="Of cached features: 2 to 8, or 16 or 32 for floats; None: those of the activations"
    )
    features: list[str] = ModeloptField(
        default=["*"], title="Globs over layers: which temporal features are maintained; the others' layers stay"
    )
    times: list[float] | None = ModeloptField(
        default=None,
        title="Times to hold rows for, besides the calibrated ones: those of the schedules that will be sampled with",
    )
    outside: Literal["nearest", "linear", "exact"] = ModeloptField(
        default="linear",
        title="For a time that is no row",
        description=(
            "The nearest row; interpolation between the neighbouring rows; exact: the layers themselves, which then "
            "stay in the model and in the exported graph."
        ),
    )
    keep_layers: bool = ModeloptField(
        default=True, title="False: the weights of the temporal block are dropped; the table is all that is left"
    )
    recalibrate: bool = ModeloptField(
        default=True, title="False: the other layers keep the scales they have, after another algorithm"
    )
    temporal_weight_bits: int | list[int] | None = ModeloptField(
        default=None, title="Of the temporal block; None: as most other weights"
    )
    temporal_activation_bits: int | list[int] | None = ModeloptField(
        default=None, title="Likewise; None: as most other activations"
    )
    iterations: int = ModeloptField(default=1000, ge=0, title="Optimizer steps of the TIB reconstruction; 0: none")
    rounding_weight: float = ModeloptField(default=0.01, ge=0.0, title="Of the rounding regularisation")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.cache_bits is not None and self.cache_bits not in (*range(2, 9), 16, 32):
            raise TdqError("cache_bits", self.cache_bits, "no format of a cache", "Use 2 to 8, 16 or 32")
        if self.maintenance == "naive" and self.choose:
            raise TdqError(
                "choose", self.choose, 'with maintenance="naive" there is nothing to choose', 'Use maintenance="auto"'
            )
        if self.outside == "exact" and not self.keep_layers:
            raise TdqError(
                "outside",
                self.outside,
                "the layers compute what is not cached, and keep_layers=False drops them",
                'Use outside="linear" or "nearest", or keep the layers',
            )
        for name in ("temporal_weight_bits", "temporal_activation_bits"):
            bits: Any = getattr(self, name)
            bits = tuple(bits) if isinstance(bits, list) else bits
            if bits is not None and bits not in SUPPORTED_BITS:
                raise TdqError(name, bits, "no supported number format", f"Use one of {SUPPORTED_BITS}")
        return self


ALGORITHMS["tdq_temporal"] = TdqTemporalConfig
