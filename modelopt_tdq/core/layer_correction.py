"""LayerCorrection: what is multiplied with, and added to, the outputs of quantized layers, over time."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from modelopt_tdq.core.files import read_table, write_table
from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.core.table import new_schedule, own_floats
from modelopt_tdq.errors import TdqError

__all__ = ["LayerCorrection"]

_SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class LayerCorrection:
    """y <- gain * y + bias for each output channel of L layers, with gain and bias of the row of the time.

    Quantization changes mean and amplitude of the channels that a layer gives. What it changes on average is taken back
    (bias correction, Nagel et al. 2019, here with gains, and over time). A time takes the row that it takes of a
    :class:`~modelopt_tdq.ScaleTable` with these ``timesteps``.

    Attributes:
        timesteps: [K] float32, strictly ascending, in the model's own time units.
        gain: [K, C] float32, positive, by name of the layer as in ``model.named_modules()``; [1, C] where it does not
            depend on time.
        bias: Of the same names and shapes.
        metadata: JSON-serialisable facts about where the corrections come from.

    Raises:
        TdqError: Names or shapes do not fit, times are unsorted, a value is NaN or infinite, or a gain not positive.
    """

    timesteps: Tensor
    gain: Mapping[str, Tensor]
    bias: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", own_floats("timesteps", self.timesteps))
        for name in ("gain", "bias"):
            rows = {layer: own_floats(name, value) for layer, value in getattr(self, name).items()}
            object.__setattr__(self, name, rows)
        self._validate()

    def _validate(self) -> None:
        times = self.timesteps
        if times.dim() != 1 or times.numel() == 0 or not bool(times.isfinite().all()):
            raise TdqError("timesteps", times, "not finite times [K], K >= 1", "Pass one time per row")
        if not bool((times[1:] > times[:-1]).all()):
            raise TdqError("timesteps", times.tolist(), "not strictly ascending", "Sort the rows by time")
        if self.gain.keys() != self.bias.keys():
            odd = sorted(self.gain.keys() ^ self.bias.keys())
            raise TdqError("bias", odd, "these layers have a gain or a bias, not both", "Use a gain of 1, a bias of 0")
        for layer, gain in self.gain.items():
            bias = self.bias[layer]
            if (
                gain.dim() != 2
                or gain.shape[0] not in (1, len(times))
                or gain.shape[1] == 0
                or gain.shape != bias.shape
            ):
                raise TdqError(
                    "gain",
                    (tuple(gain.shape), tuple(bias.shape)),
                    f"gain and bias of {layer} are not both [K, C] or [1, C], with K = {len(times)}",
                    "Pass a row per time, a number per output channel of the layer",
                )
            for name, value in (("gain", gain), ("bias", bias)):
                if not bool(value.isfinite().all()):
                    raise TdqError(name, layer, "holds NaN or infinity", "Fit it again, on finite data")
            if not bool((gain > 0).all()):
                raise TdqError("gain", layer, "a gain is not positive", "Use gains above zero; 1 changes nothing")

    def __len__(self) -> int:
        return self.timesteps.numel()

    @property
    def names(self) -> tuple[str, ...]:
        """[L] the layers."""
        return tuple(self.gain)

    @property
    def nbytes(self) -> int:
        """Of gains and biases, as float32."""
        return sum(8 * gain.numel() for gain in self.gain.values())

    def only(self, names: Collection[str]) -> LayerCorrection:
        """That of these layers."""
        gain, bias = ({n: v for n, v in rows.items() if n in names} for rows in (self.gain, self.bias))
        return replace(self, gain=gain, bias=bias)

    def resample(self, timesteps: Tensor | Sequence[float]) -> LayerCorrection:
        """For another schedule: each new row is the one that the lookup would have taken.

        Args:
            timesteps: [K'] in the same units, any order.
        """
        times = new_schedule(timesteps)
        rows = row_index(times, self.timesteps)
        gain, bias = (
            {name: value if len(value) == 1 else value[rows] for name, value in values.items()}
            for values in (self.gain, self.bias)
        )
        return replace(self, timesteps=times, gain=gain, bias=bias)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: the arrays, and in its metadata names, schema version, checksum.

        Returns:
            Its path.

        Raises:
            TdqError: ``metadata`` cannot be written as JSON, or ``path`` names no file.
        """
        arrays = {"timesteps": self.timesteps}
        for number, name in enumerate(self.names):
            arrays |= {f"gain.{number}": self.gain[name], f"bias.{number}": self.bias[name]}
        names = {"names": list(self.names)}
        return write_table(path, "LayerCorrection", _SCHEMA_VERSION, arrays, names, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerCorrection:
        """Read what :meth:`save` wrote.

        Raises:
            TdqError: The file is missing or something else, the schema is newer, the checksum or the content is wrong.
        """

        def make(description: dict[str, Any], metadata: dict[str, Any], arrays: dict[str, Tensor]) -> LayerCorrection:
            gain, bias = (
                {str(name): arrays[f"{kind}.{number}"] for number, name in enumerate(description["names"])}
                for kind in ("gain", "bias")
            )
            return cls(arrays["timesteps"], gain, bias, metadata)

        return read_table(path, "LayerCorrection", "layer correction", _SCHEMA_VERSION, ("names",), make)
