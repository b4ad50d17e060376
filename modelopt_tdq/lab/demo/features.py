"""What the demo says of the temporal features of one quantized model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.metrics import json_number
from modelopt_tdq.lab.features import compute_features
from modelopt_tdq.lab.judge import Reference, held_out_sqnr
from modelopt_tdq.temporal_features.errors import relative_squared_error
from modelopt_tdq.temporal_features.report import COLUMNS, MEASURED, temporal_report
from modelopt_tdq.temporal_features.runtime import feature_table, has_features, remove_features

__all__ = ["ERRORS", "feature_facts", "feature_tensors"]

#: Names of the arrays of errors begin so; a strategy follows.
ERRORS = "feature_error."


def _as_db(errors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """[F, K] dB."""
    return 10.0 * torch.stack([errors[name].double() for name in names]).log10().float()


def feature_tensors(full: nn.Module, model: nn.Module, times: Tensor) -> dict[str, Tensor]:
    """Errors of the temporal features of ``model`` in dB, [F, K] per strategy, for the heat maps.

    Args:
        full: In full precision.
        model: Quantized by the algorithm ``tdq_temporal``.
        times: [K] float32 ascending; those of the feature table, if there is one.
    """
    if not has_features(model):
        errors = relative_squared_error(compute_features(full, times), compute_features(model, times))
        return {f"{ERRORS}naive": _as_db(errors, list(errors))}
    table = feature_table(model)
    known = table.metadata["relative_squared_error"]
    return {
        f"{ERRORS}{what}": _as_db({n: torch.tensor(v) for n, v in known[what].items()}, list(table.features))
        for what in MEASURED
        if what in known
    }


def feature_facts(full: nn.Module, model: nn.Module, against: Reference) -> dict[str, Any]:
    """The selection as a table, and the SQNR that the model would have with exact features; plain data for JSON.

    Args:
        full: In full precision.
        model: Quantized by the algorithm ``tdq_temporal``.
        against: Full-precision trajectories.
    """
    if not has_features(model):
        names = list(compute_features(full, against.timesteps[:1].float()))
        return {"names": names, "columns": [], "rows": [], "notes": [], "sqnr_exact_db": None}
    report = temporal_report(model)
    return {
        "names": [row.layer for row in report.features],
        "columns": list(COLUMNS),
        "rows": [list(row.cells()) for row in report.features],
        "notes": report.notes(),
        "sqnr_exact_db": [json_number(value) for value in _with_exact_features(model, against)],
    }


def _with_exact_features(model: nn.Module, against: Reference) -> list[float]:
    """[S] dB: as :func:`modelopt_tdq.lab.judge.judge`, with the temporal layers in full precision."""
    exact = copy.deepcopy(model)
    remove_features(exact)
    return held_out_sqnr(exact, against)
