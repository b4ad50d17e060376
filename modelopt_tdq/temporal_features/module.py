"""TemporalFeatures: the module in the root of a model that holds its feature table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.intact import Intact, averaged, checksum
from modelopt_tdq.model.place import release
from modelopt_tdq.model.timestep import CurrentTimestep
from modelopt_tdq.temporal_features.feature import Feature
from modelopt_tdq.temporal_features.lookup import Outside, Rows, is_row, look_up
from modelopt_tdq.temporal_features.proof import Proof
from modelopt_tdq.temporal_features.table import FeatureTable

__all__ = ["FEATURES", "TemporalFeatures", "describe"]

#: Name, in the root of a model, of the module that holds its temporal features.
FEATURES = "tdq_features"

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}

#: Floating point arrays are kept as the bits of integers, which ``.half()`` and the like leave alone. Next to the type,
#: the bits of a NaN: what a restored module computes with until its state is loaded.
_STORED = {torch.float32: (torch.int32, 0x7FC00000), torch.float16: (torch.int16, 0x7E00), torch.int8: (torch.int8, 0)}


class TemporalFeatures(nn.Module):
    """The feature table of a model, as buffers of the module ``tdq_features`` in its root.

    Args:
        description: Everything but the numbers, as JSON knows it: ``timestep_argument``, ``outside``, ``rows`` (K),
            ``metadata``, ``features`` (a list of ``name``, ``shape`` per sample, ``dtype`` of what is stored,
            ``num_bits``, ``offset``: whether there is one), ``superseded`` (shape per sample, by name), ``freed``, and
            ``checksum``: whether there is one that tells when somebody has computed with the integers.

    Attributes:
        proofs: Of further kinds of calls, which were looked at since.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.description: dict[str, Any] = json.loads(json.dumps(description))
        self.outside: Outside = self.description["outside"]
        rows = int(self.description["rows"])
        self._register("times", (rows,), torch.float32)
        for index, entry in enumerate(self.description["features"]):
            dtype = _DTYPES[entry["dtype"]]
            self._register(f"data_{index}", (rows, *entry["shape"]), dtype)
            if dtype == torch.int8:
                self._register(f"scale_{index}", (rows,), torch.float32)
            if entry["offset"]:
                self._register(f"offset_{index}", (rows,), torch.float32)
        if self.description.get("checksum"):
            self.register_buffer("checksum", checksum(self._numbers()))
        self._intact = Intact()
        self._timestep: CurrentTimestep | None = None
        self._decided: tuple[Tensor, bool] | None = None
        self.proofs: list[Proof] = []
        self._checked_at: Tensor | None = None

    def _register(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        stored, value = _STORED[dtype]
        self.register_buffer(name, torch.full(shape, value, dtype=stored))

    def fill(self, table: FeatureTable) -> None:
        """Take the numbers of a table that fits the description."""
        self._set("times", table.timesteps)
        for index, feature in enumerate(table.features.values()):
            for name, value in zip(("data", "scale", "offset"), feature.rows, strict=True):
                if value is not None:
                    self._set(f"{name}_{index}", value)

        if self.description.get("checksum"):
            cast("Tensor", self._buffers["checksum"]).copy_(checksum(self._numbers()))

    def _numbers(self) -> list[Tensor]:
        return [cast("Tensor", buffer) for name, buffer in self._buffers.items() if name != "checksum"]

    def _require_intact(self) -> None:
        expected = self._buffers.get("checksum")
        if expected is not None and not self._intact(self._numbers(), expected) and not self.awaits_state:
            raise averaged("model", FEATURES, "its temporal features")

    def _set(self, name: str, value: Tensor) -> None:
        buffer = cast("Tensor", self._buffers[name])
        buffer.copy_(value.view(buffer.dtype))

    def _floats(self, name: str) -> Tensor | None:
        bits = self._buffers.get(name)
        if bits is not None and bits.is_meta:
            release(self)
            bits = self._buffers[name]
        if bits is None or bits.dtype == torch.int8:
            return bits
        return bits.view(torch.float16 if bits.dtype == torch.int16 else torch.float32)

    @property
    def timesteps(self) -> Tensor:
        """[K] float32, strictly ascending, in the model's own units."""
        return cast("Tensor", self._floats("times"))

    def rows(self, index: int) -> Rows:
        """[K, ...] of one feature."""
        data = cast("Tensor", self._floats(f"data_{index}"))
        return Rows(data, self._floats(f"scale_{index}"), self._floats(f"offset_{index}"))

    @property
    def awaits_state(self) -> bool:
        """Whether it was restored, and the state dict is still to be loaded."""
        arrays = [self._floats(name) for name in self._buffers if name != "checksum"]
        return any(a is not None and (a.is_meta or (a.is_floating_point() and bool(a.isnan().any()))) for a in arrays)

    def time(self, device: torch.device) -> Tensor:
        """[1] or [B] float32: the time of the call in progress.

        Raises:
            TdqError: The model was never called, or somebody has computed with the bits of the features.
        """
        if self._timestep is None:
            raise TdqError(
                "timestep", None, "nothing delivers the time to the features", "Call install_features on the model"
            )
        time = self._timestep.require()
        if not torch.compiler.is_compiling() and self._checked_at is not self._timestep.value:
            self._require_intact()
            self._checked_at = self._timestep.value
        return time.to(device)

    def covers(self, time: Tensor) -> bool:
        """Whether every time of the call is a row; looked at once per call."""
        current = None if self._timestep is None else self._timestep.value
        if self._decided is None or self._decided[0] is not current or current is None:
            covered = bool(is_row(time, self.timesteps.to(time.device)).all())
            self._decided = None if current is None else (current, covered)
            return covered
        return self._decided[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decided": None, "_checked_at": None}

    def look_up(self, index: int, time: Tensor) -> Tensor:
        """[T, ...] float32: one feature at times [T]."""
        rows = Rows(*(None if a is None else a.to(time.device) for a in self.rows(index)))  # type: ignore[arg-type]
        return look_up(rows, self.timesteps.to(time.device), time, self.outside)

    def table(self) -> FeatureTable:
        """The features, copied to the CPU.

        Raises:
            TdqError: The module was restored, and its state was not loaded; or somebody has computed with its bits.
        """
        if self.awaits_state:
            raise TdqError(
                "model",
                FEATURES,
                "its temporal features were restored, but their values were not loaded",
                "Load the state dict that was saved with the ModelOpt state",
            )
        self._require_intact()
        features = {}
        for index, entry in enumerate(self.description["features"]):
            data, scale, offset = self.rows(index)
            coded = entry["num_bits"] is not None
            features[entry["name"]] = Feature(
                None if coded else data, data if coded else None, scale, offset, entry["num_bits"]
            )
        return FeatureTable(self.timesteps, features, self.outside, self.description["metadata"])

    def extra_repr(self) -> str:
        """How many features at how many times."""
        return f"features={len(self.description['features'])}, rows={len(self.timesteps)}, outside={self.outside}"


def describe(table: FeatureTable, superseded: Mapping[str, tuple[int, ...]], timestep_argument: str) -> dict[str, Any]:
    """What :class:`TemporalFeatures` is built from.

    Raises:
        TdqError: The table's metadata cannot be written as JSON.
    """
    description = {
        "timestep_argument": timestep_argument,
        "outside": table.outside,
        "rows": len(table),
        "metadata": dict(table.metadata),
        "features": [
            {
                "name": name,
                "shape": list(feature.row_shape),
                "dtype": str(feature.rows.data.dtype).removeprefix("torch."),
                "num_bits": feature.num_bits,
                "offset": feature.offset is not None,
            }
            for name, feature in table.features.items()
        ],
        "superseded": {name: list(shape) for name, shape in superseded.items()},
        "freed": False,
        "checksum": True,
    }
    try:
        json.dumps(description)
    except (TypeError, ValueError) as error:
        problem = f"cannot be written as JSON ({error})"
        raise TdqError("metadata", table.metadata, problem, "Use plain numbers, strings and lists") from error
    return description
