"""``modelopt-tdq export``."""

from __future__ import annotations

import re
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from modelopt_tdq.cli.options import Device, Folder, Program
from modelopt_tdq.cli.output import finish
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.errors import TdqError, TdqWarning
from modelopt_tdq.lab.sources import require_quantized

__all__ = ["export"]


class Lowering(str, Enum):
    """How time-dependent scales are written in ONNX."""

    RATIO = "ratio"
    PLUGIN = "plugin"
    REFERENCE = "reference"


class Packing(str, Enum):
    """How weights of at most 4 bits are stored."""

    NONE = "none"
    CAST = "cast"
    DIRECT = "direct"


def _axes(texts: list[str]) -> dict[str, dict[int, str]]:
    axes: dict[str, dict[int, str]] = {}
    for text in texts:
        found = re.fullmatch(r"(.+):(-?\d+)=(.+)", text)
        if found is None:
            raise TdqError("dynamic_axis", text, "not of the form INPUT:AXIS=NAME", "For example sample:2=height")
        axes.setdefault(found[1], {})[int(found[2])] = found[3]
    return axes


def _names(texts: list[str]) -> str | dict[str, str]:
    """A preset, or new names by those that the arguments of the model have."""
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    found = dict(text.split("=", 1) for text in texts if "=" in text)
    if len(found) < len(texts):
        raise TdqError("names", texts, "neither a preset nor OWN=NEW for each tensor", "For example output=latent")
    return found


def export(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="ONNX file to write.")] = Path("model.onnx"),
    lowering: Annotated[
        Lowering,
        typer.Option(
            help="ratio: for TensorRT and OpenVINO; plugin: the same, its lookup done by the TensorRT plugin "
            "TdqScaleLookup; reference: the yardstick, for ONNX Runtime."
        ),
    ] = Lowering.RATIO,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size. Default: that of the calibration.", show_default=False)
    ] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the batch size open.")] = False,
    dynamic_axis: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave another size open, such as sample:2=height; may be repeated. `build --dynamic-size` takes its "
            "range.",
            metavar="INPUT:AXIS=NAME",
        ),
    ] = None,
    constant: Annotated[
        list[str] | None,
        typer.Option(
            help="An input that is the same in every call, such as a mask that hides nothing: its value becomes part "
            "of the graph; may be repeated.",
            metavar="INPUT",
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            help="What inputs and outputs are called. forward: as the arguments of the model; demo-diffusion, "
            "diffusion-trt, rtx-demo: as these programs of NVIDIA's call them, see --for; or OWN=NEW, such as "
            "output=latent, which may be repeated.",
            metavar="PRESET|OWN=NEW",
        ),
    ] = None,
    program: Program = None,
    table_input: Annotated[
        bool,
        typer.Option(
            "--table-input",
            help="Make the scales inputs of the graph, so that one engine serves every table of the model; "
            "modelopt_tdq.engine_table makes the inputs. With --lowering ratio.",
        ),
    ] = False,
    pack_weights: Annotated[
        Packing,
        typer.Option(
            help="Weights of at most 4 bits. none: in INT8 tensors; cast: two to a byte, for ONNX Runtime and "
            "OpenVINO; direct: those of matrix products two to a byte, for TensorRT, at a kernel more per layer."
        ),
    ] = Packing.NONE,
    device: Device = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Of the graph. Default: as it was quantized.", metavar="fp32|bf16|fp16")
    ] = None,
) -> None:
    """Export a quantized model to ONNX; standard operators only, but for the node of --lowering plugin.

    The inputs have the names and shapes that calibration used. Calibrate with one time per sample to get an
    ONNX file that takes one time per sample.
    """
    # before all that takes seconds to import
    require_writable(output)
    axes = _axes(dynamic_axis or [])
    if program is not None and names:
        raise TdqError("names", names, f"--for {program} gives the names", "Leave out one of the two")
    called = program or _names(names or ["forward"])
    require_quantized(folder)
    from modelopt_tdq.lab.placement import Placement

    Placement.of(device, dtype or "fp32")
    import logging
    import warnings

    from modelopt_tdq.export import export_onnx
    from modelopt_tdq.export.names import opens_batch
    from modelopt_tdq.lab.model_folder import load_quantized, make_inputs
    from modelopt_tdq.model.call import tensor_leaves
    from modelopt_tdq.runtime.build.programs import onnx_lines

    # torch's exporter tells of its own deprecations and of packages that it does without
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", TdqWarning)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    found = load_quantized(folder)
    placement = Placement.of(device, dtype or found.description.get("dtype", "fp32"))
    placement.place(found.model)
    inputs = placement.moved(make_inputs(found.inputs, batch))
    if program is not None and batch is None and opens_batch(program, tensor_leaves(inputs)):
        dynamic_batch = True
        if next(len(each) for each in tensor_leaves(inputs).values() if each.dim()) < 2:
            # an export cannot tell a batch of 1 from "any"
            inputs = placement.moved(make_inputs(found.inputs, 2))
    report = export_onnx(
        found.model,
        output,
        inputs,
        lowering=lowering.value,
        dynamic_batch=dynamic_batch,
        dynamic_axes=axes,
        table_input=table_input,
        pack_weights=pack_weights.value,
        constants=constant or (),
        names=called,
    )
    typer.echo(str(report))
    if program is not None:
        for line in onnx_lines(program, report.path):
            typer.echo(line)
        typer.echo(f"Next, if the engine shall be built beforehand: modelopt-tdq build {report.path} --for {program}")
    elif lowering is Lowering.RATIO:
        typer.echo(f"Next: modelopt-tdq build {report.path}")
    elif lowering is Lowering.PLUGIN:
        typer.echo(f"For backends without the plugin: modelopt-tdq twin {report.path}")
    finish({**asdict(report), "path": str(report.path)})
