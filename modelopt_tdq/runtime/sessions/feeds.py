"""Inputs of a graph, in the dtypes that it declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError

__all__ = ["as_feeds"]


def _array(value: Any) -> np.ndarray[Any, Any]:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    host = value.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy()  # NumPy itself has no bfloat16


def as_feeds(inputs: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """NumPy arrays for a graph.

    Args:
        inputs: By name: NumPy arrays, torch tensors or Python numbers.
        expected: NumPy dtype of each graph input.

    Raises:
        TdqError: A name is missing or unknown, or a value cannot be held by the graph's integer dtype.
    """
    if set(inputs) != set(expected):
        raise TdqError("inputs", sorted(inputs), "not the inputs of the graph", f"Pass {sorted(expected)}")
    feeds = {}
    for name, value in inputs.items():
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
