"""Inputs of a graph, in the dtypes that it declares."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.inputs import FIXED, as_real, fixed_value

__all__ = ["as_feeds", "graph_inputs"]


def _array(value: Any) -> np.ndarray[Any, Any]:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    host = value.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy()  # NumPy itself has no bfloat16


def graph_inputs(inputs: Mapping[str, Any], expected: Collection[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a graph takes of the arguments of a call.

    Args:
        inputs: By name. Complex ones [...] are given as [..., 2], real and imaginary part: graphs have no others. Those
            that are part of the graph may be among them, with the values that they have there.
        expected: Names of the graph's inputs.
        metadata: Of the graph, which says what is part of it.

    Raises:
        TdqError: A name is missing or unknown, or a value is another one than the graph has.
    """
    if further := set(inputs) - set(expected):
        fixed: dict[str, Any] = json.loads(metadata.get(FIXED, "{}"))
        for name in sorted(further & set(fixed)):
            value = inputs[name]
            if isinstance(value, (Tensor, np.ndarray)):
                value = fixed_value(torch.as_tensor(value))
            if value != fixed[name]:
                raise TdqError(
                    name,
                    inputs[name],
                    f"the graph was exported with {fixed[name]!r}, which is part of it",
                    "Pass that value, or export again with sample inputs of a call like this one",
                )
            further.remove(name)
    if further or not set(inputs) >= set(expected):
        raise TdqError("inputs", sorted(inputs), "not the inputs of the graph", f"Pass {sorted(expected)}")
    return {name: _in_real_numbers(inputs[name]) for name in expected}


def _in_real_numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return as_real(value)
    return np.stack([np.real(value), np.imag(value)], -1) if np.iscomplexobj(value) else value


def as_feeds(
    inputs: Mapping[str, Any], expected: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """NumPy arrays for a graph.

    Args:
        inputs: By name: NumPy arrays, torch tensors or Python numbers; see :func:`graph_inputs`.
        expected: NumPy dtype of each graph input.
        metadata: Of the graph.

    Raises:
        TdqError: A name is missing or unknown, a value is another one than the graph has, or cannot be held by the
            graph's integer dtype.
    """
    feeds = {}
    for name, value in graph_inputs(inputs, expected, metadata or {}).items():
        array = _array(value)
        with np.errstate(over="ignore"):  # too large for a half is infinite, as in torch
            converted = array.astype(expected[name])
        if converted.dtype.kind in "iub" and not np.array_equal(converted, array):
            raise TdqError(
                name,
                array,
                f"the graph takes {converted.dtype}, which cannot hold this",
                "Export with sample inputs of the dtype that will be passed",
            )
        feeds[name] = converted
    return feeds
