"""The ranges of shapes that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.table_input import ROWS
from modelopt_tdq.runtime.build.onnx_model import OnnxFacts

__all__ = ["DEFAULT_BATCH", "DEFAULT_ROWS", "shape_profile"]

#: Smallest, most likely and largest batch, where the model leaves it open and the caller does not say.
DEFAULT_BATCH = (1, 2, 16)

#: Likewise for the rows of a table that is an input: the whole schedule of a model with 1000 training steps.
DEFAULT_ROWS = (1, 50, 1000)


def shape_profile(facts: OnnxFacts, sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, list[list[int]]]:
    """Input name to smallest, most likely and largest shape, for the inputs with open dimensions.

    Args:
        facts: Of the ONNX file.
        sizes: As ``dynamic_sizes`` of :func:`~modelopt_tdq.build_engine`.

    Raises:
        TdqError: A range is none, or belongs to no open dimension; or an open dimension has no range.
    """
    names = {size for shape in facts.inputs.values() for size in shape if isinstance(size, str)}
    if unknown := set(sizes) - names:
        raise TdqError(
            "dynamic_sizes",
            sorted(unknown),
            "the model has no open dimension of this name",
            f"Its open dimensions: {', '.join(sorted(names)) or 'none'}",
        )
    for name, sizes_of_name in sizes.items():
        if len(sizes_of_name) != 3 or not 0 < sizes_of_name[0] <= sizes_of_name[1] <= sizes_of_name[2]:
            raise TdqError(
                "dynamic_sizes",
                {name: sizes_of_name},
                "not three ascending sizes",
                "Pass smallest, most likely, largest",
            )
    batches = {shape[0] for shape in facts.inputs.values() if shape and isinstance(shape[0], str)}
    profile = {}
    for tensor, shape in facts.inputs.items():
        if all(isinstance(size, int) for size in shape):
            continue
        ranges: list[tuple[int, int, int]] = []
        for size in shape:
            if isinstance(size, int):
                ranges.append((size, size, size))
            elif size in sizes or size in batches:
                smallest, likely, largest = sizes.get(size, DEFAULT_ROWS if size == ROWS else DEFAULT_BATCH)
                ranges.append((smallest, likely, largest))
            else:
                raise TdqError(
                    "dynamic_sizes",
                    dict(sizes),
                    f"input {tensor!r} leaves its dimension {size!r} open",
                    f"Pass dynamic_sizes={{{size!r}: (smallest, most likely, largest)}}",
                )
        profile[tensor] = [[each[which] for each in ranges] for which in range(3)]
    return profile
