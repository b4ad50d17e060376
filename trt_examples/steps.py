"""Five steps from a diffusers pipeline to an engine in its place: quantize, export, build, compare, run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import torch
from accelerate.hooks import remove_hook_from_submodules
from rich.console import Console

import modelopt_tdq as tdq
from modelopt_tdq.compare import ModelComparison, compare_model, render
from modelopt_tdq.export.names import as_passed, opens_batch
from modelopt_tdq.model.call import tensor_leaves
from modelopt_tdq.runtime.build.onnx_model import read_onnx
from modelopt_tdq.runtime.build.precision import render_precision
from modelopt_tdq.runtime.build.programs import engine_lines, onnx_lines, place_of, sizes_of
from trt_examples.family import Family
from trt_examples.images import Images, compared
from trt_examples.loading import calls, denoiser_folder, load
from trt_examples.options import parse
from trt_examples.processes import gathered, is_first, join, shard


def quantize(family: Family, options: argparse.Namespace) -> tdq.ScaleTable:
    """Calibrate on the pipeline's own sampling; save as diffusers and ModelOpt do, and the table of scales.

    Under torchrun and accelerate launch, the processes share the prompts.
    """
    pipeline = load(family, options)
    every = calls(family, options)
    if options.shard:
        shard(getattr(pipeline, family.denoiser))
    tdq.quantize_pipeline(
        pipeline,
        tdq.recipe(options.recipe),
        calls=every,
        steps=options.calibration_steps,
        component=family.denoiser,
        share_calls=True,
        progress=is_first(),
    )
    denoiser = getattr(pipeline, family.denoiser)
    table = tdq.scale_table(denoiser)
    if options.offload != "none":
        remove_hook_from_submodules(denoiser)  # with its weights in place, it can be saved
    if options.shard:
        denoiser = gathered(denoiser, lambda: getattr(load(family, options), family.denoiser))
    if is_first():
        denoiser.save_pretrained(denoiser_folder(options))
        table.save(options.output / "scale_table")
        following = int((~table.is_static).sum())
        print(f"{denoiser_folder(options)}: {len(table.names)} quantizers, {following} follow {len(table)} times")
    return table


def export(family: Family, options: argparse.Namespace) -> tdq.ExportReport:
    """The denoiser as ONNX, with the inputs that the pipeline passes."""
    pipeline = load(family, options, quantized=True)
    call, names = calls(family, options)[0], options.program or "forward"
    inputs = tdq.sample_inputs(pipeline, family.denoiser, **call)
    opens = options.dynamic_batch or opens_batch(names, tensor_leaves(inputs))
    if opens and len(next(each for each in tensor_leaves(inputs).values() if each.dim())) < 2:
        # a batch of 1 cannot be told from any other
        inputs = tdq.sample_inputs(pipeline, family.denoiser, **call, num_images_per_prompt=2)
    report = tdq.export_onnx(
        getattr(pipeline, family.denoiser),
        options.output / "model.onnx",
        inputs,
        dynamic_batch=opens,
        reference_path=_reference(options),
        names=names,
    )
    print(f"{report.path}: {len(report.quantized)} quantizers in low precision, {len(report.skipped)} skipped")
    for name, reason in report.skipped:
        print(f"  skipped {name}: {reason}")
    if options.program is not None:
        print("\n".join(onnx_lines(options.program, report.path)))
    return report


def build(family: Family, options: argparse.Namespace) -> tdq.EngineReport:
    """A TensorRT engine, and which of its quantized layers got low-precision kernels."""
    chosen: dict[str, Any] = {"allow_float": True} if options.allow_float else {}
    file, engine = options.output / "model.onnx", options.output / "model.engine"
    if options.builder == "tensorrt_rtx":
        chosen["compute_capabilities"] = options.compute_capability
    if options.program is not None:
        chosen["dynamic_sizes"] = sizes_of(place_of(options.program, file)[1], read_onnx(file))
        print("\n".join(engine_lines(options.program, file, engine)))
    report = tdq.build_engine(file, engine, backend=options.builder, **chosen)
    Console().print(render_precision(report))
    print(f"{report.engine}: {report.kernels} kernels ({report.backend} {report.backend_version})")
    return report


def compare(family: Family, options: argparse.Namespace) -> ModelComparison:
    """Torch and the exported graph in ONNX Runtime against the reference, on steps of the pipeline's own sampling."""
    _check_dtype(options, "onnxruntime")
    pipeline = load(family, options, quantized=True)
    trajectory = tdq.trajectory_inputs(
        pipeline, family.denoiser, **calls(family, options)[0], num_inference_steps=options.steps
    )
    wanted = torch.linspace(0, len(trajectory) - 1, min(options.compare_steps, len(trajectory))).round().int()
    denoiser = getattr(pipeline, family.denoiser)
    passed = [trajectory[step] for step in wanted.tolist()]
    if options.program is not None:
        passed = [dict(as_passed(options.program, call, "timestep", denoiser.config)) for call in passed]
    comparison = compare_model(
        denoiser,
        passed,
        backends=("torch", "onnxruntime"),
        layers=options.layers,
        reference_path=_reference(options),
        lowered_path=options.output / "model.onnx",
    )
    Console().print(render(comparison))
    return comparison


def run(family: Family, options: argparse.Namespace) -> Images:
    """One image, or the frames of a video: full precision, quantized in torch, and on the engine, at the same seed."""
    _check_dtype(options, options.backend)
    call = calls(family, options)[0]
    engine = options.output / ("model.onnx" if options.backend in ("onnxruntime", "openvino") else "model.engine")
    if not engine.is_file():
        step = "export" if engine.suffix == ".onnx" else "build"
        raise tdq.TdqError("output", str(options.output), f"it holds no {engine.name}", f"Run the step {step} first")
    images = compared(
        {
            "full precision": lambda: load(family, options),
            "quantized": lambda: load(family, options, quantized=True),
            options.backend: lambda: tdq.swap_denoiser(
                load(family, options, quantized=True),
                engine,
                component=family.denoiser,
                backend=options.backend,
                free=True,
            ),
        },
        {**call, "num_inference_steps": options.steps},
        options.seed,
    )
    print(images)
    print(images.save(options.output / "images.png"))
    return images


def _reference(options: argparse.Namespace) -> Path | None:
    """Where export and compare, in one run, share what torch traced; a comparison by itself traces the model anew."""
    return options.output / "reference.onnx" if {"export", "compare"} <= set(options.step) else None


def _check_dtype(options: argparse.Namespace, backend: str) -> None:
    if options.dtype == "bfloat16" and backend in ("onnxruntime", "openvino"):
        raise tdq.TdqError(
            "dtype", options.dtype, f"{backend} cannot run it on a CPU", "Use --dtype float16 throughout"
        )


_STEPS = {"quantize": quantize, "export": export, "build": build, "compare": compare, "run": run}


def main(family: Family, description: str | None = None, arguments: list[str] | None = None) -> dict[str, Any]:
    """What each of the steps on the command line found, by the step's name.

    Raises:
        TdqError: An option cannot be used, a step before is missing, or one fails.
    """
    options = parse(family, description, arguments)
    join(options)
    mto.enable_huggingface_checkpointing()  # save_pretrained and from_pretrained keep the quantizers
    options.output.mkdir(parents=True, exist_ok=True)
    return {step: _STEPS[step](family, options) for step in options.step}


def run_script(family: Family, description: str | None) -> None:
    """The command line of a family: exit status 1 after an error, or if the exported graph differs."""
    try:
        found = main(family, description)
    except tdq.TdqError as error:
        raise SystemExit(f"error: {error}") from None
    if "compare" in found and not found["compare"].passed:
        raise SystemExit("compare: the exported graph differs from the quantized model by more than rounding explains")
