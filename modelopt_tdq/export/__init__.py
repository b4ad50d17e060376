"""Export: torch to a marker graph, and its lowerings to standard ONNX operators.

Read ``onnx_export`` first, then ``markers``, ``spec``, ``read``, ``lookup``, and the lowerings ``reference`` and
``ratio``.
"""

from modelopt_tdq.export.onnx_export import ExportReport, export_onnx
from modelopt_tdq.export.plugin import plugin_free
from modelopt_tdq.export.table_input import engine_table

__all__ = ["ExportReport", "engine_table", "export_onnx", "plugin_free"]
