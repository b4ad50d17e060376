"""``modelopt-tdq table``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from modelopt_tdq.cli.options import Folder
from modelopt_tdq.core.files import require_writable

__all__ = ["table"]


class Form(str, Enum):
    """What scales are written as."""

    TABLE = "table"
    STATIC_JSON = "static-json"
    CHECKPOINT = "checkpoint"


def table(
    folder: Folder,
    output: Annotated[
        Path | None,
        typer.Option(
            help="What to write. Default: scale_table.safetensors, static_scales.json or checkpoint/ in the folder.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Form,
        typer.Option(
            help="table: the scales over time; static-json: one scale per layer, for programs that know no time, as "
            "TensorRT Model Connect; checkpoint: of Hugging Face's form, one scale per layer, the table beside it."
        ),
    ] = Form.TABLE,
) -> None:
    """Write the scales of a quantized model: the table over time, or what programs without time can use of it."""
    defaults = {Form.TABLE: "scale_table.safetensors", Form.STATIC_JSON: "static_scales.json"}
    target = output or folder / defaults.get(to, "checkpoint")
    require_writable(target, folder=to is Form.CHECKPOINT)
    from modelopt_tdq.export.static_scales import write_static_checkpoint, write_static_json
    from modelopt_tdq.lab.model_folder import load_quantized
    from modelopt_tdq.model.model_table import scale_table

    model = load_quantized(folder).model
    found = scale_table(model)
    if to is Form.TABLE:
        written = found.save(target)
    elif to is Form.STATIC_JSON:
        written = write_static_json(model, target)
    else:
        written = write_static_checkpoint(model, target)
    following = int((~found.is_static).sum())
    typer.echo(f"{written}: {len(found.names)} quantizers, {following} follow {len(found)} times")
    if to is not Form.TABLE and following:
        typer.echo("Each has the largest of its scales; for static deployment, calibrate with bins: 1")
