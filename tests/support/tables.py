"""Scale tables for tests."""

from __future__ import annotations

import torch

import modelopt_tdq as tdq


def with_dequantization(table: tdq.ScaleTable) -> tdq.ScaleTable:
    """A table whose codes are turned back by other scales, which move over time in their own way.

    Columns in turn: plain; another scale and the value of code 0 is 0; another scale, and zero stays zero.
    """
    column = torch.arange(len(table.names)) % 3
    own = table.scale * torch.tensor([1.0, 1.4, 0.6])[column] * (table.scale / table.scale.amin(0)) ** 0.3
    scale = torch.where(column == 0, table.scale, own)
    offset = None
    if table.offset is not None:
        # the code of zero, -o / s, turned back by s' and o', is zero
        offset = torch.where(column == 0, table.offset, torch.round(table.offset / table.scale) * scale)
        offset = torch.where(column == 1, 0.0, offset)
    return tdq.ScaleTable(table.timesteps, table.scale, table.names, table.offset, scale, table.metadata, offset)
