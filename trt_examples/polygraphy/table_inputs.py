"""Inputs for a graph whose table is an input (``modelopt-tdq export --table-input``): the table, in every step.

Change the two constants for a graph and a table of your own.
"""

from collections.abc import Iterator

import data_loader  # beside this file
import given_codes  # beside this file

from modelopt_tdq import ScaleTable
from modelopt_tdq.export import engine_table

GRAPH = "table.onnx"
TABLE = "int8/scale_table"  # in the folder that `modelopt-tdq quantize` wrote


def load_data() -> Iterator[data_loader.Feeds]:
    """The inputs of ``data_loader.py``, and the table."""
    table = engine_table(GRAPH, ScaleTable.load(TABLE))
    for feeds in data_loader.load_data():
        yield {**feeds, **table}


def load_given_codes() -> Iterator[data_loader.Feeds]:
    """The inputs of ``given_codes.py``, and the table."""
    table = engine_table(GRAPH, ScaleTable.load(TABLE))
    for feeds in given_codes.load_data():
        yield {**feeds, **table}
