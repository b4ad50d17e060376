"""Inputs of a graph, in the dtypes that it declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from modelopt_tdq.errors import TdqError

__all__ = ["as_feeds"]


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
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
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
