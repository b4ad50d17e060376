"""Temporal features that were made before, for a model of the same weights."""

from __future__ import annotations

from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.temporal_features.checksum import block_checksum
from modelopt_tdq.temporal_features.runtime import feature_table, has_features, install_features, temporal_features
from modelopt_tdq.temporal_features.saved_state import describe_in_state
from modelopt_tdq.temporal_features.table import FeatureTable

__all__ = ["set_feature_table"]


def set_feature_table(model: nn.Module, table: FeatureTable) -> None:
    """Give a quantized model temporal features that were made before, for the same weights.

    Args:
        model: The module that ``mtq.quantize`` was called with.
        table: From :func:`feature_table` or ``FeatureTable.load``.

    Raises:
        TdqError: The table is for other layers, or for other weights. Nothing is changed then.
    """
    model = unwrapped(model)
    metadata = table.metadata
    missing_facts = [key for key in ("layers", "superseded", "checksum", "timestep_argument") if key not in metadata]
    if missing_facts:
        raise TdqError("metadata", missing_facts, "not in the table", "Use a table made by the tdq_temporal algorithm")
    modules = dict(model.named_modules())
    missing = [name for name in metadata["layers"] if name not in modules]
    if missing:
        raise TdqError("features", missing[:3], "the model has no such layers", "Use a table made for this model")
    freed = has_features(model) and temporal_features(model).description["freed"]
    if freed:
        own = feature_table(model).metadata.get("checksum")
    else:
        own = block_checksum(model, metadata["layers"], metadata.get("tensors", ()))
    if own != metadata["checksum"]:
        raise TdqError(
            "checksum",
            metadata["checksum"],
            f"the features were made from other weights than this model's ({own})",
            'Make them from this model, with {"method": "tdq_temporal"}',
        )
    superseded = {name: tuple(shape) for name, shape in metadata["superseded"].items()}
    features = install_features(model, table, superseded, str(metadata["timestep_argument"]))
    describe_in_state(model, features.description)
