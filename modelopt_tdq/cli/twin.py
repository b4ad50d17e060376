"""``modelopt-tdq twin``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelopt_tdq.core.files import require_writable

__all__ = ["twin"]


def twin(
    onnx: Annotated[
        Path, typer.Argument(help="ONNX file, from `modelopt-tdq export --lowering plugin`.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option(help="ONNX file to write. Default: <name>_twin.onnx beside it.", show_default=False)
    ] = None,
) -> None:
    """Write the plugin-free twin of a graph with the TensorRT plugin: standard operators, the same numbers."""
    target = output or onnx.with_name(f"{onnx.stem}_twin{onnx.suffix}")
    require_writable(target)
    from modelopt_tdq.runtime.twin import write_twin

    typer.echo(f"{write_twin(onnx, target)}: plugin-free")
