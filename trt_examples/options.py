"""The command line that all families share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from modelopt_tdq.export.conventions import PROGRAMS
from modelopt_tdq.lab.placement import DTYPES, OFFLOADS, Placement
from modelopt_tdq.runtime.build.build import DEFAULT_COMPUTE_CAPABILITIES
from trt_examples.family import Family

#: What torch calls the types, which users may write as well.
_TORCH_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}

STEPS = ("quantize", "export", "build", "compare", "run")


def parse(family: Family, description: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """The options of one run; ``step`` is the list of steps to take, in their order."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("step", nargs="+", choices=[*STEPS, "all"], help="what to do; each step reads what the former ones wrote")
    add("--tiny", action="store_true", help="small random parts: offline, seconds on a CPU")
    add("--model", default=family.model, help="hub id or folder of the pipeline (%(default)s)")
    add("--output", type=Path, help=f"folder for everything (tdq-{family.name}, tdq-{family.name}-tiny)")
    add("--prompts", type=Path, metavar="FILE", help="one prompt per line, in place of the built-in ones")
    add("--recipe", default="int8", help="int8, fp8, w4a8, ... or a YAML file (%(default)s)")
    add("--calibration-steps", type=int, default=20, help="sampling steps in calibration (%(default)s)")
    add("--steps", type=int, default=family.steps, help="sampling steps of images: any number (%(default)s)")
    add("--seed", type=int, default=1, help="of the images' noise (%(default)s)")
    if family.sized:
        add("--height", type=int, help="the model's own unless given")
        add("--width", type=int)
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU, if there is one")
    add("--dtype", choices=[*DTYPES, *_TORCH_NAMES], help="fp32 on a CPU, else fp16")
    add(
        "--offload",
        nargs="?",
        const="model",
        default="none",
        choices=OFFLOADS,
        help="what waits in CPU memory until it is needed: each model of the pipeline (default), layer, or block",
    )
    add("--shard", action="store_true", help="quantize: spread the denoiser over the processes (fully_shard)")
    export = parser.add_argument_group("export, build")
    export.add_argument("--dynamic-batch", action="store_true", help="leave the batch size open")
    export.add_argument(
        "--for",
        dest="program",
        choices=list(PROGRAMS),
        help="program of NVIDIA's that runs the engine: names and open sizes are its own; what to do next is printed",
    )
    export.add_argument("--builder", default="tensorrt_rtx", choices=["tensorrt_rtx", "tensorrt"])
    export.add_argument(
        "--compute-capability", action="append", metavar="X.Y", help="GPU for tensorrt_rtx; may be repeated (8.9, 12.0)"
    )
    export.add_argument("--allow-float", action="store_true", help="keep an engine in which a quantized layer is float")
    compare = parser.add_argument_group("compare, run")
    compare.add_argument("--compare-steps", type=int, default=3, help="time steps, spread over --steps (%(default)s)")
    compare.add_argument("--layers", action="store_true", help="compare the codes of every layer, too")
    compare.add_argument(
        "--backend", default="onnxruntime", choices=["onnxruntime", "openvino", "tensorrt_rtx", "tensorrt"]
    )
    options = parser.parse_args(arguments)
    options.step = [step for step in STEPS if step in options.step or "all" in options.step]
    chosen = Placement.of(options.device, _TORCH_NAMES.get(options.dtype, options.dtype or "fp32"), options.offload)
    options.device = str(chosen.device)
    options.dtype = str(chosen.dtype if options.dtype or options.device == "cpu" else torch.float16)[len("torch.") :]
    options.output = options.output or Path(f"tdq-{family.name}" + ("-tiny" if options.tiny else ""))
    options.compute_capability = tuple(options.compute_capability or DEFAULT_COMPUTE_CAPABILITIES)
    return options
