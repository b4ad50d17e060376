"""Options that several commands share, and what they read alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "CalibrationScript",
    "Device",
    "Dtype",
    "Folder",
    "Maintenance",
    "Model",
    "Offload",
    "Program",
    "Recipe",
    "Samples",
    "Seed",
    "Steps",
    "Subfolder",
    "command_line",
    "names",
]

Model = Annotated[
    str | None,
    typer.Option(
        help="Folder of a diffusers model or pipeline, or a hub id; or a reference model: unet, dit, terrain. Default: "
        "unet, the bundled CIFAR-10 denoiser."
    ),
]
Subfolder = Annotated[
    str | None, typer.Option(help="Of the model in --model, such as unet or transformer, for a whole pipeline.")
]
Recipe = Annotated[
    str, typer.Option(help="int8, fp8, w8a4, w4a8, w4a4, w3a3, or a YAML file of the same form.", metavar="NAME|FILE")
]
CalibrationScript = Annotated[
    str | None,
    typer.Option(
        help="Your own calibration: function(model) in a Python file, which samples with it over whole trajectories. "
        "Needed for models that take more than a sample and a time. The file is executed.",
        metavar="FILE.py:FUNCTION",
    ),
]
Maintenance = Annotated[
    str,
    typer.Option(
        help="What becomes of the temporal features, the outputs of layers that depend on the time alone. none: as the "
        "recipe has it, usually full precision; naive: quantized like any other layer; tib: quantized as one unit, "
        "deployed as a table; cache: stored quantized; auto: tib or cache, whichever errs less.",
        metavar="none|naive|tib|cache|auto",
    ),
]
Device = Annotated[
    str, typer.Option(help="Where the model computes. auto: on a GPU, if there is one.", metavar="cpu|cuda|cuda:1|auto")
]
Dtype = Annotated[str, typer.Option(help="Of the model's weights and inputs.", metavar="fp32|bf16|fp16")]
Offload = Annotated[
    str,
    typer.Option(
        help="What waits in CPU memory until it is needed. sequential: each layer (accelerate); group: each block "
        "(diffusers).",
        metavar="none|sequential|group",
    ),
]
Program = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Program of NVIDIA's that runs the engine: names and open sizes are what it expects, and where it looks "
        "for the file is printed. demo-diffusion: of TensorRT; diffusion-trt: ModelOpt's example; rtx-demo: of "
        "TensorRT-RTX.",
        metavar="demo-diffusion|diffusion-trt|rtx-demo",
        show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Sampling trajectories to calibrate on. Default: 16, terrain 4; analyze at most 8.",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Sampling steps of each: the rows of the scale table. Default: 20, terrain 11.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Of the noise that the trajectories start from.")]
Folder = Annotated[Path, typer.Argument(help="Folder written by `modelopt-tdq quantize`.", show_default=False)]


def command_line() -> str:
    """What was called, to be written beside results."""
    return " ".join(["modelopt-tdq", *sys.argv[1:]])


def names(text: str) -> list[str]:
    """Those of an option that takes several, separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]
