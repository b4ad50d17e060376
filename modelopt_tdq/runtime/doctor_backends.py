"""What each deployment backend can do on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module, metadata

from packaging.version import Version

from modelopt_tdq.runtime.build_options import OLDEST_TENSORRT

__all__ = ["DISTRIBUTION", "Backend", "examine_backends", "import_problem", "installed_version"]

DISTRIBUTION = "modelopt-tdq"


@dataclass(frozen=True)
class Backend:
    """What a deployment backend can do here.

    Attributes:
        name: Its usual name.
        build: Whether models can be prepared for it here (an engine built, a graph read).
        run: Whether models can run on it here.
        remark: What that means, in words.
        cure: What to do for the rest; empty if nothing is missing.
    """

    name: str
    build: bool
    run: bool
    remark: str
    cure: str = ""


def installed_version(name: str) -> str | None:
    """Of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_problem(module: str) -> str | None:
    """Why ``module`` cannot be imported, or None."""
    try:
        import_module(module)
    except (ImportError, OSError) as error:
        return str(error)
    return None


def _tensorrt_too_old() -> str | None:
    """Why builds refuse the installed TensorRT, or None."""
    version = str(import_module("tensorrt").__version__)
    if Version(version) >= Version(OLDEST_TENSORRT):
        return None
    return f"{version} is too old: builds need {OLDEST_TENSORRT} or later"


def _lookup_plugin() -> str:
    """Whether lowering="plugin" can be built here in its Python form."""
    for module, needs in (("tensorrt.plugin", "the full package tensorrt"), ("triton", "Triton")):
        if import_problem(module):
            return f"its Python form of the plugin TdqScaleLookup needs {needs}"
    return "the plugin TdqScaleLookup can be built in"


def examine_backends(
    gpus: tuple[str, ...], instructions: tuple[str, ...], torch_sees_gpu: bool = False
) -> Iterable[Backend]:
    """One after the other; each says what it needs and what it is for."""

    def cure(extra: str) -> str:
        return f"pip install '{DISTRIBUTION}[{extra}]'"

    gpu = gpus[0].split(",")[0] if gpus else None
    if problem := import_problem("onnxruntime") or import_problem("onnx"):
        yield Backend("ONNX Runtime", False, False, problem, cure("onnx"))
    else:
        yield Backend("ONNX Runtime", True, True, "the numeric reference, on the CPU; not meant for speed")

    if problem := import_problem("openvino"):
        yield Backend("OpenVINO", False, False, problem, cure("openvino"))
    else:
        speed = f"INT8 kernels use {', '.join(instructions)}" if instructions else "this CPU has no INT8 dot products"
        yield Backend("OpenVINO", True, True, f"on the CPU; {speed}")

    no_torch = "To run: install a CUDA build of torch" if gpu and not torch_sees_gpu else ""
    if problem := import_problem("tensorrt_rtx"):
        yield Backend("TensorRT-RTX", False, False, problem, cure("tensorrt-rtx"))
    elif gpu:
        here = f"builds ahead of time; runs on {gpu} if it is an RTX GPU"
        yield Backend("TensorRT-RTX", True, torch_sees_gpu, here, no_torch)
    else:
        yield Backend(
            "TensorRT-RTX", True, False, "builds ahead of time, for GPUs elsewhere", "To run: a machine with an RTX GPU"
        )

    if problem := import_problem("tensorrt"):
        needs = "" if gpu else ", on a machine with an NVIDIA GPU"
        yield Backend("TensorRT", False, False, problem, cure("tensorrt") + needs)
    elif problem := _tensorrt_too_old():
        yield Backend("TensorRT", False, False, problem, cure("tensorrt"))
    elif gpu:
        yield Backend("TensorRT", True, torch_sees_gpu, f"builds for and runs on {gpu}; {_lookup_plugin()}", no_torch)
    else:
        yield Backend("TensorRT", False, False, "it needs a GPU to build, too", "A machine with an NVIDIA GPU")

    if problem := import_problem("polygraphy"):
        yield Backend("Polygraphy", False, False, problem, cure("compare"))
    else:
        yield Backend("Polygraphy", True, True, "compares the backends above, per time step")
