"""FeatureTable: the outputs of layers that depend on the time alone, at the calibrated times.

The cache of "cache-based maintenance" (*Temporal Feature Matters*, section on cache-based maintenance): at run time a
feature is looked up, and the layers that would compute it need not be there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.core.files import read_table, write_table
from modelopt_tdq.errors import TdqError
from modelopt_tdq.temporal_features.feature import ARRAYS, Feature, own_array
from modelopt_tdq.temporal_features.lookup import OUTSIDE, Outside, is_row, look_up

__all__ = ["SCHEMA_VERSION", "Feature", "FeatureTable"]

#: The newest that is read.
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Temporal features of a model, at K times.

    Attributes:
        timesteps: [K] float32, strictly ascending, in the model's own time units.
        features: By the name of the layer that makes them, as in ``model.named_modules()``; the order is kept.
        outside: What a time gets that is no row. "nearest": the nearest row, by the rule of the scale table
            (:func:`modelopt_tdq.core.schedule.row_index`). "linear": the line between its two neighbours, in float32,
            and the end row outside of the table. "exact": the model's own layers compute it.
        metadata: JSON-serialisable facts: "checksum" of the weights that made the features, "strategy" by layer,
            "timestep_argument", and so on.

    Raises:
        TdqError: A shape does not fit, times are unsorted, or a value is NaN or infinite; names the feature and the
            time.
    """

    timesteps: Tensor
    features: Mapping[str, Feature]
    outside: Outside = "nearest"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        times = own_array("timesteps", self.timesteps).to(torch.float32)
        object.__setattr__(self, "timesteps", times)
        object.__setattr__(self, "features", dict(self.features))
        if times.dim() != 1 or times.numel() == 0:
            raise TdqError("timesteps", tuple(times.shape), "not of shape [K], K >= 1", "Pass one time per row")
        if not torch.isfinite(times).all():
            raise TdqError("timesteps", times.tolist(), "holds NaN or infinity", "Pass the times of the model")
        if not (times[1:] > times[:-1]).all():
            raise TdqError("timesteps", times.tolist(), "not strictly ascending", "Sort the rows by time")
        if self.outside not in OUTSIDE:
            raise TdqError("outside", self.outside, "no such policy", f"Use one of {', '.join(OUTSIDE)}")
        if not self.features:
            raise TdqError("features", {}, "a table of nothing", "Name at least one layer")
        for name, feature in self.features.items():
            self._validate(name, feature)

    def _validate(self, name: str, feature: Feature) -> None:
        if not isinstance(name, str) or not name or not isinstance(feature, Feature):
            raise TdqError("features", name, "not a layer's name with its Feature", "Pass {name: Feature(...)}")
        if len(feature) != len(self.timesteps):
            problem = f"it has {len(feature)} rows, and there are {len(self.timesteps)} times"
            raise TdqError("features", name, problem, "Pass one row per time")
        for array in feature.arrays().values():
            if array.is_floating_point() and not torch.isfinite(array).all():
                bad = ~torch.isfinite(array).reshape(len(feature), -1).all(1)
                raise TdqError(
                    "features",
                    name,
                    f"NaN or infinity at time {float(self.timesteps[bad][0]):g}",
                    "Compute the features again from finite weights",
                )

    def __len__(self) -> int:
        return self.timesteps.numel()

    def contains(self, time: Tensor) -> Tensor:
        """[B] bool: which times [B] are rows, as float32 numbers."""
        return is_row(torch.as_tensor(time).reshape(-1), self.timesteps)

    def lookup(self, name: str, time: Tensor) -> Tensor:
        """One feature at some times.

        Args:
            name: Of the layer.
            time: [B] or [], any real dtype, in the model's own units.

        Returns:
            [B, ...] float32.

        Raises:
            TdqError: No such feature; or the policy is "exact", and a time is no row.
        """
        if name not in self.features:
            raise TdqError("name", name, "no such feature", f"There are {', '.join(self.features)}")
        time = torch.as_tensor(time).reshape(-1)
        if self.outside == "exact" and not bool(self.contains(time).all()):
            missing = time[~self.contains(time)].tolist()
            raise TdqError("time", missing, 'no rows, and with "exact" the model computes them', "Ask the model")
        return look_up(self.features[name].rows, self.timesteps, time, self.outside)

    @property
    def nbytes(self) -> int:
        """Bytes of the deployed form; a code takes one byte, below 8 bits too."""
        return self.timesteps.nbytes + sum(feature.nbytes for feature in self.features.values())

    @property
    def packed_nbytes(self) -> int:
        """Bytes with codes of less than 8 bits packed; see :attr:`Feature.packed_nbytes`."""
        return self.timesteps.nbytes + sum(feature.packed_nbytes for feature in self.features.values())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file: the arrays, and in its metadata names, policy, schema version, checksum.

        A file that is there already is replaced when the new one is complete.

        Returns:
            Its path.

        Raises:
            TdqError: ``metadata`` cannot be written as JSON, or ``path`` names no file.
        """
        arrays = {"timesteps": self.timesteps}
        for index, feature in enumerate(self.features.values()):
            arrays |= {f"{index}/{name}": value for name, value in feature.arrays().items()}
        fields = {
            "outside": self.outside,
            "features": [{"name": name, "num_bits": feature.num_bits} for name, feature in self.features.items()],
        }
        return write_table(path, "FeatureTable", SCHEMA_VERSION, arrays, fields, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureTable:
        """Read a table written by :meth:`save`, also one of the two files of earlier versions.

        Raises:
            TdqError: The file is missing or no table, the schema is newer, the checksum or the content is wrong.
        """

        def make(description: dict[str, Any], metadata: dict[str, Any], arrays: dict[str, Tensor]) -> FeatureTable:
            features = {}
            for index, entry in enumerate(description["features"]):
                own = {name: arrays[key] for name in ARRAYS if (key := f"{index}/{name}") in arrays}
                features[str(entry["name"])] = Feature(**own, num_bits=entry["num_bits"])
            return cls(arrays["timesteps"], features, description["outside"], metadata)

        return read_table(path, "FeatureTable", "feature table", SCHEMA_VERSION, ("features", "outside"), make)
