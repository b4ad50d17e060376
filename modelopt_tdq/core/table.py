"""ScaleTable: what every way of learning ends in, and every way of deploying starts from."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.core.files import read_table, write_table
from modelopt_tdq.core.scales import Scales
from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.errors import TdqError

__all__ = ["SCHEMA_VERSION", "ScaleTable", "new_schedule", "number_format", "own_floats"]

#: The newest that is read. Version 2 is version 1 with the array ``dequant_offset``; tables without it are version 1.
SCHEMA_VERSION = 2

_ARRAYS = ("timesteps", "scale", "offset", "dequant_scale", "dequant_offset")


@dataclass(frozen=True, eq=False)
class ScaleTable:
    """Scales of Q activation quantizers at K times.

    Attributes:
        timesteps: [K] float32, strictly ascending, in the model's own time units.
        scale: [K, Q] float32, positive.
        names: [Q] names of the quantizers, as in ``model.named_modules()``.
        offset: [K, Q] float32, what is subtracted before dividing; None if it is 0 for all quantizers.
        dequant_scale: [K, Q] float32, the scale that turns codes back into values; None if it is ``scale``, and
            the offset is ``offset``, for all quantizers.
        metadata: JSON-serialisable facts about where the table comes from.
        dequant_offset: [K, Q] float32, the value of code 0, in a table with ``dequant_scale``; None if it is 0 for
            all quantizers. A quantizer that dequantizes as it quantizes has its ``scale`` and ``offset`` here again.

    Raises:
        TdqError: A shape does not fit, times are unsorted, a value is NaN or infinite, a scale is not positive,
            or there is a ``dequant_offset`` without a ``dequant_scale``.
    """

    timesteps: Tensor
    scale: Tensor
    names: Sequence[str]
    offset: Tensor | None = None
    dequant_scale: Tensor | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dequant_offset: Tensor | None = None

    def __str__(self) -> str:
        """In a line: how many quantizers, at how many times, and how many of them follow the time."""
        following = int((~self.is_static).sum())
        times = f"{len(self)} times, {self.timesteps[0]:g} to {self.timesteps[-1]:g}" if len(self) > 1 else "one time"
        return f"ScaleTable of {len(self.names)} quantizers at {times}; {following} follow the time"

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, own_floats(name, value))
        object.__setattr__(self, "names", tuple(self.names))
        self._validate()

    def _validate(self) -> None:
        if self.timesteps.dim() != 1 or self.timesteps.numel() == 0:
            raise TdqError(
                "timesteps", tuple(self.timesteps.shape), "not of shape [K], K >= 1", "Pass one time per row"
            )
        if not all(isinstance(name, str) for name in self.names):
            raise TdqError("names", self.names, "not names of quantizers", "Pass one string per column")
        if len(set(self.names)) != len(self.names):
            raise TdqError("names", self.names, "a quantizer is named twice", "Name each quantizer once")
        expected = (self.timesteps.numel(), len(self.names))
        for name in _ARRAYS:
            value = getattr(self, name)
            if value is None:
                continue
            if name != "timesteps" and tuple(value.shape) != expected:
                raise TdqError(
                    name,
                    tuple(value.shape),
                    f"not of shape [K, Q] = {expected}",
                    "Pass one row per time, one column per name",
                )
            if not torch.isfinite(value).all():
                raise TdqError(
                    name, value[~torch.isfinite(value)], "holds NaN or infinity", "Calibrate again on finite data"
                )
            if "scale" in name and not (value > 0).all():
                raise TdqError(name, value[value <= 0], "a scale is not positive", "Use scales above zero")
        if self.dequant_offset is not None and self.dequant_scale is None:
            raise TdqError(
                "dequant_offset",
                tuple(self.dequant_offset.shape),
                "given without a dequant_scale",
                "Pass both, or neither: codes are then turned back by scale and offset",
            )
        if not (self.timesteps[1:] > self.timesteps[:-1]).all():
            raise TdqError(
                "timesteps", self.timesteps.tolist(), "not strictly ascending", "Sort the rows by time, each time once"
            )

    def __len__(self) -> int:
        return self.timesteps.numel()

    @property
    def is_static(self) -> Tensor:
        """[Q] bool: the quantizers whose rows are all the same, which deploy as plain static ones."""
        static = (self.scale == self.scale[:1]).all(0)
        for other in (self.offset, self.dequant_scale, self.dequant_offset):
            if other is not None:
                static &= (other == other[:1]).all(0)
        return static

    def column(self, index: int) -> Scales:
        """[K] rows of one quantizer, without what is 0 or the same for both directions."""
        arrays = Scales(self.scale, self.offset, self.dequant_scale, self.dequant_offset)
        return arrays.map(lambda value: value[:, index]).simplified()

    def _arrays(self) -> dict[str, Tensor]:
        """Those of shape [K, Q] that are there."""
        return {name: value for name in _ARRAYS[1:] if (value := getattr(self, name)) is not None}

    def resample(self, timesteps: Tensor | Sequence[float]) -> ScaleTable:
        """The table for another schedule: each new row is the one that the lookup would have taken.

        Args:
            timesteps: [K'] in the same units, any order.
        """
        times = new_schedule(timesteps)
        rows = row_index(times, self.timesteps)

        picked: dict[str, Any] = {name: value[rows] for name, value in self._arrays().items()}
        return replace(self, **{**picked, "timesteps": times, "metadata": dict(self.metadata)})

    def require_names(self, names: Collection[str], owner: str, cure: str) -> None:
        """Raise a TdqError unless the table has these quantizers, of ``owner`` ("model", "engine"), and no others."""
        unknown, missing = set(self.names) - set(names), set(names) - set(self.names)
        if unknown or missing:
            raise TdqError(
                "names",
                sorted(unknown or missing),
                f"the {owner} has no such quantizers"
                if unknown
                else f"the table lacks these quantizers of the {owner}",
                cure,
            )

    def require_formats(self, formats: Mapping[str, Any], owner: str, cure: str) -> None:
        """Raise a TdqError unless the table was made for these number formats, of quantizers of ``owner`` by name.

        A table that does not say what it was made for is taken for any.
        """
        known = self.metadata.get("num_bits", {})
        for name, wanted in formats.items():
            made_for = known.get(name, wanted)
            if number_format(made_for) != number_format(wanted):
                problem = f"the table was made for this format, but {name} of the {owner} has {number_format(wanted)}"
                raise TdqError("num_bits", made_for, problem, cure)

    def require_divisors(self, divisors: Mapping[str, int], names: Collection[str], owner: str) -> None:
        """Raise a TdqError unless the channels of the same quantizers of ``owner`` are divided by the same numbers.

        A table that no model made says nothing of them, and passes.

        Args:
            divisors: A checksum for each quantizer whose channels are divided.
            names: The quantizers that matter.
            owner: "model" or "engine".
        """
        if "num_bits" not in self.metadata:
            return
        own = self.metadata.get("channel_divisors", {})
        for name in names:
            if own.get(name) != divisors.get(name):
                raise TdqError(
                    "channel_smoothing",
                    name,
                    f"its scales are those of other channels: the {owner} divides them by other numbers",
                    f"Use the table of the calibration that smoothed the channels of this {owner}",
                )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: the arrays, and in its metadata names, schema version, checksum.

        A file that is there already is replaced when the new one is complete.

        Returns:
            Its path.

        Raises:
            TdqError: ``metadata`` cannot be written as JSON, or ``path`` names no file.
        """
        return write_table(
            path,
            "ScaleTable",
            1 if self.dequant_offset is None else 2,
            {"timesteps": self.timesteps, **self._arrays()},
            {"names": list(self.names)},
            self.metadata,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScaleTable:
        """Read a table written by :meth:`save`, also one of the two files of earlier versions.

        Raises:
            TdqError: The file is missing or no table, the schema is newer, the checksum or the content is wrong.
        """

        def make(description: dict[str, Any], metadata: dict[str, Any], arrays: dict[str, Tensor]) -> ScaleTable:
            return cls(
                arrays["timesteps"],
                arrays["scale"],
                tuple(description["names"]),
                arrays.get("offset"),
                arrays.get("dequant_scale"),
                metadata,
                arrays.get("dequant_offset"),
            )

        return read_table(path, "ScaleTable", "scale table", SCHEMA_VERSION, ("names",), make)


def number_format(bits: Any) -> Any:
    """Bits of an integer, or (exponent, mantissa): JSON has no tuples."""
    return tuple(bits) if isinstance(bits, (list, tuple)) else bits


def new_schedule(timesteps: Tensor | Sequence[float]) -> Tensor:
    """[K'] ascending, each time once, of times in any order to resample a table at.

    Raises:
        TdqError: There are none, or one is not finite.
    """
    times: Tensor = torch.unique(torch.as_tensor(timesteps, dtype=torch.float32))
    if times.numel() == 0 or not torch.isfinite(times).all():
        raise TdqError("timesteps", timesteps, "empty or not finite", "Pass the times of the new schedule")
    return times


def own_floats(name: str, value: Any) -> Tensor:
    """A float32 copy on the CPU, which nobody else can change."""
    try:
        return torch.as_tensor(value).detach().to("cpu", torch.float32).clone().contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TdqError(name, value, f"not an array of numbers ({error})", "Pass a tensor") from error
