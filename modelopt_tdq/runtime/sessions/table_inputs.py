"""The table of an engine that takes it as an input: held on the device, replaced without a rebuild."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.table import ScaleTable
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.table_input import EDGES_INPUT, TABLE_INPUT, engine_table
from modelopt_tdq.runtime.build.report import EngineReport

__all__ = ["TABLE_INPUTS", "table_tensors"]

#: The inputs of an engine that are its table.
TABLE_INPUTS = (TABLE_INPUT, EDGES_INPUT)


def table_tensors(table: ScaleTable | nn.Module | Mapping[str, Any], report: EngineReport | None) -> dict[str, Tensor]:
    """The table inputs of an engine, float32.

    Args:
        table: What :func:`~modelopt_tdq.engine_table` returned, or what it takes: a table, or a quantized model.
        report: The engine's manifest, which holds what the columns mean.

    Raises:
        TdqError: It is no table of this engine.
    """
    found: Mapping[str, Any]
    if isinstance(table, (ScaleTable, nn.Module)):
        if report is None:
            raise TdqError(
                "table",
                type(table).__name__,
                "an engine without a manifest does not tell what its columns mean",
                "Pass modelopt_tdq.engine_table(onnx_file, table)",
            )
        found = engine_table(_described(report), table)
    else:
        found = table
    if not isinstance(found, Mapping) or set(found) != set(TABLE_INPUTS):
        shown = sorted(found) if isinstance(found, Mapping) else type(table).__name__
        raise TdqError(
            "table", shown, f"not the inputs {list(TABLE_INPUTS)}", "Pass what modelopt_tdq.engine_table returns"
        )
    tensors = {name: torch.as_tensor(found[name]).to(torch.float32) for name in TABLE_INPUTS}
    values, ends = tensors[TABLE_INPUT], tensors[EDGES_INPUT]
    if values.dim() != 2 or ends.shape != values.shape[:1]:
        raise TdqError(
            "table",
            {name: tuple(value.shape) for name, value in tensors.items()},
            "not [K, M] and [K]",
            "Pass what modelopt_tdq.engine_table returns",
        )
    return tensors


def _described(report: EngineReport) -> Any:
    """An ONNX model with the metadata of the engine's, and no graph: all that engine_table reads."""
    onnx = require("onnx", "onnx")
    model = onnx.ModelProto()
    for key, value in report.onnx_metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model
