"""Where NVIDIA's programs look for an ONNX file or an engine, and with which shapes they build and run it.

Facts of the same sources and versions as :data:`~modelopt_tdq.export.conventions.PROGRAMS`, as a table; none of these
programs has run with our files on the machine that this was written on.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.conventions import PROGRAMS, Convention
from modelopt_tdq.runtime.build.onnx_model import OnnxFacts, read_onnx
from modelopt_tdq.runtime.build.polygraphy_convert import polygraphy_command
from modelopt_tdq.runtime.build.trtexec import trtexec_command

__all__ = ["PLACES", "SOURCES", "Place", "backend_of", "engine_lines", "onnx_lines", "place_of", "sizes_of"]

Sizes = Mapping[str, tuple[int, int, int]]

#: What the facts are of, by program.
SOURCES: Mapping[str, str] = {
    "demo-diffusion": "demo/Diffusion of NVIDIA/TensorRT 11.1.0.106",
    "diffusion-trt": "examples/diffusers/quantization/diffusion_trt.py of NVIDIA/Model-Optimizer 0.47",
    "rtx-demo": "demo/flux1.dev of NVIDIA/TensorRT-RTX 1.5",
}


@dataclass(frozen=True)
class Place:
    """Where a program looks for one kind of denoiser.

    Attributes:
        command: Its script, with the options that choose the model.
        onnx: File that it builds its engine from, below its folder of ONNX files; None: any, by ``onnx_option``.
        onnx_option: Option that names another file; ``{onnx}`` stands for it.
        engine: File that it loads where there is one, below its folder of engines, ``{version}`` that of TensorRT;
            None: it takes no engine that it has not built.
        engine_option: Option that names another file, ``{engine}``.
        sizes: Ranges of the sizes that it may leave open, by their names: those of its profile with open shapes.
        fixed_batch: Options for a file whose batch is fixed.
        notes: What else has to be known.
    """

    command: str
    onnx: str | None = None
    onnx_option: str | None = None
    engine: str | None = None
    engine_option: str | None = None
    sizes: Sizes = field(default_factory=dict)
    fixed_batch: str | None = None
    notes: tuple[str, ...] = ()


_QUANTIZES_ITSELF = "Leave out --int8 and --fp8: with them it quantizes by itself and looks under other names."
_GUIDANCE = "The batch is 2 per image with guidance (the default), 1 without."
_FIXED = "--build-static-batch --batch-size {batch}"


def _older(script: str, version: str, model: str, sizes: Sizes, *notes: str) -> Place:
    """Pipelines that do not take ``--custom-onnx-paths``."""
    return Place(
        f"python {script} PROMPT --version {version}",
        onnx=f"onnx/{model}.opt/model.onnx",
        engine=f"engine/{model}.trt{{version}}.plan",
        sizes=sizes,
        fixed_batch=_FIXED,
        notes=(_QUANTIZES_ITSELF, *notes),
    )


def _newer(script: str, pipeline: str, version: str, sizes: Sizes, *notes: str, model: str = "transformer") -> Place:
    """Pipelines whose files may lie anywhere."""
    return Place(
        f"python {script} PROMPT --version {version}",
        onnx=f"onnx/{pipeline}_{version}/{model}/model_optimized.onnx",
        onnx_option=f"--custom-onnx-paths={model}:{{onnx}}",
        engine=f"engine/{pipeline}_{version}/{model}/engine_trt{{version}}.plan",
        engine_option=f"--custom-engine-paths={model}:{{engine}}",
        sizes=sizes,
        fixed_batch=_FIXED,
        notes=(_QUANTIZES_ITSELF, *notes),
    )


#: Latents of 256 to 1360 pixels. With open shapes, the likely image of U-Nets is 8 pixels less than a multiple of 16.
_LATENT_512 = dict.fromkeys("HW", (32, 63, 170))
_LATENT_1024 = dict.fromkeys("HW", (32, 127, 170))
_TWO = {"2B": (2, 2, 8)}
_IMAGE_504, _IMAGE_512 = (dict.fromkeys(("8H", "8W"), (256, likely, 1360)) for likely in (504, 512))

_SDXL_SIZES = {"batch_size": (2, 16, 16), "height": (128, 128, 128), "width": (128, 128, 128)}
_SMALLEST = "It runs an engine at the smallest shapes of its profile: batch 2 is one image with guidance."


def _diffusion_trt(model: str, sizes: Sizes, note: str) -> Place:
    return Place(
        f"python diffusion_trt.py --model {model}",
        onnx_option="--onnx-load-path {onnx}",
        engine_option="--onnx-load-path {onnx} --trt-engine-load-path {engine}",
        sizes=sizes,
        notes=(note,),
    )


#: By program and :attr:`~modelopt_tdq.export.conventions.Convention.of`.
PLACES: Mapping[str, Mapping[str, Place]] = {
    "demo-diffusion": {
        "the U-Net of Stable Diffusion": _older("demo_txt2img.py", "1.4", "unet", {**_TWO, **_LATENT_512}, _GUIDANCE),
        "the U-Net of Stable Diffusion with ControlNets in one graph": _older(
            "demo_controlnet.py", "1.4", "unet", {**_TWO, **_LATENT_512, **_IMAGE_504}, _GUIDANCE
        ),
        "the U-Net of SDXL": _older("demo_txt2img_xl.py", "xl-1.0", "unetxl", {**_TWO, **_LATENT_1024}, _GUIDANCE),
        "the U-Net of SDXL with ControlNets in one graph": _older(
            "demo_controlnet.py", "xl-1.0", "unetxl", {**_TWO, **_LATENT_512, **_IMAGE_512}, _GUIDANCE
        ),
        "the U-Net of Stable Video Diffusion": Place(
            "python demo_img2vid.py --version svd-xt-1.1",
            onnx="onnx/unet-temp.opt/model.onnx",
            engine="engine/unet-temp.trt{version}.plan",
            sizes={"2B": (2, 2, 2), "num_frames": (25, 25, 25), "H": (72, 72, 72), "W": (128, 128, 128)},
            notes=("Leave out --fp8.", "It has one video of fixed size: an export with nothing open serves it."),
        ),
        "the transformer of Stable Diffusion 3.5": _newer(
            "demo_txt2img_sd35.py",
            "StableDiffusion35Pipeline",
            "3.5-medium",
            {**_TWO, **dict.fromkeys("HW", (32, 128, 170)), "latent_dim": (256, 4096, 7225)},
            _GUIDANCE,
            "For the large model, 3.5-large in the place of 3.5-medium. Its help names --custom-onnx-paths for that "
            "one only; the code reads it for both.",
            "It runs Stable Diffusion 3 by another implementation, with other inputs, which an export does not serve.",
        ),
        "the transformer of Flux": _newer(
            "demo_txt2img_flux.py",
            "FluxPipeline",
            "flux.1-dev",
            {"B": (1, 1, 4), "latent_dim": (256, 4096, 7225)},
            "For other versions, such as flux.1-schnell, theirs in the place of flux.1-dev.",
        ),
        "the transformer of Wan": _newer(
            "demo_txt2vid_wan.py",
            "WanPipeline",
            "wan2.2-t2v-a14b",
            {},
            "One video of 81 frames, 720 by 1280, without guidance in the batch: nothing is open. The second "
            "transformer is transformer_2. Its help does not name --custom-onnx-paths; the code reads it.",
        ),
        "the transformer of Cosmos": _newer(
            "demo_txt2image_cosmos.py",
            "CosmosPipeline",
            "cosmos-predict2-2b-text2image",
            {
                "B": (1, 1, 4),
                "latent_frames": (1, 1, 1),
                "latent_H": (32, 96, 170),
                "latent_W": (32, 170, 170),
                "H": (256, 768, 1360),
                "W": (256, 1360, 1360),
            },
            "For video, demo_vid2world_cosmos.py with its version, and 24 latent frames.",
        ),
    },
    "diffusion-trt": {
        "the U-Net of SDXL": _diffusion_trt("sdxl-1.0", _SDXL_SIZES, _SMALLEST),
        "the transformer of Stable Diffusion 3": _diffusion_trt("sd3-medium", _SDXL_SIZES, _SMALLEST),
        "the transformer of Flux": _diffusion_trt(
            "flux-dev",
            {"batch_size": (1, 1, 1), "latent_dim": (4096, 4096, 4096)},
            "One image of 1024 by 1024: an export with nothing open serves it.",
        ),
    },
    "rtx-demo": {
        "the transformer of Flux": Place(
            "python flux1.dev/flux_demo.py --hf-token TOKEN --precision fp8",
            onnx="demo_cache/shared/onnx/flux_transformer/fp8/flux_transformer.onnx",
            sizes={"B": (1, 1, 4), "latent_dim": (256, 1024, 4096)},
            notes=(
                "Put the file there before the first run: it downloads one only where none is.",
                "--dynamic-shape builds for open sizes; the default for one image of 512 by 512.",
                "fp8 is a folder's name there: it holds for INT8 files, too, and asks for SM 8.9.",
            ),
        ),
    },
}


def place_of(program: str, file: str | os.PathLike[str]) -> tuple[Convention, Place]:
    """The kind of denoiser in an ONNX file, by its inputs, and where ``program`` looks for it.

    Raises:
        TdqError: There is no such program; or no denoiser of it has these inputs.
    """
    if program not in PROGRAMS:
        raise TdqError("for", program, "no such program", f"Use one of {', '.join(PROGRAMS)}")
    given = set(read_onnx(Path(file)).inputs)
    for convention in PROGRAMS[program]:
        names = set(convention.inputs.values())
        optional = {convention.inputs[own] for own in convention.optional}
        if names - optional <= given <= names:
            return convention, PLACES[program][convention.of]
    raise TdqError(
        "for",
        program,
        f"it has no denoiser with the inputs of {file}: {', '.join(sorted(given))}",
        f"Export with names={program!r}, or `modelopt-tdq export --for {program}`",
    )


def backend_of(program: str | None) -> Literal["tensorrt", "tensorrt_rtx"]:
    """What runs the engines of a program; without one, the builder that needs no GPU."""
    return "tensorrt_rtx" if program in (None, "rtx-demo") else "tensorrt"


def sizes_of(place: Place, facts: OnnxFacts, given: Sizes | None = None) -> dict[str, tuple[int, int, int]]:
    """The ranges of a file's open sizes: what is given, else the program's."""
    names: Set[Any] = {size for shape in facts.inputs.values() for size in shape}
    return {**{name: sizes for name, sizes in place.sizes.items() if name in names}, **(given or {})}


def _option(option: str, **files: str | os.PathLike[str]) -> str:
    """The option with the absolute paths of files."""
    paths = {name: os.fspath(Path(file).absolute()) for name, file in files.items()}
    for name, path in paths.items():
        if f":{{{name}}}" in option and any(sign in path for sign in ":,"):
            raise TdqError(
                name, path, "the program splits its paths at ':' and ','", "Put the file where its path has neither"
            )
    return option.format(**{name: shlex.quote(path) for name, path in paths.items()})


def onnx_lines(program: str, file: str | os.PathLike[str]) -> Iterator[str]:
    """What to do with an ONNX file so that ``program`` builds and runs its engine, line by line.

    Raises:
        TdqError: As :func:`place_of`; or the program cannot be given a path of this form.
    """
    convention, place = place_of(program, file)
    facts = read_onnx(Path(file))
    yield f"{convention.of}, for {SOURCES[program]}:"
    command = place.command
    batch = facts.inputs[next(iter(convention.inputs.values()))][0]
    if isinstance(batch, int) and convention.batch is not None and place.fixed_batch is not None:
        images = max(1, batch // 2) if convention.batch == "2B" else batch
        command += f" {place.fixed_batch.format(batch=images)}"
    if place.onnx_option is not None:
        yield f"  {command} {_option(place.onnx_option, onnx=file)}"
    else:
        beside = ", with the files beside it that hold its weights" if facts.external_data else ""
        yield f"  copy {os.fspath(file)} to {place.onnx}{beside}, then"
        yield f"  {command}"
    yield from (f"  {note}" for note in place.notes)


def engine_lines(
    program: str, file: str | os.PathLike[str], engine: str | os.PathLike[str], given: Sizes | None = None
) -> Iterator[str]:
    """How NVIDIA's tools build the engine of an ONNX file for ``program``, and where it has to be.

    Raises:
        TdqError: As :func:`onnx_lines`; or a size is open that neither the program nor ``given`` knows.
    """
    convention, place = place_of(program, file)
    backend = backend_of(program)
    sizes = sizes_of(place, read_onnx(Path(file)), given)
    yield f"The engine of {convention.of}, for {SOURCES[program]}, on the GPU that runs it:"
    yield f"  {shlex.join(polygraphy_command(file, engine, backend=backend, dynamic_sizes=sizes))}"
    yield f"  or {shlex.join(trtexec_command(file, engine, backend=backend, dynamic_sizes=sizes))}"
    if place.engine_option is not None:
        yield f"  {place.command} {_option(place.engine_option, onnx=file, engine=engine)}"
    elif place.engine is not None:
        where = place.engine.format(version="VERSION")
        yield f"  copy {os.fspath(engine)} to {where} (python -c 'import tensorrt; print(tensorrt.__version__)'), then"
        yield f"  {place.command}"
    else:
        yield "  It runs engines only that it has built; give it the ONNX file."
    yield from (f"  {note}" for note in place.notes)
