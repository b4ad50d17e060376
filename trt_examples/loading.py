"""The family's pipeline, in full precision or with the quantized denoiser, and its calls."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch

from modelopt_tdq.errors import TdqError
from trt_examples.family import Family


def prompts(family: Family, options: argparse.Namespace) -> list[str]:
    if options.prompts is None:
        return list(family.prompts)
    if not options.prompts.is_file():
        raise TdqError("prompts", str(options.prompts), "no such file", "Name a text file with one prompt per line")
    found = [line.strip() for line in options.prompts.read_text().splitlines() if line.strip()]
    if not found:
        raise TdqError("prompts", str(options.prompts), "it holds no prompt", "Write one prompt per line")
    return found


def calls(family: Family, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The arguments of one call of the pipeline per prompt."""
    lines = prompts(family, options)
    if options.tiny:
        return [_placed(family.tiny_call(number), options) for number in range(len(lines))]
    size = {name: getattr(options, name, None) for name in ("height", "width")}
    given = {name: value for name, value in size.items() if value is not None}
    return [{**family.call(line), **family.settings, **given} for line in lines]


def _placed(call: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Embeddings as text encoders give them: on the device, in the pipeline's type."""
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    return {name: value.to(**place) if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def denoiser_folder(options: argparse.Namespace) -> Path:
    folder: Path = options.output / "denoiser"
    return folder


def load(family: Family, options: argparse.Namespace, *, quantized: bool = False) -> Any:
    """The pipeline on its device; ``quantized`` with the denoiser that the step quantize saved."""
    parts = {family.denoiser: _quantized(options)} if quantized else {}
    dtype = getattr(torch, options.dtype)
    if options.tiny:
        pipeline = family.tiny() if dtype == torch.float32 else family.tiny().to(dtype)
        for name, part in parts.items():
            setattr(pipeline, name, part)
    else:
        try:
            kind = getattr(diffusers, family.pipeline)
            pipeline = kind.from_pretrained(options.model, torch_dtype=dtype, **parts)
        except (OSError, ValueError) as error:
            raise TdqError(
                "model", options.model, f"it cannot be loaded ({error})", "Name a hub id or a folder, or use --tiny"
            ) from error
    if options.offload == "model":
        pipeline.enable_model_cpu_offload(device=options.device)
    elif options.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=options.device)
    elif options.offload == "group":
        pipeline.enable_group_offload(torch.device(options.device), offload_type="block_level", num_blocks_per_group=1)
    else:
        pipeline.to(options.device)
    return pipeline


def _quantized(options: argparse.Namespace) -> Any:
    folder = denoiser_folder(options)
    if not (folder / "config.json").is_file():
        raise TdqError("output", str(options.output), "it holds no quantized denoiser", "Run the step quantize first")
    kind = getattr(diffusers, diffusers.AutoModel.load_config(folder)["_class_name"])
    return kind.from_pretrained(folder, torch_dtype=getattr(torch, options.dtype)).eval()
