"""Export: torch to a marker graph, and its lowerings to standard ONNX operators."""

from modelopt_tdq.export.onnx_export import ExportReport, export_onnx

__all__ = ["ExportReport", "export_onnx"]
